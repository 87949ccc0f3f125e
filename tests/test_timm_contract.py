"""timm's contract over every registered name, on the meta device where size matters."""

import re

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters

import rat_timm
from rat_timm.timm_api.families import FAMILIES

# with the head, 1000 classes and 3 channels in 2D; headless with 1 channel in 3D
PARAMETERS = {
    "rat_tiny": 27.7e6,
    "rat_small": 50.3e6,
    "rat_base": 89.0e6,
    "rat_large": 199e6,
    "rat_huge": 630e6,
    "rat_tiny_3d": 5.2e6,
    "rat_small_3d": 20.9e6,
    "rat_base_3d": 53.1e6,
    "rat_large_3d": 94.3e6,
    "rat_huge_3d": 377e6,
    "rat_classic": 4.75e6 + 129e3,
}
VARIANTS = FAMILIES["rat"].variants
NAMES = list(VARIANTS)
SMALL = ["test_rat", "test_rat_3d"]
SHALLOW = {"depths": (1, 1, 1, 1)}  # shapes do not depend on how many blocks a stage has; operations on meta are slow


def meta(name, **kwargs):
    return timm.create_model(name, device="meta", **kwargs).eval()


def meta_image(model, batch=2):
    return torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")


def test_all_names_are_listed():
    assert {*PARAMETERS, "rat_classic_3d", "test_rat", "test_rat_3d"} <= set(NAMES) <= set(timm.list_models("*rat*"))
    assert set(timm.list_models(module="rat")) == set(NAMES)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameters(name, expected):
    assert sum(p.numel() for p in meta(name).parameters()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", [name for name in NAMES if " M parameters" in VARIANTS[name].description])
def test_descriptions_tell_the_number_of_parameters(name):
    (told,) = re.findall(r"([\d.]+) M parameters", VARIANTS[name].description)
    assert sum(p.numel() for p in meta(name).parameters()) == pytest.approx(float(told) * 1e6, rel=0.03)


@pytest.mark.parametrize("name", SMALL)
def test_test_models_are_small(name):
    assert sum(p.numel() for p in meta(name).parameters()) < 0.6e6


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_cfg(name):
    model = meta(name, **SHALLOW)
    cfg, x = model.pretrained_cfg, meta_image(model)
    axes = 3 if name.endswith("_3d") else 2
    assert len(cfg["input_size"]) == axes + 1
    assert model.in_chans == cfg["input_size"][0]
    classes = 10 if name in SMALL else 0 if axes == 3 else 1000
    assert model.num_classes == cfg["num_classes"] == classes
    features, maps = model.forward_intermediates(x)
    assert features.shape == maps[-1].shape == (2, model.num_features, *cfg["pool_size"])
    assert model(x).shape == (2, model.num_classes or model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    state = model.state_dict()
    assert f"{cfg['first_conv']}.weight" in state
    model.reset_classifier(10)
    assert f"{cfg['classifier']}.weight" in model.state_dict()
    assert model.forward_head(features).shape == (2, 10)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    assert cfg["license"] == ("mit" if "_nat_" in name else "bsd-3-clause")
    assert {"crop_pct", "interpolation", "mean", "std"} <= set(cfg)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    backbone = timm.create_model(name, features_only=True, device="meta", **SHALLOW).eval()
    assert backbone.pretrained_cfg["input_size"] == backbone.model.pretrained_cfg["input_size"]
    x = meta_image(backbone)
    maps = backbone(x)
    strides = backbone.feature_info.get("stride")
    if not name.startswith("rat_classic"):
        assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert len(maps) == 4
    for features, channels, stride in zip(maps, backbone.feature_info.channels(), strides, strict=True):
        assert features.shape == (2, channels, *(-(-n // s) for n, s in zip(x.shape[2:], stride, strict=True)))


def test_features_only_of_some_stages():
    backbone = timm.create_model("test_rat", features_only=True, out_indices=(1, 3), device="meta")
    assert backbone.feature_info.reduction() == [8, 32]
    assert len(backbone(meta_image(backbone))) == 2


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_intermediates(name):
    model = meta(name)
    x = meta_image(model)
    (last,) = model.forward_intermediates(x, indices=[-1], output_fmt="NHWC", intermediates_only=True)
    assert last.movedim(-1, 1).shape == model.forward_features(x).shape


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keywords_raise(name):
    with pytest.raises(TypeError):
        meta(name, not_a_model_arg=1)


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_made_where_and_as_asked(name):
    model = meta(name, dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "meta" and t.dtype == torch.bfloat16 for t in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_groups_for_layer_decay(name):
    model = meta(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    depth = sum(model.cfg.depths)
    assert depth < len(set(groups.values())) <= 2 * depth + 3
    assert groups["stem.convs.0.weight"] == min(groups.values())
    assert groups["stages.0.blocks.0.mlp.fc1.weight"] < groups["stages.3.blocks.0.mlp.fc1.weight"]


def test_geometry_is_not_decayed():
    model = meta("test_rat", reg_tokens=2)
    names = {n for n, _ in model.named_parameters()}
    kept = model.no_weight_decay()
    assert kept < names
    assert "stages.3.reg_tokens" in kept
    assert "stages.1.downsample.sga.temp" in kept
    assert "stages.0.blocks.0.attn.rose.freqs" in kept


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_stopping_early_changes_nothing(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, maps[-1], rtol=0, atol=0)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    for i in range(4):
        last, (early,) = model.forward_intermediates(x, indices=[i], stop_early=True, norm=True)
        torch.testing.assert_close(early, maps[i], rtol=0, atol=0)
        torch.testing.assert_close(last, maps[i], rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_pruned_models_end_at_the_last_map(name):
    model = timm.create_model(name, reg_tokens=2).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    torch.testing.assert_close(model.forward_features(x), expected[1])
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


def test_reset_keeps_pooling_device_dtype_and_frozen_state():
    model = timm.create_model("test_rat", reg_tokens=1, global_pool="token", dtype=torch.float64).eval()
    model.requires_grad_(False)
    model.reset_classifier(0)
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(3)
    assert model.head.pool_type == "token"
    assert model.get_classifier().weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(x).dtype == torch.float64
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "median")
    with pytest.raises(ValueError, match="'token' needs reg_tokens"):
        timm.create_model("test_rat").reset_classifier(3, "token")


@pytest.mark.parametrize(("name", "good", "bad"), [("test_rat", (50, 70), (50, 3)), ("test_rat_3d", 64, (64, 64))])
def test_set_input_size(name, good, bad):
    model = meta(name)
    model.set_input_size(good)
    with pytest.raises(ValueError, match="img_size"):
        model.set_input_size(bad)


def test_no_weights_is_timms_error():
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("rat_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("ours", "timms", "names"),
    [
        ("rat_tiny", "swin_tiny_patch4_window7_224", ("embed_dim", "num_features", "head_hidden_size", "global_pool")),
        ("rat_vit_small_patch16_dinov3", "vit_small_patch16_dinov3", ("embed_dim", "num_prefix_tokens", "global_pool")),
        ("apvit_tiny_patch16_224", "vit_tiny_patch16_224", ("embed_dim", "has_class_token", "num_prefix_tokens")),
    ],
)
def test_what_others_read_off_a_model_is_there(ours, timms, names):
    model, other = meta(ours), meta(timms)
    for name in names:
        assert type(getattr(model, name)) is type(getattr(other, name)), name
    assert meta("rat_tiny").embed_dim == 96
    assert meta("test_rat", reg_tokens=2, global_pool="token").num_prefix_tokens == 2
    assert meta("rat_vit_small_patch16_dinov3").has_class_token
    assert not meta("rat_vit_small_patch16_rope_mixed_224", class_token=False, global_pool="avg").has_class_token


def test_segmentation_models_pytorch():
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = smp.Unet("tu-rat_tiny", encoder_weights=None)
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 1, 64, 96)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_public_names():
    for module in (rat_timm, rat_timm.layers, rat_timm.models):
        assert all(getattr(module, name).__doc__ for name in module.__all__ if name != "__version__")
