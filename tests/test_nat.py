import itertools
import pickle
import sys

import nat_reference
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from nat_reference import ARCHITECTURES

from helpers import lively
from rat_timm import RatConfig
from rat_timm.__main__ import main
from rat_timm.models.rat.checkpoint import checkpoint_filter_fn
from rat_timm.timm_api.convert import convert, convertible
from rat_timm.timm_api.state_dict import fit

NARROW = (32, (1, 2, 1, 1), (1, 2, 4, 8), 2, True)
SMALLER = {"embed_dim": 32, "depths": (1, 2, 1, 1), "layer_scale": 1e-5, "mlp_ratio": 2.0}


def load(weights, name="rat_nat_tiny", **kwargs):
    overlay = {"state_dict": weights}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def narrow(weights=None, **kwargs):
    return load(weights or nat_reference.random_weights(*NARROW), **SMALLER | kwargs)


def of_transformers(weights):
    """The names of ``shi-labs/nat-*``, read off that library's modules."""
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "patch_embed":
            rest = ["norm"] if parts[1] == "norm" else ["patch_embeddings", "projection", parts[2]]
            parts = ["nat", "embeddings", *rest, parts[-1]]
        elif parts[0] == "levels" and parts[2] == "blocks":
            base, inner = ["nat", "encoder", "levels", parts[1], "layers", parts[3]], ".".join(parts[4:-1])
            if inner == "attn.qkv":
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[".".join([*base, "attention", "self", part, parts[-1]])] = third
                continue
            if parts[4] == "gamma1":
                both = torch.stack([value, weights[name.replace("gamma1", "gamma2")]])
                renamed[".".join([*base, "layer_scale_parameters"])] = both
            if parts[4].startswith("gamma"):
                continue
            where = {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "attn": "attention.self",
                "attn.proj": "attention.output.dense",
                "mlp.fc1": "intermediate.dense",
                "mlp.fc2": "output.dense",
            }[inner]
            parts = [*base, where, parts[-1]]
        elif parts[0] == "levels":
            parts = ["nat", "encoder", *parts]
        else:
            parts = {"norm": ["nat", "layernorm"], "head": ["classifier"]}[parts[0]] + parts[1:]
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize(("arch", "millions"), [("mini", 20), ("tiny", 28), ("small", 51), ("base", 90)])
def test_every_size_has_nats_parameters_and_its_own(arch, millions):
    shapes = nat_reference.shapes(*ARCHITECTURES[arch])
    count = sum(np.prod(shape) for shape in shapes.values())
    assert round(count / 1e6) == millions
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in shapes.items()}
        model = timm.create_model(f"rat_nat_{arch}")
    filtered = checkpoint_filter_fn(weights, model)
    assert {n: t.shape for n, t in filtered.items()} == {n: t.shape for n, t in model.state_dict().items()}
    own = [n for n in filtered if ".rose." in n or (".sga." in n and ".norm1." not in n and "strider.weight" not in n)]
    assert sum(p.numel() for n, p in model.named_parameters() if n not in own) == count
    assert sum(p.numel() for n, p in model.named_parameters() if n in own) < 0.05 * count


@pytest.mark.parametrize(
    ("arch", "sizes"),
    [
        ("tiny", [(224, 224), (160, 96)]),  # at 160 x 96 the last two grids are smaller than a window
        ("small", [(70, 64)]),
    ],
)
@torch.no_grad()
def test_the_network_is_nat(arch, sizes):
    weights, heads = nat_reference.random_weights(*ARCHITECTURES[arch]), ARCHITECTURES[arch][2]
    model = load(weights, f"rat_nat_{arch}")
    for size in sizes:
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        logits, maps = nat_reference.nat(weights, x, heads)
        assert logits.std() > 1
        last, found = model.forward_intermediates(x.float())
        torch.testing.assert_close(model.forward_head(last).double(), logits, rtol=0, atol=1e-5)
        for ours, theirs in zip(found, maps, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5 * theirs.std())


@torch.no_grad()
@pytest.mark.parametrize(("size", "batch"), [((33, 230), 1), ((8, 8), 3)])
def test_a_narrow_nat_of_any_size(size, batch):
    weights = nat_reference.random_weights(*NARROW)
    x = torch.randn(batch, 3, *size, dtype=torch.float64)
    logits, maps = nat_reference.nat(weights, x, NARROW[2])
    for network in (narrow(weights, dtype=torch.float64), narrow(of_transformers(weights), dtype=torch.float64)):
        torch.testing.assert_close(network(x), logits, rtol=0, atol=1e-10)
        for ours, theirs in zip(network.forward_intermediates(x, intermediates_only=True), maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_narrow_groupings_start_closed_too():
    weights, x = nat_reference.random_weights(*NARROW), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(narrow(weights, group_attn_width="fine")(x), narrow(weights)(x), rtol=0, atol=1e-5)


def test_geometry_starts_at_zero_and_is_learned():
    model = narrow().train()
    freqs = {n: p for n, p in model.named_parameters() if n.endswith("attn.rose.freqs")}
    gates = {n: p for n, p in model.named_parameters() if n.endswith(("sga.norm2.weight", "sga.norm3.weight"))}
    assert (len(freqs), len(gates)) == (5, 6)
    assert all(p.abs().max() == 0 for p in [*freqs.values(), *gates.values()])
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    torch.nn.functional.cross_entropy(before, torch.tensor([3, 7])).backward()
    assert all(p.grad.abs().amin(tuple(range(1, p.ndim))).min() > 0 for p in freqs.values())
    assert all(p.grad.abs().max() > 0 for p in gates.values())
    # what stands behind a gate that is shut learns once it is open
    shut = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert all(".sga." in n and not n.endswith(("norm2.weight", "norm3.weight")) for n in shut)
    torch.optim.SGD(model.parameters(), 0.03).step()
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(x), torch.tensor([3, 7])).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    flat = narrow(physical_stem=False).eval()
    torch.testing.assert_close(flat(x, spacing=2.0), flat(x), rtol=0, atol=1e-6)
    flat.load_state_dict(model.state_dict())
    assert not torch.allclose(flat(x, spacing=2.0), flat(x), rtol=0, atol=1e-4)


def test_biases_are_not_decayed():
    model = timm.create_model("rat_nat_mini", device="meta")
    assert sum(name.endswith("attn.rpb") for name in model.no_weight_decay()) == 18


@pytest.mark.parametrize("form", ["pth", "safetensors", "bin"])
def test_a_converted_folder_is_the_network(form, tmp_path):
    """As the authors publish weights, and as transformers saves them."""
    name = "rat_nat_mini"
    weights = {n: t.float() for n, t in nat_reference.random_weights(*ARCHITECTURES["mini"]).items()}
    if form == "pth":
        torch.save(weights, source := tmp_path / "nat_mini.pth")
    else:
        (source := tmp_path / "nat-mini-in1k-224").mkdir()
        renamed = {n: t.contiguous() for n, t in of_transformers(weights).items()}
        if form == "bin":
            torch.save(renamed, source / "pytorch_model.bin")
        else:
            safetensors.torch.save_file(renamed, source / "model.safetensors")
    random = torch.random.get_rng_state()
    folder = convert(source, name, tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), random)
    model, again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), load(weights, name)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), again(x), rtol=0, atol=1e-6)
    assert model.pretrained_cfg["license"] == "mit"
    assert model.pretrained_cfg["crop_pct"] == 0.875
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "Copyright (c) 2022-2023 SHI Lab" in card
    assert "shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth" in card
    if form == "pth":
        twice = convert(source, name, tmp_path / "twice")
        once, again = (safetensors.torch.load_file(out / "model.safetensors") for out in (folder, twice))
        assert all(torch.equal(value, again[key]) for key, value in once.items())


def test_the_command_converts(tmp_path, monkeypatch, capsys):
    weights = {n: t.float() for n, t in nat_reference.random_weights(*ARCHITECTURES["mini"]).items()}
    torch.save(weights, tmp_path / "nat_mini.pth")
    monkeypatch.chdir(tmp_path)
    arguments = ["convert", "nat_mini.pth", "--output", "out", "--like", "rat_nat_mini"]
    monkeypatch.setattr(sys, "argv", ["rat_timm", *arguments])
    main()
    assert capsys.readouterr().out.strip() == "local-dir:out"
    assert (tmp_path / "out" / "model.safetensors").is_file()


class Trap:
    def __reduce__(self):
        return print, ("opened",)


@pytest.mark.parametrize(
    ("content", "like", "message"),
    [
        ({}, "rat_tiny", r"like must be one of \['rat_nat_mini', .*got 'rat_tiny'"),
        ({"x": Trap()}, "rat_nat_mini", "must be a pickle of tensors alone"),
        ([], "rat_nat_mini", "must hold a dict of tensors, got list"),
    ],
)
def test_what_cannot_be_converted_is_named(content, like, message, tmp_path, capsys):
    file = tmp_path / "nat.pth"
    with file.open("wb") as stream:
        pickle.dump(content, stream) if isinstance(content, dict) and "x" in content else torch.save(content, stream)
    with pytest.raises(ValueError, match=message):
        convert(file, like, tmp_path / "out")
    assert "opened" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        convert(tmp_path, "rat_nat_mini", tmp_path / "out")


@pytest.mark.parametrize("source", [lambda weights: weights, of_transformers])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm0.weight": torch.ones(32)}, r"has \[.*norm0.weight.*\] left over"),
        ({"levels.3.blocks.0.attn.rpb": None}, r"lacks \['stages.3.blocks.0.attn.rpb'\]"),
        ({"levels.1.downsample.norm.bias": None}, r"lacks \['stages.2.downsample.sga.norm1.bias'\]"),
    ],
)
def test_nothing_is_missing_and_nothing_left_over(change, message, source):
    weights = source(nat_reference.random_weights(*NARROW))
    for name, value in change.items():
        if value is not None:
            weights[name] = value
        else:
            del weights[name if name in weights else next(iter(of_transformers({name: 0})))]
    with pytest.raises(ValueError, match=message):
        narrow(weights)


def test_a_lost_third_of_an_attention_is_named():
    weights = of_transformers(nat_reference.random_weights(*NARROW))
    del weights["nat.encoder.levels.1.layers.1.attention.self.key.weight"]
    with pytest.raises(ValueError, match=r"lacks .*levels\.1\.blocks\.1\.attn\.key\.weight"):
        narrow(weights)


@pytest.mark.parametrize("name", ["rat_nat_tiny", "rat_nat_base_3d"])
def test_weights_that_are_not_converted_say_how(name):
    with pytest.raises(RuntimeError, match=f"nat_.*pth.*python -m rat_timm convert FILE --like {name} --output"):
        timm.create_model(name, pretrained=True)


def test_all_sizes_can_be_converted():
    names = [f"rat_nat_{arch}{end}" for arch, end in itertools.product(ARCHITECTURES, ("", "_3d"))]
    assert sorted(convertible()) == sorted(names)
    for name in names:
        assert timm.get_pretrained_cfg(name).origin_url.endswith(f"/nat_{name.split('_')[2]}.pth")


@torch.no_grad()
def test_a_volume_constant_along_z_gives_what_the_image_gave():
    model = narrow(depths=(1,), weights=(w := nat_reference.random_weights(32, (1,), (1,), 2, True)))
    other = narrow(depths=(1,), weights=w, spatial_dims=3, pad_windows=False, stem_stride=(1, 4, 4))
    x = torch.randn(1, 3, 36, 40)
    (expected,) = model.forward_intermediates(x, intermediates_only=True)
    (found,) = other.forward_intermediates(x.unsqueeze(2).expand(-1, -1, 14, -1, -1), intermediates_only=True)
    inside = found[:, :, 5:9]  # beyond the reach of the border
    torch.testing.assert_close(inside, expected.unsqueeze(2).expand_as(inside), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_volume_of_one_channel_takes_the_weights():
    weights = nat_reference.random_weights(*NARROW)
    model = load(weights, "rat_nat_tiny_3d", **SMALLER)
    kept = weights["levels.0.blocks.0.attn.rpb"][:, 2:-2, 2:-2].float()
    assert model.stages[0].blocks[0].attn.rpb.shape == (1, 9, 9, 9)  # windows of 5
    assert torch.equal(model.stages[0].blocks[0].attn.rpb, kept[:, None].expand(-1, 9, -1, -1))
    stem = weights["patch_embed.proj.0.weight"].float()
    torch.testing.assert_close(model.stem.convs[0].weight.sum(2), stem.sum(1, keepdim=True))
    assert torch.isfinite(model(torch.randn(1, 1, 16, 40, 40))).all()


def test_a_wider_neighbourhood_repeats_the_outermost_biases():
    small, large = (RatConfig(attn_kernel_size=k, relative_bias=True, depths=(1,)) for k in (3, 5))
    state, wanted = (timm.create_model("test_rat", **vars(cfg)) for cfg in (small, large))
    bias = fit(state.state_dict(), wanted)["stages.0.blocks.0.attn.rpb"]
    expected = torch.nn.functional.pad(state.stages[0].blocks[0].attn.rpb[None], (2, 2, 2, 2), mode="replicate")[0]
    assert torch.equal(bias, expected)


@torch.no_grad()
def test_denser_maps_interpolate_biases():
    weights = nat_reference.random_weights(*NARROW)
    dense = narrow(weights, output_stride=16).stages[3].blocks[0].attn
    assert dense.attn_kernel_size == (13, 13)
    bias, own = dense._bias(), weights["levels.3.blocks.0.attn.rpb"].float()
    torch.testing.assert_close(bias[:, ::2, ::2], own)
    torch.testing.assert_close(bias[:, 1::2, ::2], (own[:, 1:] + own[:, :-1]) / 2)


@pytest.mark.parametrize("size", [(16, 20), (60, 48)])
@torch.no_grad()
def test_masked_pixels_influence_nothing(size):
    model = lively(narrow())
    x, mask = torch.randn(2, 3, *size), torch.ones(2, *size, dtype=torch.bool)
    mask[:, :, 3 * size[1] // 4 :] = False
    mask[1, size[0] // 2 :] = False
    expected = model(torch.where(mask[:, None], x, 7.0), mask=mask)
    x = torch.where(mask[:, None], x, float("nan"))
    torch.testing.assert_close(model(x, mask=mask), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, model(torch.nan_to_num(x)), atol=1e-2)


@pytest.mark.slow
def test_compiled_networks_agree():
    model = lively(narrow(nat_reference.random_weights(32, (1,), (1,), 2, True), depths=(1,)))
    x = torch.randn(2, 3, 20, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-4)
    levels = [x, x[..., ::2, ::2]]
    torch.testing.assert_close(compiled(levels), model(levels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"reg_tokens": 2}])
def test_levels_and_prefix_tokens_take_part(kwargs):
    model = timm.create_model("rat_nat_tiny", **SMALLER, **kwargs)
    x = torch.randn(2, 3, 64, 64)
    out = model([x, x[..., ::2, ::2]], spacing=[(0.5, 0.5), (1.0, 1.0)])
    out.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("rpb"))


@torch.no_grad()
def test_the_reference_spacing_is_nats():
    model, x = narrow(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x, spacing=1.0), model(x), rtol=0, atol=1e-5)
