"""Plain RAT: timm's models number for number without geometry, and physical with it."""

import copy
import importlib
import json

import pytest
import timm
import torch
from test_hub import client, files_of, put
from test_patches import enlarge
from timm.models._features_fx import create_feature_extractor

from helpers import lively, slow
from hub_server import serving
from rat_timm import hub
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.models.rope_vit import checkpoint_filter_fn, variants
from rotary_architectures import TABLE, architectures, as_text, meta_model

FAMILIES = (
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
)
families = pytest.mark.parametrize("name", FAMILIES)


def pair(name, **kwargs):
    """timm's model and ours, with one set of weights."""
    theirs = lively(timm.create_model(name, num_classes=7, **kwargs).eval())
    ours = timm.create_model(f"rat_{name}", num_classes=7, **kwargs).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)


def test_the_table_is_timms():
    stored, found = json.loads(TABLE.read_text()), architectures()
    changed = sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))
    assert not changed, (
        f"timm {timm.__version__} differs from {TABLE.name} in {changed}. A later release: run "
        "tests/rotary_architectures.py, read the difference, and commit it. An earlier one: install the latest."
    )
    assert TABLE.read_text() == as_text(found)


def test_every_architecture_of_the_table_is_registered():
    ours = {name.removeprefix("rat_") for name in timm.list_models("rat_*", module="rope_vit")}
    assert ours == set(json.loads(TABLE.read_text()))
    assert len(ours) > 50


def test_an_architecture_that_timm_lacks_is_not_registered(monkeypatch):
    lacking, is_model = "vit_small_patch16_dinov3", timm.is_model
    monkeypatch.setattr(timm, "is_model", lambda name: name != lacking and is_model(name))
    registered = set(importlib.reload(variants).VARIANTS)
    monkeypatch.undo()
    assert set(importlib.reload(variants).VARIANTS) - registered == {f"rat_{lacking}"}


def test_entries_are_timms():
    for name in timm.list_models("rat_*", module="rope_vit", pretrained=True):
        ours, theirs = (timm.models.get_pretrained_cfg(n).to_dict() for n in (name, name.removeprefix("rat_")))
        assert ours.pop("architecture") == f"rat_{theirs.pop('architecture')}"
        assert ours == theirs
        assert ours["hf_hub_id"] == f"timm/{name.removeprefix('rat_')}" or "/" in ours["hf_hub_id"][5:]
        assert (
            timm.models.get_pretrained_cfg(name.split(".")[0]).tag
            == timm.models.get_pretrained_cfg(name.split(".")[0].removeprefix("rat_")).tag
        )


@pytest.mark.parametrize("name", timm.list_models("rat_*", module="rope_vit"))
def test_names_build_with_timms_state_dict(name):
    ours, theirs = (meta_model(n) for n in (name, name.removeprefix("rat_")))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.pretrained_cfg["num_classes"] == theirs.pretrained_cfg["num_classes"]
    with pytest.raises(TypeError):
        timm.create_model(name, device="meta", not_a_model_arg=1)


@families
def test_volumes_have_maps(name):
    backbone = timm.create_model(f"rat_{name}", features_only=True, device="meta", spatial_dims=3, patch_depth=2)
    size = backbone.pretrained_cfg["input_size"]
    maps = backbone(torch.empty(1, 3, 4, *size[1:], device="meta"), spacing=(2.0, 1.0, 1.0))
    assert [m.shape[:3] for m in maps] == [(1, channels, 2) for channels in backbone.feature_info.channels()]


@families
@torch.no_grad()
def test_without_geometry_it_is_timms_model(name):
    theirs, ours = pair(name, depth=3)
    flexible = timm.create_model(name, num_classes=7, depth=3, dynamic_img_size=True).eval()
    flexible.load_state_dict(theirs.state_dict())
    size, patch = theirs.patch_embed.img_size, theirs.patch_embed.patch_size[0]
    full = torch.ones(2, *size, dtype=torch.bool)
    same = [
        (theirs, size, [{}, {"spacing": 1.0}, {"mask": full}, {"mask": full, "spacing": 1.0}, {"origin": 3.0}]),
        (flexible, (9 * patch, 12 * patch), [{}, {"mask": torch.ones(2, 9 * patch, 12 * patch)}]),
    ]
    for reference, shape, ways in same:
        x = torch.randn(2, 3, *shape)
        final, maps = reference.forward_intermediates(x)
        for given in ways:
            assert_close(ours(x, **given), reference(x))
            assert_close(ours.forward_features(x, **given), final)
            found, intermediates = ours.forward_intermediates(x, **given)
            assert_close(found, final)
            assert len(maps) == len(intermediates)
            for a, b in zip(intermediates, maps, strict=True):
                assert_close(a, b)
        assert_close(ours([x]), reference(x))


@families
@torch.no_grad()
def test_spacing_decides_positions(name):
    _, ours = pair(name, depth=3)
    x = torch.randn(1, 3, *ours.patch_embed.img_size)
    coarse = ours(x, spacing=2.0)
    assert (coarse - ours(x)).abs().max() > 1e-3
    assert (ours(x, spacing=(2.0, 1.0)) - coarse).abs().max() > 1e-4
    other = timm.create_model(f"rat_{name}", num_classes=7, depth=3, spacing=2.0).eval()
    other.load_state_dict(ours.state_dict())
    assert_close(other(x, spacing=2.0), ours(x))
    # a part of the image at its own place, and the same pixels said to be the whole
    assert (ours(x[..., :112, :112], spacing=1.0) - ours(x[..., :112, :112])).abs().max() > 1e-4


@families
@pytest.mark.parametrize("factors", [(1.5, 1.5), (2, 2), (3, 3), (2, 1)])
@torch.no_grad()
def test_physical_patches_see_the_same_scene_at_any_sampling(name, factors):
    _, ours = pair(name, depth=3, img_size=5 * (14 if "14" in name else 16))
    physical = timm.create_model(
        f"rat_{name}", num_classes=7, depth=3, img_size=ours.patch_embed.img_size, physical_patches=True
    ).eval()
    physical.load_state_dict(ours.state_dict())
    patch = ours.patch_embed.patch_size
    x = torch.randn(1, 3, 4 * patch[0], 5 * patch[1])
    tokens = Tokens(x.movedim(1, -1), Grid.create(x.shape[2:]))
    large = enlarge(tokens, patch, factors).movedim(-1, 1)
    spacing = tuple(1 / f for f in factors)
    expected = ours.forward_features(x, spacing=1.0)
    assert_close(physical.forward_features(x, spacing=1.0), expected)

    def error(found):
        return ((found - expected).norm() / expected.norm()).item() if found.shape == expected.shape else 1.0

    assert error(physical.forward_features(large, spacing=spacing)) < 1e-3
    assert error(ours.forward_features(large, spacing=spacing)) > 1e-2
    assert error(physical.forward_features(large, spacing=1.0)) > 1e-2


@families
@torch.no_grad()
def test_a_volume_one_patch_deep_and_constant_is_the_image(name):
    theirs = pair(name, depth=2)[0]
    kwargs = {"num_classes": 7, "depth": 2, "spatial_dims": 3, "patch_depth": 6, "spacing": (3.0, 1.0, 1.0)}
    deep = timm.create_model(f"rat_{name}", **kwargs).eval()
    deep.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), deep))
    x = torch.randn(2, 3, *theirs.patch_embed.img_size)
    volume = x.unsqueeze(2).expand(-1, -1, 6, -1, -1)
    for given in ({}, {"spacing": (3.0, 1.0, 1.0)}, {"spacing": (17.0, 1.0, 1.0)}):
        assert_close(deep(volume, **given), theirs(x))
    two = deep(volume.repeat(1, 1, 2, 1, 1), spacing=(3.0, 1.0, 1.0))
    assert (two - deep(volume.repeat(1, 1, 2, 1, 1), spacing=(9.0, 1.0, 1.0))).abs().max() > 1e-4
    assert torch.equal(
        checkpoint_filter_fn(deep.state_dict(), deep)["patch_embed.proj.weight"], deep.patch_embed.proj.weight
    )


@torch.no_grad()
def test_volumes_of_one_channel_take_weights_of_three():
    theirs, _ = pair("vit_small_patch16_dinov3", depth=2)
    deep = timm.create_model(
        "rat_vit_small_patch16_dinov3", num_classes=7, depth=2, spatial_dims=3, patch_depth=4, in_chans=1
    ).eval()
    deep.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), deep))
    gray = torch.randn(1, 1, 256, 256)
    assert_close(deep(gray.unsqueeze(2).expand(-1, -1, 4, -1, -1)), theirs(gray.expand(-1, 3, -1, -1)), atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224"])
@torch.no_grad()
def test_pooling_passes_over_invalid_patches(name):
    for pool in ("avg", "max", "avgmax", *(["map"] if "core" in name else [])):
        _, ours = pair(name, depth=2, img_size=64 if "16" in name else 56, global_pool=pool)
        patch = ours.patch_embed.patch_size[0]
        x, mask = torch.randn(2, 3, 3 * patch, 4 * patch), torch.zeros(2, 3 * patch, 4 * patch, dtype=torch.bool)
        mask[0, :patch, : 2 * patch] = True
        tokens = ours.forward_features(x, mask=mask)
        patches = torch.zeros(2, 3, 4, dtype=torch.bool)
        patches[0, 0, :2] = True
        assert (tokens[:, ours.num_prefix_tokens :].abs().sum(-1) > 0).equal(patches.flatten(1))
        logits = ours(x, mask=mask)
        assert torch.isfinite(logits).all()
        assert_close(ours.forward_head(tokens, mask=patches), logits)
        kept = torch.cat([tokens[:1, : ours.num_prefix_tokens + 2]], dim=1)
        assert_close(ours.forward_head(kept), logits[:1])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_pe_core_tiny_patch16_384"])
@torch.no_grad()
def test_learned_embeddings_are_physical(name):
    """At the reference spacing a part of an image has the embeddings of its place."""
    ours = pair(name, depth=1)[1]
    ours.rope.bands.zero_()
    size, patch = ours.patch_embed.img_size, ours.patch_embed.patch_size[0]
    x = torch.randn(1, 3, *size)
    assert_close(ours(x, spacing=1.0), ours(x))
    assert (ours(x, spacing=2.0) - ours(x)).abs().max() > 1e-3
    learned = ours.pos_embed[0, ours.num_prefix_tokens :].unflatten(0, ours.patch_embed.grid_size)
    part = (4 * patch, 6 * patch)
    whole_origin, part_origin = (0.5, 0.5), (2 * patch + 0.5, 3 * patch + 0.5)
    seen = []
    original = ours._position_embedding
    ours._position_embedding = lambda *args: seen.append(original(*args)) or seen[-1]
    ours([x, torch.randn(1, 3, *part)], spacing=[(1.0, 1.0)] * 2, origin=[whole_origin, part_origin])
    assert_close(seen[0][0], learned.flatten(0, 1))
    assert_close(seen[1][0].unflatten(0, (4, 6)), learned[2:6, 3:9])


@torch.no_grad()
def test_levels_without_spacing_have_one_system_of_positions():
    ours = pair("vit_pe_core_tiny_patch16_384", depth=1, img_size=64)[1]
    seen, original = [], ours._position_embedding
    ours._position_embedding = lambda *args: seen.append(original(*args)) or seen[-1]
    ours([torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 32)])
    fine, coarse = (part[0].unflatten(0, (n, n)) for part, n in zip(seen, (4, 2), strict=True))
    between = (fine[0, 0] + fine[0, 1] + fine[1, 0] + fine[1, 1]) / 4
    assert (coarse[0, 0] - between).norm() < 0.7 * between.norm()


@torch.no_grad()
def test_pooling_by_attention_keeps_its_mask_where_attention_is_not_fused():
    name = "vit_pe_core_tiny_patch16_384"
    ours = pair(name, depth=2, img_size=64)[1]
    plain = timm.create_model(f"rat_{name}", num_classes=7, depth=2, img_size=64, exportable=True).eval()
    plain.load_state_dict(ours.state_dict())
    x, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :32, :32] = True
    assert_close(plain(x, mask=mask), ours(x, mask=mask))


@torch.no_grad()
def test_patches_that_do_not_divide_the_image():
    ours = timm.create_model("rat_vit_small_patch16_rope_224", patch_size=15, depth=2, num_classes=3).eval()
    x = torch.randn(1, 3, 224, 224)
    assert_close(lively(ours)(x, spacing=1.0), ours(x))


def test_the_reference_is_the_image_size_of_what_is_not_pretrained():
    model = timm.create_model("rat_eva02_tiny_patch14_224", depth=1, img_size=448)
    assert model.reference_size == (448, 448)


def test_feature_info_follows_the_patch():
    model = timm.create_model("rat_vit_small_patch16_dinov3", depth=1)
    model.set_input_size(patch_size=8)
    assert model.feature_info[0]["reduction"] == 8
    assert model.feature_info[0]["stride"] == (8, 8)


def test_masks_of_the_head_are_checked():
    model = timm.create_model("rat_vit_small_patch16_dinov3", depth=1, global_pool="", num_classes=4).eval()
    levels = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)]
    with torch.no_grad():
        tokens = model.forward_features(levels)
        for a, b in zip(model.forward_head(tokens), model(levels), strict=True):
            assert_close(a, b)
    for mask in ([torch.ones(1, 16, dtype=torch.bool), None], [torch.ones(2, 16), None]):
        with pytest.raises(ValueError, match="mask of level 0 must be bool"):
            model.forward_head(tokens, mask=mask)
    with pytest.raises(ValueError, match="one entry per level"):
        model.forward_head(tokens, mask=torch.ones(2, 16, dtype=torch.bool))


@pytest.mark.slow
@torch.no_grad()
def test_physical_patches_compile_and_export_with_numbers():
    torch._dynamo.reset()
    model = lively(
        timm.create_model("rat_vit_small_patch16_rope_224", depth=2, num_classes=3, physical_patches=True).eval()
    )
    x = torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for spacing in (0.7, (0.5, 1.3)):
        assert_close(compiled(x, spacing=spacing), model(x, spacing=spacing))
        program = torch.export.export(model, (x,), {"spacing": spacing})
        assert_close(program.module()(x, spacing=spacing), model(x, spacing=spacing))
    levels, given = [x, x[..., :32, :32]], {"spacing": 0.7}
    assert_close(compiled(levels, **given), model(levels, **given))
    with pytest.raises(Exception, match="spacing must be numbers"):
        torch.export.export(model, (x,), {"spacing": torch.tensor([[0.7, 0.7]])})


def test_levels_share_prefix_tokens():
    _, ours = pair("vit_small_patch16_dinov3", depth=2)
    levels = [torch.randn(2, 3, 64, 48), torch.randn(2, 3, 32, 32)]
    given = {"spacing": [(1.0, 1.0), (2.0, 1.5)]}
    with torch.no_grad():
        first, second = ours.forward_features(levels, **given)
        assert first.shape == (2, 5 + 12, 384)
        assert second.shape == (2, 5 + 4, 384)
        assert torch.equal(first[:, :5], second[:, :5])
        assert_close(ours.forward_head([first, second]), ours(levels, **given))
        out = ours.forward_intermediates(levels, indices=2, output_dict=True, return_prefix_tokens=True, **given)
    (maps, prefix) = out["image_intermediates"][-1]
    assert [m.shape for m in maps] == [(2, 384, 4, 3), (2, 384, 2, 2)]
    assert prefix.shape == (2, 5, 384)
    assert [g.shape for g in out["grids"][-1]] == [(4, 3), (2, 2)]
    maps = ours.forward_intermediates(levels, output_fmt="NLC", intermediates_only=True, **given)
    assert maps[0][0].shape == (2, 12, 384)


@pytest.mark.parametrize(
    ("name", "axes"),
    [(FAMILIES[0], 2), *(slow(name, 2) for name in FAMILIES[1:]), slow(FAMILIES[0], 3), slow(FAMILIES[1], 3)],
)
def test_checkpointing_and_compiling_change_nothing(name, axes):
    torch._dynamo.reset()
    kwargs = {"depth": 2 if name == FAMILIES[0] else 1, "img_size": 64 if "16" in name else 56, "num_classes": 3}
    if axes == 3:
        kwargs |= {"spatial_dims": 3, "patch_depth": 4}
    model = lively(timm.create_model(f"rat_{name}", **kwargs).double().train())
    x = torch.randn(2, 3, *(6, 40, 70)[-axes:], dtype=torch.float64)
    given = {"spacing": torch.rand(2, axes) + 0.5, "mask": torch.rand(2, *x.shape[2:]) > 0.5}

    def grads(run):
        model.zero_grad()
        run(x, **given).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = grads(model)
    assert len(expected) == len(list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model_checkpointing = copy.deepcopy(model)
    for other in (grads(compiled),):
        for a, b in zip(other, expected, strict=True):
            torch.testing.assert_close(a, b)
    model_checkpointing.set_grad_checkpointing()
    model_checkpointing(x, **given).square().sum().backward()
    found = [p.grad for p in model_checkpointing.parameters() if p.grad is not None]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@families
def test_export(name):
    model = lively(timm.create_model(f"rat_{name}", depth=2, img_size=64 if "16" in name else 56, num_classes=3).eval())
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    for given in ({}, {"spacing": torch.tensor([[0.5, 0.7]]), "mask": torch.rand(1, *x.shape[2:]) > 0.5}):
        program = torch.export.export(model, (x,), given)
        torch.testing.assert_close(program.module()(x, **given), model(x, **given))


def test_symbolic_traces_know_no_geometry():
    with pytest.raises(ValueError, match=r"use torch\.export"):
        create_feature_extractor(timm.create_model("rat_eva02_tiny_patch14_224", depth=1).eval(), ["head"])
    model = timm.create_model("rat_vit_small_patch16_rope_224", depth=1, num_classes=3).eval()
    traced = create_feature_extractor(model, ["head"])
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(traced(x)["head"], model(x))
    with pytest.raises(ValueError, match="symbolically traced"):
        traced(x, spacing=2.0)


@families
@torch.no_grad()
def test_bfloat16(name):
    model = lively(timm.create_model(f"rat_{name}", depth=2, img_size=64 if "16" in name else 56, num_classes=3).eval())
    x, given = torch.randn(2, 3, 40, 50), {"spacing": 0.7, "mask": torch.rand(2, 40, 50) > 0.3}
    expected = model(x, **given)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, **given) - expected).norm() / expected.norm() < 0.1
    assert (model.bfloat16()(x.bfloat16(), **given).float() - expected).norm() / expected.norm() < 0.1


def test_features_only_takes_everything():
    backbone = timm.create_model("rat_vit_small_patch16_dinov3", depth=4, features_only=True, out_indices=(1, 3)).eval()
    assert backbone.feature_info.reduction() == [16, 16]
    assert backbone.feature_info.get("spacing") == [(16.0, 16.0)] * 2
    given = {"spacing": 0.5, "mask": torch.rand(1, 50, 64) > 0.4, "origin": (1.0, 2.0)}
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 50, 64), **given)
    assert [m.shape for m in maps] == [(1, 384, 4, 4)] * 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be 2 or 3"),
        ({"spacing": (1.0, 2.0, 3.0)}, "spacing must be"),
        ({"patch_depth": 4}, "patch_depth is for spatial_dims=3"),
        ({"spatial_dims": 3, "patch_depth": 0}, "patch_depth must be"),
        ({"rope_type": "mrope"}, "rope_type must be"),
        ({"use_rot_pos_emb": False}, "rope_type must be"),
    ],
)
def test_bad_constructions_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("rat_vit_small_patch16_dinov3", device="meta", **kwargs)


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (torch.zeros(1, 3, 32), {"spacing": 1.0}, "x must be"),
        (torch.zeros(1, 4, 32, 32), {"spacing": 1.0}, "3 channels"),
        (torch.zeros(1, 3, 32, 32), {"spacing": -1.0}, "spacing must be"),
        (torch.zeros(1, 3, 32, 32), {"mask": torch.ones(1, 32, 31)}, "mask must be"),
        (torch.zeros(1, 3, 32, 32), {"spacing": 1.0, "is_causal": True}, "is_causal"),
        ([torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32)], {}, "level 1"),
    ],
)
def test_bad_inputs_are_named(x, given, message):
    model = timm.create_model("rat_vit_small_patch16_dinov3", depth=1)
    with pytest.raises(ValueError, match=message):
        model(x, **given)


def test_dropped_patches_have_no_place():
    model = timm.create_model("rat_vit_small_patch16_dinov3", depth=1, patch_drop_rate=0.5).train()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 384)
    with pytest.raises(ValueError, match="patch_drop_rate"):
        model(torch.zeros(1, 3, 64, 64), spacing=1.0)


def test_saved_models_come_back(tmp_path):
    kwargs = {
        "spatial_dims": 3,
        "patch_depth": 4,
        "spacing": (2.0, 1.0, 1.0),
        "depth": 2,
        "in_chans": 1,
        "num_classes": 4,
    }
    model = lively(timm.create_model("rat_vit_small_patch16_rope_mixed_224", **kwargs).eval())
    hub.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 1, 8, 40, 40)
    with torch.no_grad():
        assert torch.equal(loaded(x, spacing=(1.0, 0.5, 0.5)), model(x, spacing=(1.0, 0.5, 0.5)))


def test_checkpoints_are_unwrapped_and_whole():
    name = "rat_vit_small_patch16_dinov3"
    model, other = (lively(timm.create_model(name, depth=2, num_classes=3)) for _ in range(2))
    state = model.state_dict()

    def load(state, classes):
        overlay = {"state_dict": state, "num_classes": 3}
        return timm.create_model(
            name, depth=2, num_classes=classes, pretrained=True, pretrained_cfg_overlay=overlay
        ).state_dict()

    wrapped = {f"module.{key}": value for key, value in state.items()}
    for checkpoint in (state, wrapped, {"state_dict": other.state_dict(), "state_dict_ema": state}):
        for classes in (3, 5):
            loaded = load(checkpoint, classes)
            assert all(torch.equal(loaded[key], value) for key, value in state.items() if not key.startswith("head."))
    with pytest.raises(ValueError, match="it lacks"):
        load({key: value for key, value in state.items() if not key.startswith("blocks.1.")}, 5)


@torch.no_grad()
def test_saved_keywords_come_before_the_architectures(tmp_path):
    kwargs = {"depth": 2, "rope_temperature": 10.0, "reference_size": 64, "num_classes": 3}
    model = lively(timm.create_model("rat_vit_small_patch16_dinov3", **kwargs).eval())
    hub.save(model, tmp_path)
    overlay = {"file": str(tmp_path / "model.safetensors")}
    x = torch.randn(1, 3, 64, 48)
    for loaded in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(),
        timm.create_model("rat_vit_small_patch16_dinov3", pretrained=True, pretrained_cfg_overlay=overlay).eval(),
    ):
        assert loaded.reference_size == (64, 64)
        for given in ({}, {"spacing": 0.7}):
            assert torch.equal(loaded(x, **given), model(x, **given))


@torch.no_grad()
def test_saved_volumes_adapt_and_other_units_are_refused(tmp_path):
    kwargs = {"depth": 2, "num_classes": 4, "img_size": 56, "spacing": 0.5}
    model = lively(timm.create_model("rat_eva02_tiny_patch14_224", **kwargs).eval())
    hub.save(model, tmp_path / "flat")
    name = f"local-dir:{tmp_path / 'flat'}"
    with pytest.raises(ValueError, match=r"spacing \(1.0, 1.0\) is not that of the weights, 0.5"):
        timm.create_model(name, pretrained=True, spacing=1.0)
    deep = timm.create_model(name, pretrained=True, spatial_dims=3, patch_depth=4).eval()
    x = torch.randn(1, 3, 56, 70)
    volume = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)
    assert_close(deep(volume, spacing=0.7), model(x, spacing=0.7))
    hub.save(deep, tmp_path / "deep")
    larger = timm.create_model(f"local-dir:{tmp_path / 'deep'}", pretrained=True, img_size=112, patch_depth=8)
    assert larger.pos_embed.shape[1] == 65
    assert larger.patch_embed.proj.kernel_size == (8, 14, 14)


@pytest.mark.parametrize("axes", [2, 3])
def test_learned_embeddings_of_a_grid_that_is_no_square_load(axes):
    """As timm's filter does it, whose kernels are flat."""
    name, kwargs = "eva02_tiny_patch14_224", {"depth": 1, "num_classes": 3}
    theirs = lively(timm.create_model(name, img_size=(28, 56), **kwargs))
    target = {**kwargs, "img_size": (42, 70), "patch_size": 14}
    expected = timm.create_model(name, **target)
    ours = timm.create_model(f"rat_{name}", **target, **({"spatial_dims": 3, "patch_depth": 2} if axes == 3 else {}))
    for model in (expected, ours):
        model.pretrained_model_args = {"img_size": (28, 56)}
    weights = checkpoint_filter_fn(theirs.state_dict(), ours)
    torch.testing.assert_close(
        weights["pos_embed"], timm.models.eva.checkpoint_filter_fn(theirs.state_dict(), expected)["pos_embed"]
    )
    assert weights["patch_embed.proj.weight"].shape == ours.patch_embed.proj.weight.shape


@pytest.mark.parametrize("axes", [2, 3])
def test_patch_kernels_of_another_size_load(axes):
    """A kernel for smaller patches is the pseudo-inverse's, in the plane, and each of its layers has an equal share."""
    name, kwargs = "vit_small_patch16_rope_224", {"depth": 1, "num_classes": 3}
    theirs = lively(timm.create_model(name, **kwargs))
    expected = timm.models.eva.checkpoint_filter_fn(
        theirs.state_dict(), timm.create_model(name, patch_size=8, device="meta", **kwargs)
    )["patch_embed.proj.weight"]
    deep = {"spatial_dims": 3, "patch_depth": 2} if axes == 3 else {}
    ours = timm.create_model(f"rat_{name}", patch_size=8, **kwargs, **deep)
    kernel = checkpoint_filter_fn(theirs.state_dict(), ours)["patch_embed.proj.weight"]
    torch.testing.assert_close(kernel.flatten(2, -3).sum(2) if axes == 3 else kernel, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_volumes_are_no_weights_of_images():
    deep, flat = (timm.create_model("rat_vit_small_patch16_rope_224", depth=1, spatial_dims=n) for n in (3, 2))
    with pytest.raises(ValueError, match="spatial_dims must be 3"):
        checkpoint_filter_fn(deep.state_dict(), flat)


@pytest.mark.parametrize("axes", [2, 3])
@torch.no_grad()
def test_geometry_is_given_by_keyword(axes):
    deep = {"spatial_dims": 3, "patch_depth": 4} if axes == 3 else {}
    model = timm.create_model("rat_vit_small_patch16_rope_mixed_224", depth=1, **deep).eval()
    x = torch.zeros(1, 3, *(4, 32, 32)[-axes:])
    for call in (model, model.forward_features):
        for geometry in ((1.0,), ((1.0,) * axes,), ([1.0] * axes, None), (None, torch.ones(1, *x.shape[2:]))):
            with pytest.raises(TypeError, match="spacing, mask and origin are keywords"):
                call(x, *geometry)
        with pytest.raises(TypeError, match="positional arguments"):
            call(x, None, False, 1.0)
    with pytest.raises(TypeError, match="positional arguments"):
        model.forward_intermediates(x, None, False, False, False, "NCHW", False, None, False, 1.0)


@torch.no_grad()
def test_timms_arguments_stand_where_timm_has_them():
    theirs, ours = pair("vit_small_patch16_rope_mixed_224", depth=2)
    x, mask = torch.randn(1, 3, 224, 224), torch.rand(1, 1, 197, 197) > 0.3
    for args in ((mask,), (None, True)):
        assert_close(ours(x, *args), theirs(x, *args))
        assert_close(ours.forward_features(x, *args), theirs.forward_features(x, *args))
        options = (1, False, True, False, "NLC", False, *args)
        assert_close(ours.forward_intermediates(x, *options)[1][0], theirs.forward_intermediates(x, *options)[1][0])


LOAD = """
name = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
ours, theirs = (timm.create_model(n, pretrained=True).eval() for n in (f"rat_{name}", name))
assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
x = torch.randn(1, 3, 256, 256)
with torch.no_grad():
    assert torch.equal(ours(x), theirs(x))
    assert (ours(x, spacing=1.0) - theirs(x)).abs().max() < 1e-5
volumes = timm.create_model(f"rat_{name}", pretrained=True, spatial_dims=3, patch_depth=1, in_chans=1).eval()
with torch.no_grad():
    found = volumes(x[:, :1].unsqueeze(2))
    assert (found - theirs(x[:, :1].expand(-1, 3, -1, -1))).abs().max() < 1e-4
print(json.dumps(theirs.state_dict()["patch_embed.proj.weight"].sum().item()))
"""


def test_weights_come_from_timms_repositories(tmp_path):
    theirs = lively(timm.create_model("vit_tiny_patch16_dinov3_qkvb"))
    folder = tmp_path / "pushed"
    timm.models.save_for_hf(theirs, folder, safe_serialization=True)
    with serving() as server:
        put(server, "timm/vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", files_of(folder))
        found = client(server, tmp_path, LOAD)
    assert found == pytest.approx(theirs.state_dict()["patch_embed.proj.weight"].sum().item())


@pytest.mark.parametrize("spacing", [1e-4, 1e4])
@pytest.mark.parametrize("axes", [2, 3])
def test_physical_patches_in_a_wrong_unit_do_not_fill_the_memory(axes, spacing):
    model = timm.create_model(
        "rat_vit_small_patch16_rope_mixed_224", depth=1, physical_patches=True, spatial_dims=axes, in_chans=1
    ).eval()
    with pytest.raises(ValueError, match=r"spacing would make .* more than the limit of"):
        model(torch.randn(1, 1, *(32,) * axes), spacing=spacing)
