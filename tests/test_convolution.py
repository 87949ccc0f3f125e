import itertools

import pytest
import timm
import torch
from torch import nn

from helpers import lively
from rat_timm.layers import attention
from rat_timm.layers.convolution import ConvBlock

CONV = {"block_types": ("conv", "conv", "attention", "attention"), "group_attn_width": "fine", "conv_kernel_size": 5}
SIZES = {"test_rat": (40, 36), "test_rat_3d": (16, 24, 20)}


def reference(block, x, mask, dilation):
    """The block place by place, of the valid places alone."""
    kernel, weight = block.conv.kernel_size, block.conv.weight[:, 0]  # [C, *kernel]
    grid, out = x.shape[1:-1], torch.zeros_like(x)
    for sample, place in itertools.product(range(len(x)), itertools.product(*map(range, grid))):
        total = block.conv.bias.clone()
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(p + (t - k // 2) * d for p, t, k, d in zip(place, tap, kernel, dilation, strict=True))
            if all(0 <= a < n for a, n in zip(at, grid, strict=True)) and mask[(sample, *at)]:
                total = total + weight[(slice(None), *tap)] * x[(sample, *at)]
        out[(sample, *place)] = x[(sample, *place)] + block.mlp(block.norm(total))
    return out


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"), [((7,), (5,), (2,)), ((5, 6), (3, 5), (1, 2)), ((3, 4, 5), (3, 1, 3), (1, 1, 1))]
)
def test_it_is_what_it_says(grid, kernel, dilation):
    block = ConvBlock(6, kernel, dilation, mlp_ratio=2.0).double()
    x, mask = torch.randn(2, *grid, 6, dtype=torch.float64), torch.rand(2, *grid) < 0.7
    torch.testing.assert_close(block(x), reference(block, x, torch.ones_like(mask), dilation))
    hidden = torch.where(mask.unsqueeze(-1), x, torch.nan)
    torch.testing.assert_close(block(hidden, mask)[mask], reference(block, x, mask, dilation)[mask])


def test_layer_scale_and_drop_path_weigh_what_is_added():
    block = ConvBlock(4, (3, 3), (1, 1), layer_scale=1e-3, drop_path=0.5)
    plain = ConvBlock(4, (3, 3), (1, 1))
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if not name.startswith("ls.")})
    x = torch.randn(64, 5, 5, 4)
    torch.testing.assert_close(block.eval()(x) - x, (plain.eval()(x) - x) * 1e-3, rtol=1e-3, atol=1e-6)
    added = (block.train()(x) - x).flatten(1).abs().amax(dim=1)
    assert 0 < int((added == 0).sum()) < 64


@pytest.mark.parametrize("name", SIZES)
def test_slabs_give_what_the_whole_gives(name, monkeypatch):
    model = lively(timm.create_model(name, features_only=True, in_chans=1, **CONV)).eval().double()
    x = torch.randn(2, 1, *SIZES[name], dtype=torch.float64)
    mask = torch.rand(2, *SIZES[name]) < 0.8
    with torch.inference_mode():
        whole = model(x, mask=mask)
        monkeypatch.setattr(attention, "_NUMBERS_CPU", 400)
        torch.testing.assert_close(model(x, mask=mask), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SIZES)
def test_levels_pass_apart_until_they_meet(name):
    model = timm.create_model(name, num_classes=0, in_chans=1, **CONV).eval()
    fine, coarse = torch.randn(1, 1, *SIZES[name]), torch.randn(1, 1, *SIZES[name])
    others = [torch.randn_like(coarse), coarse]
    first, second = (model.forward_intermediates([fine, x], intermediates_only=True) for x in others)
    for stage in (0, 1, 2):
        assert torch.equal(first[stage][0], second[stage][0])
    assert not torch.allclose(first[3][0], second[3][0])


@pytest.mark.parametrize("name", SIZES)
def test_dilated_convolutions_see_what_they_saw(name):
    """With half of the stride, every second place of a grid twice as dense has the taps that it had."""
    axes = len(SIZES[name])
    kinds = {"block_types": "conv", "sga_attention_type": "none", "depths": (1, 2), "embed_dim": (32, 32)}
    whole = timm.create_model(name, num_classes=0, in_chans=1, final_norm=False, **kinds).eval()
    dense = timm.create_model(name, num_classes=0, in_chans=1, final_norm=False, output_stride=4, **kinds).eval()
    dense.load_state_dict(whole.state_dict())
    assert [block.conv.dilation for block in dense.stages[1].blocks] == [(2,) * axes] * 2
    x = torch.randn(1, 1, *(32,) * axes)
    a, b = (model.forward_features(x) for model in (whole, dense))
    torch.testing.assert_close(b[(..., *[slice(None, None, 2)] * axes)], a)


def test_weights_of_images_serve_volumes():
    kinds = {**CONV, "in_chans": 1, "num_classes": 0, "embed_dim": (32, 32, 64, 96), "depths": (1, 1, 1, 1)}
    image = lively(timm.create_model("test_rat", **kinds))
    overlay = {"state_dict": image.state_dict()}
    volume = timm.create_model(
        "test_rat", spatial_dims=3, pretrained=True, pretrained_cfg_overlay=overlay, **kinds
    ).eval()
    conv, inflated = image.stages[0].blocks[0].conv.weight, volume.stages[0].blocks[0].conv.weight
    torch.testing.assert_close(inflated.sum(dim=2), conv)


def test_every_part_learns():
    model = timm.create_model("test_rat", num_classes=3, **CONV)
    model(torch.randn(2, 3, 72, 64)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
    assert isinstance(model.stages[1].blocks[0].conv, nn.Conv2d)


@pytest.mark.slow
@torch.no_grad()
def test_programs_give_what_it_gives():
    torch.compiler.reset()
    model = lively(timm.create_model("test_rat", num_classes=3, **CONV)).eval()
    x, mask = torch.randn(2, 3, 40, 36), torch.rand(2, 40, 36) < 0.7
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=mask), model(x, mask=mask), rtol=0, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-5)
