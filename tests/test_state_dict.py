"""Checkpoints of other axes, channels, classes, units and wrappers give what they gave."""

import dataclasses
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3

from helpers import lively
from rat_timm.models.rat import RatConfig, checkpoint_filter_fn
from rat_timm.models.rat.checkpoint import explicit_keywords, rescale, upgrade_keywords
from rat_timm.timm_api.state_dict import fit


def load(state_dict, name, known=None, **kwargs):
    """Loads as timm does, with what is known of the saved model."""
    return timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": state_dict},
        pretrained_model_args=known,
        **kwargs,
    ).eval()


def source(name="test_rat", **kwargs):
    return lively(timm.create_model(name, **kwargs).eval())


@pytest.mark.parametrize("stem_stride", [4, (2, 4, 4)])
@torch.no_grad()
def test_a_volume_constant_along_z_gives_what_the_image_gave(stem_stride):
    model = source(num_classes=10)
    changed = {"spatial_dims": 3, "attn_kernel_size": (7, 7, 7, 0), "stem_stride": stem_stride}
    other = load(model.state_dict(), "test_rat", num_classes=10, **changed)
    x = torch.randn(1, 3, 40, 44)
    volume = x.unsqueeze(2).expand(-1, -1, 64, -1, -1)
    expected, found = (
        network.forward_intermediates(image, indices=[0], intermediates_only=True, spacing=spacing)[0]
        for network, image, spacing in ((model, x, 0.7), (other, volume, (3.0, 0.7, 0.7)))
    )
    middle = found.shape[2] // 2
    inside = found[:, :, middle - 1 : middle + 1]  # beyond the reach of the border
    torch.testing.assert_close(inside, expected.unsqueeze(2).expand_as(inside), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_dense_network_of_one_slice_is_the_image_network():
    """Without convolutions along z every layer agrees, to the logits."""
    kwargs = {"num_classes": 10, "sga_attention_type": "dense"}
    model = source(**kwargs)
    flat = {"stem_stride": (1, 4, 4), "stride": (1, 2, 2), "kernel_size": (1, 3, 3), "attn_kernel_size": (7, 7, 7, 0)}
    slices = timm.create_model("test_rat", spatial_dims=3, **flat, **kwargs).eval()
    state = fit(model.state_dict(), slices)
    for i in range(2):  # the stem has all its weight in the middle slice
        name = f"stem.convs.{i}.weight"
        state[name] = torch.zeros_like(state[name])
        state[name][:, :, 1] = model.state_dict()[name]
    slices.load_state_dict(state)
    x = torch.randn(2, 3, 33, 40)
    torch.testing.assert_close(slices(x.unsqueeze(2)), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
@torch.no_grad()
def test_any_number_of_channels(axes, channels, caplog):
    model = source(num_classes=10)
    other = load(model.state_dict(), "test_rat", in_chans=channels, spatial_dims=axes, num_classes=10)
    weight, expected = other.stem.convs[0].weight, model.stem.convs[0].weight
    if axes == 3:
        weight = weight.sum(2)
    if channels == 1:
        torch.testing.assert_close(weight[:, 0], expected.sum(1))
    else:
        for i in range(channels):
            torch.testing.assert_close(weight[:, i], expected[:, i % 3] * 3 / channels)
    assert other(torch.randn(1, channels, *(32,) * axes)).shape == (1, 10)
    assert not caplog.records


@torch.no_grad()
def test_gray_weights_take_colours():
    model = source("test_rat_3d")
    x = torch.randn(1, 1, 17, 20, 20)
    other = load(model.state_dict(), "test_rat_3d", in_chans=3)
    torch.testing.assert_close(other(x.expand(-1, 3, -1, -1, -1)), model(x), rtol=0, atol=1e-5)


def test_another_number_of_classes_keeps_everything_else():
    model = source(num_classes=10)
    other = load(model.state_dict(), "test_rat", num_classes=4)
    for name, value in other.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(value, model.state_dict()[name])
    assert other.head.fc.weight.shape == (4, 128)


def test_a_classifier_that_timm_drops_is_told():
    model = source(num_classes=4)
    with pytest.warns(UserWarning, match="give num_classes in pretrained_cfg_overlay"):
        load(model.state_dict(), "test_rat", num_classes=4)
    overlay = {"state_dict": model.state_dict(), "num_classes": 4}
    kept = timm.create_model("test_rat", pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    assert torch.equal(kept.head.fc.weight, model.head.fc.weight)


@pytest.mark.parametrize("kwargs", [{}, {"learnable_rose_scaling": True, "rose_initial_scaling": "power"}])
@torch.no_grad()
def test_another_reference_spacing_gives_the_same_for_the_same_spacing(kwargs):
    kwargs = {**kwargs, "physical_stem": False}
    model = source(num_classes=10, spacing=(0.5, 2.0), **kwargs)
    known = model.model_args()
    other = load(model.state_dict(), "test_rat", known, num_classes=10, spacing=(1.5, 0.7), **kwargs)
    x = torch.randn(2, 3, 40, 33)
    spacing = torch.tensor([[0.4, 0.3], [1.0, 2.0]])
    torch.testing.assert_close(other(x, spacing=spacing), model(x, spacing=spacing), rtol=0, atol=1e-5)
    assert (other(x) - model(x)).abs().max() > 1e-3
    unknown = load(model.state_dict(), "test_rat", None, num_classes=10, spacing=(1.5, 0.7), **kwargs)
    torch.testing.assert_close(unknown(x), model(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_shipped_weights_know_their_spacing():
    x = torch.randn(1, 3, 40, 33)
    model = timm.create_model("test_rat", pretrained=True, physical_stem=False).eval()
    other = timm.create_model("test_rat", pretrained=True, physical_stem=False, spacing=0.25).eval()
    torch.testing.assert_close(other(x, spacing=0.6), model(x, spacing=0.6), rtol=0, atol=1e-5)


@torch.no_grad()
def test_shipped_weights_know_their_spacing_however_their_entry_is_named():
    x = torch.randn(1, 3, 40, 33)
    kwargs = {"pretrained": True, "physical_stem": False}
    expected = timm.create_model("test_rat", **kwargs).eval()(x, spacing=0.6)
    entry = timm.models.get_pretrained_cfg("test_rat.digits")
    for cfg in (entry, entry.to_dict(), "digits"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # positions keep their meaning, and pixels are seen as they are
            other = timm.create_model("test_rat", **kwargs, pretrained_cfg=cfg, spacing=0.25).eval()
        torch.testing.assert_close(other(x, spacing=0.6), expected, rtol=0, atol=1e-5)


def test_a_physical_stem_at_another_reference_spacing_is_told():
    with pytest.warns(UserWarning, match="weights were trained with pixels of 1.0 in front of the stem"):
        timm.create_model("test_rat", pretrained=True, spacing=0.25)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("depths", "kinds"), [((1, 1, 1, 1), ("sparse", "sparse", "dense")), ((2,), ())])
def test_keywords_that_were_saved_before_mean_what_they_meant(depths, kinds, axes):
    """Groups had the finer stage's width, and the last grouping was dense and the last stage global by default."""
    former = {"spatial_dims": axes, "depths": depths, "iters": 3, "physical_stem": False, "group_first": False}
    window = {2: 7, 3: 5}[axes]
    now = {
        **former,
        "group_width": "fine",
        "group_attn_width": "coarse",
        "block_types": "attention",
        "stem_pool": False,
        "sga_attention_type": kinds,
        "attn_kernel_size": (window,) * (len(depths) - 1) + (0,),
        "joint_attention": False,
    }
    for saved in ({**former, "sga_attention_type": None, "attn_kernel_size": None}, former):
        assert upgrade_keywords(saved) == now
        assert saved.get("group_width") is None  # it is not changed itself
    widths = {"group_width": "fine", "group_attn_width": "coarse", "block_types": "attention", "stem_pool": False}
    windows = {**former, **widths, "sga_attention_type": "none", "attn_kernel_size": 3}
    assert upgrade_keywords(windows) == {**windows, "joint_attention": False}
    now = dataclasses.asdict(RatConfig(spatial_dims=axes, attn_kernel_size=3))
    assert upgrade_keywords(now) == now
    assert explicit_keywords({**now, "attn_kernel_size": None}) == {**now, "attn_kernel_size": window}
    assert upgrade_keywords({"embed_dim": 32}) == {"embed_dim": 32}


def test_fixed_frequencies_of_images_are_not_those_of_volumes():
    model = source(learnable_rose=False)
    with pytest.raises(ValueError, match="spatial_dims=3 needs other frequencies"):
        load(model.state_dict(), "test_rat", spatial_dims=3, learnable_rose=False)


def test_half_precision_is_converted_in_full():
    model = source(num_classes=10)
    half = {name: value.bfloat16() for name, value in model.state_dict().items()}
    whole = {name: value.float() for name, value in half.items()}
    known = model.model_args()
    for changed in ({"spacing": 0.3}, {"spatial_dims": 3}):
        a, b = (load(state, "test_rat", known, **changed).state_dict() for state in (half, whole))
        assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_fixed_frequencies_cannot_be_converted():
    model = source(num_classes=10, learnable_rose=False)
    with pytest.raises(ValueError, match="learnable_rose"):
        load(model.state_dict(), "test_rat", model.model_args(), num_classes=10, spacing=2.0, learnable_rose=False)
    kept = load(model.state_dict(), "test_rat", model.model_args(), num_classes=10, learnable_rose=False)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(kept(x), model(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers(prefix):
    model = source()
    state = checkpoint_filter_fn({f"{prefix}{name}": value for name, value in model.state_dict().items()}, model)
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("ending", ["pth.tar", "safetensors"])
def test_training_checkpoints_of_timm(tmp_path, ending):
    model, other = source(), source()
    average = ModelEmaV3(other)
    file = tmp_path / f"checkpoint.{ending}"
    if ending == "safetensors":
        save_file(average.module.state_dict(), file)
    else:
        wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
        torch.save({"state_dict": wrapped, "state_dict_ema": average.module.state_dict(), "epoch": 3}, file)
    for loaded in (
        timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay={"file": str(file)}),
        timm.create_model("test_rat", checkpoint_path=str(file)),
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), other.state_dict().values(), strict=True)
        )
    raw = {"state_dict": model.state_dict(), "state_dict_ema": other.state_dict()}
    assert torch.equal(checkpoint_filter_fn(raw, model)["norm.weight"], other.norm.weight)
    load_checkpoint(model, str(file), filter_fn=checkpoint_filter_fn)


def test_weights_of_another_network_are_refused_with_any_number_of_classes():
    state = source().state_dict()
    del state["stages.2.blocks.0.mlp.fc1.weight"]
    for classes in (10, 3):
        with pytest.raises(ValueError, match=r"lacks \['stages.2.blocks.0.mlp.fc1.weight'\]"):
            load(state, "test_rat", num_classes=classes)
    with pytest.raises(ValueError, match="left over"):
        load(source(depths=(1, 2, 1, 1)).state_dict(), "test_rat", num_classes=3)


def test_an_overlay_comes_before_the_shipped_file():
    model = source()
    loaded = load(model.state_dict(), "test_rat")
    assert torch.equal(loaded.stem.convs[0].weight, model.stem.convs[0].weight)


def test_nothing_to_convert_is_left_alone():
    model = source()
    state = model.state_dict()
    assert rescale(state, [((1.0, 1.0), (1.0, 1.0))] * 4, model.cfg) is state
