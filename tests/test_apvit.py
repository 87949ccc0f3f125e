"""Adaptive ViT: timm's model before training, and what it makes of places, masks and timm's contract."""

import math

import pytest
import timm
import torch
from timm.models._features_fx import create_feature_extractor

from helpers import lively
from rat_timm import hub
from rat_timm.geometry.grid import Grid, Tokens

NAMES = [f"apvit_{size}_patch16_224" for size in ("tiny", "small", "base")]
TINY = NAMES[0]
SMALL = {"depth": 2, "num_classes": 7, "img_size": 64}
KINDS = {
    "plain": {},
    "few": {"num_patches": 5, "scaling": "isotropic", "max_scale": 4.0, "rotate": True, "global_pool": "avg"},
    "rose": {"positions": "rose", "num_patches": 6, "scaling": "anisotropic", "global_pool": "avgmax"},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1, "global_pool": "map"},
    "rose max": {"positions": "rose", "qk_norm": True, "class_token": False, "global_pool": "max"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def create(kind="plain", moved=True, **kwargs):
    """A small model; its patches are moved to where its image sends them."""
    torch.manual_seed(0)
    model = lively(timm.create_model(TINY, **{**SMALL, **KINDS[kind], **kwargs}).eval())
    out = model.patching.predictor.out
    if moved:
        torch.nn.init.normal_(out.weight, std=0.3)
        torch.nn.init.normal_(out.bias, std=0.3)
    else:
        model.patching.predictor.init_weights()
    return model


def image(size=(64, 96), batch=2):
    return torch.randn(batch, 3, *size)


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (160, 288)])
@pytest.mark.parametrize("kind", [{}, {"scaling": "isotropic", "rotate": True}, {"scaling": "anisotropic"}])
def test_before_training_it_is_timms_model(size, kind):
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True).eval()
    ours = timm.create_model(TINY, **kind).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    assert not [k for k in ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys if "patching" not in k]
    x = image(size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), rtol=0, atol=1e-4)
    for a, b in zip(*(m.forward_intermediates(x, 3, output_fmt="NLC")[1] for m in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}])
def test_timms_weights_load_by_file(kwargs, tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=1000, img_size=64, **kwargs).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    overlay = {"file": str(tmp_path / "vit.pth"), "num_classes": 1000}
    ours = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, depth=2, img_size=64, **kwargs).eval()
    x = image((64, 64))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-4)
    larger = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, depth=2, in_chans=1, **kwargs).eval()
    assert larger.pos_embed.shape[1] == theirs.pos_embed.shape[1] + 14 * 14 - 4 * 4
    rotary = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, depth=2, positions="rose", **kwargs)
    assert rotary.pos_embed is None
    torch.testing.assert_close(rotary.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    with pytest.raises(ValueError, match="checkpoint does not fit"):
        timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, depth=3, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_names_have_timms_shapes_and_entries(name):
    ours, theirs = (timm.create_model(n, device="meta") for n in (name, name.removeprefix("ap")))
    shapes = {k: v.shape for k, v in ours.state_dict().items() if not k.startswith("patching.")}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    assert 0 < sum(p.numel() for p in ours.patching.parameters()) < 0.2e6
    entries = timm.list_models(f"{name}.*", pretrained=True)
    assert [e.removeprefix("ap") for e in entries] == timm.list_models(f"{name.removeprefix('ap')}.*", pretrained=True)
    for entry in entries:
        mine, other = (timm.models.get_pretrained_cfg(n).to_dict() for n in (entry, entry.removeprefix("ap")))
        assert mine.pop("architecture") == f"ap{other.pop('architecture')}"
        assert mine == other
    assert ours.group_matcher()["stem"].endswith("|^patching")
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_a_model_arg=1)


@kinds
@torch.no_grad()
def test_outputs_agree_with_each_other(kind):
    model, x = create(kind), image()
    mask = torch.rand(2, 64, 96) > 0.5
    mask[0, :, :70] = False
    for given in ({}, {"mask": mask}, {"mask": mask, "spacing": (0.5, 2.0), "origin": 3.0}):
        features = model.forward_features(x, **given)
        patches = model.patches(x, **given)
        count = patches.x.shape[1]
        assert features.shape == (2, model.num_prefix_tokens + count, 192)
        torch.testing.assert_close(model.forward_head(features, mask=patches.mask), model(x, **given))
        final, maps = model.forward_intermediates(x, **given)
        assert torch.equal(final, features)
        assert [m.shape for m in maps] == [(2, count, 192)] * 2
        out = model.forward_intermediates(x, [1], norm=True, return_prefix_tokens=True, output_dict=True, **given)
        assert torch.equal(torch.cat(out["image_intermediates"][0][::-1], dim=1), out["image_features"])
        assert torch.equal(out["patches"].center, patches.center)
        (early,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True, **given)
        assert torch.equal(early, maps[0])
        if patches.mask is not None:
            assert not features[:, model.num_prefix_tokens :][~patches.mask].any()
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@kinds
@torch.no_grad()
def test_what_is_masked_influences_nothing(kind):
    model, x = create(kind), image()
    mask = torch.rand(2, 64, 96) > 0.3
    mask[0, :, :48] = False
    dirty = torch.where(mask.unsqueeze(1), x, math.nan)
    clean = model(x, mask=mask)
    assert torch.isfinite(clean).all()
    assert torch.equal(model(dirty, mask=mask), clean)
    assert (model(x) - clean).abs().max() > 1e-3
    torch.testing.assert_close(model(x, mask=torch.ones_like(mask)), model(x), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(model(x, mask=torch.zeros_like(mask))).all()


@torch.no_grad()
def test_invalid_patches_are_as_if_not_there():
    """The left half holds no data: the regular patches of the right half alone give the same."""
    model = create(moved=False, class_token=False, global_pool="avg", pos_embed="none")
    x = image((64, 128))
    mask = torch.ones(2, 64, 128, dtype=torch.bool)
    mask[..., :64] = False
    torch.testing.assert_close(model(x, mask=mask), model(x[..., 64:]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rotary_positions_are_physical():
    model, x = create("rose"), image()
    expected = model(x, spacing=0.5)
    torch.testing.assert_close(model(x, spacing=0.5, origin=(70.0, -9.0)), expected, rtol=1e-4, atol=1e-4)
    assert (model(x, spacing=1.0) - expected).abs().max() > 1e-2
    other = create("rose", spacing=2.0)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x, spacing=1.0), expected)
    each = torch.tensor([[0.5, 0.5], [2.0, 1.0]])
    alone = [model(x[i : i + 1], spacing=each[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(model(x, spacing=each), torch.cat(alone), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_interpolated_positions_follow_the_patches():
    model, x = create("few"), image((64, 64))
    torch.nn.init.normal_(model.pos_embed)
    patches = model.patches(x)
    table = model.pos_embed[:, 1:].unflatten(1, (4, 4)).movedim(-1, 1)
    at = patches.center.flip(-1).unsqueeze(1)
    expected = torch.nn.functional.grid_sample(
        table.expand(2, -1, -1, -1), at, padding_mode="border", align_corners=False
    )[:, :, 0].mT
    tokens = model._embed(patches, Tokens(x.movedim(1, -1), Grid.create((64, 64))))
    model.pos_embed.zero_()
    bare = model._embed(patches, Tokens(x.movedim(1, -1), Grid.create((64, 64))))
    torch.testing.assert_close((tokens - bare)[:, 1:], expected, rtol=1e-4, atol=1e-5)


@kinds
def test_every_parameter_gets_a_gradient(kind):
    model = create(kind).train()
    model(image(), mask=torch.rand(2, 64, 96) > 0.2).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@kinds
def test_gradient_checkpointing_changes_nothing(kind):
    model, x = create(kind).train(), image()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@kinds
def test_saved_is_loaded(kind, tmp_path):
    model, x = create(kind), image()
    hub.save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x, spacing=0.7), model(x, spacing=0.7))
    assert again.model_args() == model.model_args()


@kinds
def test_traced_and_exported_it_is_the_same(kind):
    model, x = create(kind), image()
    with torch.no_grad():
        expected = model(x)
        graph = create_feature_extractor(model, ["head"])
        torch.testing.assert_close(graph(x)["head"], expected)
        with pytest.raises(ValueError, match="mask has no effect on a symbolically traced model"):
            graph(x, mask=torch.ones(2, 64, 96, dtype=torch.bool))
        program = torch.export.export(model, (x,), {"spacing": 1.0}).module()
        torch.testing.assert_close(program(x, spacing=1.0), expected, rtol=1e-4, atol=1e-5)


def test_input_size_and_patch_size_can_change():
    model = create("few", moved=False)
    model.set_input_size((96, 96), patch_size=8)
    assert model.patching.patch_size == (8, 8)
    assert model.patches(image()).x.shape == (2, 5, 3, 8, 8)
    assert model(image()).shape == (2, 7)


@pytest.mark.parametrize("positions", ["interpolated", "rose"])
def test_leaving_the_meta_device_patches_are_the_regular_grid(positions):
    model = timm.create_model(TINY, **SMALL, positions=positions, device="meta").to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(123.0)
    model.init_weights()
    assert max(p.abs().max() for p in model.parameters()) < 3
    x = image((64, 64))
    assert torch.equal(model.patches(x).center, create(moved=False).patches(x).center)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("tag", [entry.split(".")[1] for entry in timm.list_models(f"{TINY}.*", pretrained=True)])
def test_entries_load_what_timms_hub_holds(tag, tmp_path, monkeypatch):
    theirs = timm.create_model(f"vit_tiny_patch16_224.{tag}", pretrained=False)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)

    def stored(repo, name, cache):
        return tmp_path / name if (tmp_path / name).exists() else None

    monkeypatch.setattr(hub, "_download", stored)
    for kwargs in ({}, {"positions": "rose", "in_chans": 1, "num_classes": 3}):
        ours = timm.create_model(f"{TINY}.{tag}", pretrained=True, **kwargs)
        torch.testing.assert_close(ours.blocks[3].mlp.fc1.weight, theirs.blocks[3].mlp.fc1.weight)


def test_own_weights_load_into_what_differs(tmp_path):
    torch.save(create().state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": 7}
    for kwargs in ({"in_chans": 1}, {"in_chans": 5}, {"positions": "rose"}, {"num_classes": 2}, {"num_patches": 3}):
        model = timm.create_model(TINY, True, pretrained_cfg_overlay=overlay, **{**SMALL, **kwargs}).eval()
        assert torch.isfinite(model(torch.randn(1, model.in_chans, 64, 64))).all()


def test_exported_for_any_batch():
    model, x = create(), image()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), {"spacing": 1.0}, dynamic_shapes={"x": {0: batch}, "spacing": None})
    torch.testing.assert_close(program.module()(x[:1], spacing=1.0), model(x[:1]), rtol=1e-4, atol=1e-5)


def test_dinos_name_for_intermediates():
    model, x = create(), image()
    (found,) = model.get_intermediate_layers(x, norm=True, spacing=2.0)
    assert torch.equal(found, model.forward_features(x)[:, 1:])
    with pytest.raises(ValueError, match="output_fmt must be 'NLC'"):
        model.get_intermediate_layers(x, reshape=True)


def test_what_a_set_of_patches_cannot_do_is_said():
    model = create()
    with pytest.raises(ValueError, match="output_fmt must be 'NLC'"):
        model.forward_intermediates(image(), output_fmt="NCHW")
    with pytest.raises(ValueError, match="features_only gives maps"):
        timm.create_model(TINY, features_only=True)
    with pytest.raises(ValueError, match="x must be an image"):
        model([image(), image((32, 48))])
    with pytest.raises(ValueError, match="positions must be one of"):
        timm.create_model(TINY, positions="learned")
    with pytest.raises(ValueError, match="positions 'rose' has its own"):
        timm.create_model(TINY, positions="rose", block_fn=torch.nn.Identity)
    with pytest.raises(ValueError, match="positions 'rose' has its own"):
        timm.create_model(TINY, positions="rose", pos_embed="learn")
    with pytest.raises(ValueError, match="patch_drop_rate goes with regular patches"):
        timm.create_model(TINY, patch_drop_rate=0.1)


@torch.no_grad()
def test_a_far_origin_costs_no_precision():
    model, x = create("rose"), image()
    found = model(x, spacing=0.5, origin=(1e6, -3e7))
    assert torch.equal(found, model(x, spacing=0.5))
    near, far = (model.patches(x, spacing=0.5, origin=o).position for o in ((0.0, 0.0), (1e6, -3e7)))
    torch.testing.assert_close(far - far.new_tensor([1e6, -3e7]), near, rtol=0, atol=1e-6)
