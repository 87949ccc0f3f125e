import dataclasses

import pytest

from rat_timm import RatConfig
from rat_timm.models.config import CLASSIC


def test_stages_of_the_default_by_hand():
    stages = RatConfig(spacing=(2.0, 0.5)).stages()
    assert [s.dim for s in stages] == [64, 128, 256, 512]
    assert [s.dim_in for s in stages] == [64, 64, 128, 256]
    assert [s.num_heads for s in stages] == [2, 4, 8, 16]
    assert [s.sga_num_heads for s in stages] == [2, 2, 4, 8]
    assert [s.total_stride for s in stages] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert [s.unit for s in stages] == [(8, 2), (16, 4), (32, 8), (64, 16)]
    assert [s.sga_unit for s in stages] == [(8, 2), (8, 2), (16, 4), (32, 8)]
    assert [s.sga_attention_type for s in stages] == [None, "sparse", "sparse", "dense"]
    assert [s.attn_kernel_size for s in stages] == [(7, 7), (7, 7), (7, 7), None]


def test_3d_follows_spatial_dims():
    stages = dataclasses.replace(RatConfig(), spatial_dims=3, stem_stride=(1, 4, 4)).stages()
    assert [s.attn_kernel_size for s in stages] == [(5, 5, 5)] * 3 + [None]
    assert [s.total_stride for s in stages] == [(1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)]


def test_classic_is_the_seeds_network():
    stages = CLASSIC.stages()
    assert [s.total_stride for s in stages] == [(3, 3), (9, 9), (27, 27), (81, 81)]
    assert {s.sga_attention_type for s in stages} == {"dense"}
    assert {(s.dim, s.num_heads, s.depth, s.attn_kernel_size) for s in stages} == {(128, 16, 1, None)}


def test_prefix_tokens_join_at_the_first_global_stage():
    stages = RatConfig(leading_tokens=3, attn_kernel_size=(7, 7, 0, 0)).stages()
    assert [s.reg_tokens for s in stages] == [0, 0, 3, 0]


def test_no_stage_is_no_network():
    with pytest.raises(ValueError, match="depths must name at least one stage"):
        RatConfig(depths=())


@pytest.mark.parametrize("depths", [(2,), (1, 1), (1, 1, 1, 1, 1)])
def test_any_number_of_stages(depths):
    stages = RatConfig(depths=depths).stages()
    assert [s.depth for s in stages] == list(depths)
    assert stages[-1].attn_kernel_size is None
