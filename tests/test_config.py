import dataclasses

import pytest

from rat_timm import RatConfig
from rat_timm.models.rat.variants import VARIANTS


def test_stages_of_the_default_by_hand():
    stages = RatConfig(spacing=(2.0, 0.5)).stages()
    assert [s.dim for s in stages] == [64, 128, 256, 512]
    assert [s.dim_in for s in stages] == [64, 64, 128, 256]
    assert [s.num_heads for s in stages] == [2, 4, 8, 16]
    assert [s.sga_num_heads for s in stages] == [2, 4, 8, 16]
    assert [s.total_stride for s in stages] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert [s.unit for s in stages] == [(8, 2), (16, 4), (32, 8), (64, 16)]
    assert [s.sga_unit for s in stages] == [(8, 2), (8, 2), (16, 4), (32, 8)]
    assert [s.sga_attention_type for s in stages] == [None, "sparse", "sparse", "sparse"]
    assert [s.attn_kernel_size for s in stages] == [(7, 7)] * 4
    assert [s.joint_attention for s in stages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("groups", "attention", "widths"),
    [
        ("coarse", "coarse", [(64, 64), (128, 128)]),
        ("coarse", "fine", [(64, 64), (128, 64)]),
        ("fine", "coarse", [(64, 64), (64, 64)]),
        ("fine", "fine", [(64, 64), (64, 64)]),
    ],
)
def test_widths_of_groups_and_of_their_attention(groups, attention, widths):
    stages = RatConfig(depths=(1, 1), group_width=groups, group_attn_width=attention).stages()
    assert [(s.sga_dim, s.sga_attn_dim) for s in stages] == widths
    assert [s.sga_num_heads for s in stages] == [attn // 32 for _, attn in widths]


@pytest.mark.parametrize("name", ["group_width", "group_attn_width"])
def test_widths_are_checked(name):
    with pytest.raises(ValueError, match=rf"^{name} must be one of \('coarse', 'fine'\), got 'wide'"):
        RatConfig(**{name: "wide"})


def test_convolutions_in_place_of_attention():
    types = ("conv", "attention", "conv", "conv")
    stages = RatConfig(block_types=types, conv_kernel_size=(5, 3), output_stride=16, relative_bias=True).stages()
    assert [s.conv_kernel_size for s in stages] == [(5, 3), None, (5, 3), (5, 3)]
    assert [s.attn_kernel_size for s in stages] == [None, (7, 7), None, None]
    assert [s.bias_kernel_size for s in stages] == [None, (7, 7), None, None]
    assert [s.conv_dilation for s in stages] == [(1, 1), (1, 1), (1, 1), (2, 2)]
    assert [s.joint_attention for s in stages] == [False] * 4


@pytest.mark.parametrize("types", ["window", ("conv",) * 3, ("conv", "conv", "attention", 7), 3])
def test_block_types_are_checked(types):
    with pytest.raises(ValueError, match=r"^block_types must be "):
        RatConfig(block_types=types)


def test_even_taps_are_refused_and_prefix_tokens_need_attention():
    with pytest.raises(ValueError, match="conv_kernel_size must be odd, got 4"):
        RatConfig(conv_kernel_size=4)
    with pytest.raises(ValueError, match="reg_tokens 1 need a stage in which all tokens attend to all"):
        RatConfig(block_types="conv", attn_kernel_size=0, reg_tokens=1)


def test_3d_follows_spatial_dims():
    stages = dataclasses.replace(RatConfig(), spatial_dims=3, stem_stride=(1, 4, 4)).stages()
    assert [s.attn_kernel_size for s in stages] == [(5, 5, 5)] * 4
    assert [s.total_stride for s in stages] == [(1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)]


def test_classic_is_the_seeds_network():
    stages = VARIANTS["rat_classic"].defaults["cfg"].stages()
    assert [s.total_stride for s in stages] == [(3, 3), (9, 9), (27, 27), (81, 81)]
    assert {s.sga_attention_type for s in stages} == {"dense"}
    assert {(s.dim, s.num_heads, s.depth, s.attn_kernel_size) for s in stages} == {(128, 16, 1, None)}


@pytest.mark.parametrize(("kernels", "tokens"), [((7, 7, 0, 0), [0, 0, 3, 0]), (7, [0, 0, 0, 3])])
def test_prefix_tokens_join_at_the_first_stage_in_which_all_tokens_meet(kernels, tokens):
    stages = RatConfig(leading_tokens=3, attn_kernel_size=kernels).stages()
    assert [s.reg_tokens for s in stages] == tokens


def test_no_stage_is_no_network():
    with pytest.raises(ValueError, match="depths must name at least one stage"):
        RatConfig(depths=())


@pytest.mark.parametrize("depths", [(2,), (1, 1), (1, 1, 1, 1, 1)])
def test_any_number_of_stages(depths):
    stages = RatConfig(depths=depths).stages()
    assert [s.depth for s in stages] == list(depths)
    assert [s.joint_attention for s in stages] == [False] * (len(depths) - 1) + [True]


@pytest.mark.parametrize("axes", [2, 3])
def test_output_strides_leave_out_the_last_strides(axes):
    whole, dense = RatConfig(axes), RatConfig(axes, output_stride=8)
    for stage, expected in zip(whole.stages(), ((4, 1, 7), (8, 1, 7), (16, 1, 7), (32, 1, 7)), strict=True):
        assert (stage.total_stride[0], stage.dilation[0]) == expected[:2]
    assert [stage.total_stride[0] for stage in dense.stages()] == [4, 8, 8, 8]
    assert [stage.stride[0] for stage in dense.stages()] == [1, 2, 1, 1]
    assert [stage.dilation[0] for stage in dense.stages()] == [1, 1, 1, 2]  # taps are as far apart in pixels
    assert [stage.neighborhood_kernel[0] for stage in dense.stages()] == [3, 3, 5, 9]
    kernels = [stage.attn_kernel_size[0] for stage in dense.stages()]
    assert kernels == ([7, 7, 13, 25] if axes == 2 else [5, 5, 9, 17])
    for a, b in zip(whole.stages(), dense.stages(), strict=True):
        assert (a.unit, a.sga_unit) == (b.unit, b.sga_unit)


@pytest.mark.parametrize("stride", [2, 0, 7.5, "8"])
def test_output_strides_are_checked(stride):
    with pytest.raises(ValueError, match="output_stride must be whole and at least 4"):
        RatConfig(output_stride=stride)
