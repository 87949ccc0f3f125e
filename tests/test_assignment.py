import itertools

import pytest
import timm
import torch

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.layers import (
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    carry_up,
    compose,
    grouping_attention,
    to_pixels,
)

SIZES = {"test_rat": (3, 45, 70), "test_rat_3d": (1, 20, 33, 17)}


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
@pytest.mark.parametrize("fine", [(11, 18), (5, 7, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_are_what_grouping_takes_values_with(grouping, fine, masked):
    """What groups take from one-hot values is the matrix of shares; carrying up one-hot groups is its transpose."""
    layer = grouping(8, len(fine), 3, 2, 2)
    coarse = tuple(-(-n // 2) for n in fine)
    count = torch.tensor(fine).prod()
    query, key = torch.randn(2, *coarse, 2, 4), torch.randn(2, *fine, 2, 4)
    mask = torch.rand(2, *fine) > 0.3 if masked else None
    value = torch.eye(count).view(1, *fine, 1, count).expand(2, *fine, 2, count)
    padded = [torch.nn.functional.pad(x, (0, count - 4)) for x in (query, key)]
    taken = layer.prepare(padded[1], value, mask, None).take(padded[0]).mean(dim=-2).flatten(1, -2)  # [B, M, N]
    shares = compose([layer.assign(query, key, mask, None)]).flatten(1, -2)  # [B, N, M]
    torch.testing.assert_close(shares.mT, taken, rtol=0, atol=1e-6)


def test_a_chain_is_the_product_of_its_matrices():
    torch.manual_seed(1)
    shapes = [(13, 10), (7, 5), (4, 3)]
    chain = []
    for fine, coarse in itertools.pairwise(shapes):
        layer = SparseSpatialGroupingAttention(8, 2, 3, 2, 2)
        chain.append(layer.assign(torch.randn(1, *coarse, 2, 4), torch.randn(1, *fine, 2, 4), None, None))
    first, second = (compose([assignment]).flatten(1, -2) for assignment in chain)
    torch.testing.assert_close(compose(chain).flatten(1, -2), first @ second)
    x = torch.randn(1, 4, 3, 6)
    torch.testing.assert_close(carry_up(chain, x).flatten(1, -2), first @ second @ x.flatten(1, -2))


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_composed_assignments_sum_to_one(name, masked):
    model = timm.create_model(name).eval()
    x = torch.randn(2, *SIZES[name])
    mask = None
    if masked:
        mask = torch.rand(2, *SIZES[name][1:]) > 0.5
        mask[0, : SIZES[name][1] // 2] = False
        mask[1, ..., 5:] = False
    out = model.forward_intermediates(x, mask=mask, output_dict=True, return_assignments=True)
    shares = compose(out["assignments"])
    assert shares.shape == (2, *out["grids"][0].shape, torch.tensor(out["grids"][-1].shape).prod())
    expected = torch.ones(shares.shape[:-1]) if mask is None else out["masks"][0].float()
    torch.testing.assert_close(shares.sum(-1), expected, rtol=0, atol=1e-4)
    assert shares.min() >= 0


def test_attention_of_groups_is_a_distribution_over_tokens():
    layer = DenseSpatialGroupingAttention(8, 2, 3, 2, 2)
    _, assignment = layer(Tokens(torch.randn(2, 9, 6, 8), Grid.create((9, 6))), return_assignment=True)
    torch.testing.assert_close(assignment.attn_k.sum(-1), torch.ones_like(assignment.attn_k[..., 0]))
    total = assignment.attn_k.sum(-2, keepdim=True)
    torch.testing.assert_close(assignment.attn_q, assignment.attn_k / total)


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
@pytest.mark.parametrize("scale", [3, 30])
def test_shares_sum_to_one_where_attention_is_peaked(grouping, scale):
    layer = grouping(8, 2, 3, 2, 2)
    query, key = scale * torch.randn(1, 8, 8, 2, 4), scale * torch.randn(1, 16, 16, 2, 4)
    assignment = layer.assign(query, key, None, None)
    assert assignment.attn_k.flatten(0, 1).sum(-2).amin() < 1e-7  # upstream's eps would take half of such a token
    torch.testing.assert_close(compose([assignment]).sum(-1), torch.ones(1, 16, 16))


def test_peaked_chunks_are_peaked_matrices():
    query, key, value = (30 * torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (12, 40, 40))
    outs = [grouping_attention(query, key, value, chunk_size=chunk) for chunk in (None, 5)]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out in outs]
    for ours, expected in zip(*grads, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        torch.testing.assert_close(grouping_attention(query, key, value, chunk_size=5), outs[0])


def test_return_assignments_needs_a_dict():
    with pytest.raises(ValueError, match="output_dict"):
        timm.create_model("test_rat").forward_intermediates(torch.randn(1, 3, 32, 32), return_assignments=True)


def test_values_of_one_make_groups_of_one():
    query, key = torch.randn(1, 2, 5, 4).double(), torch.randn(1, 2, 30, 4).double()
    taken = grouping_attention(query, key, torch.ones_like(key))
    torch.testing.assert_close(taken.sum(2), torch.full((1, 2, 4), 30.0).double())


def test_to_pixels_repeats_cells():
    x = torch.arange(4).view(1, 2, 2)
    rows = [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [2, 2, 2, 2, 3]]
    assert to_pixels(x, (2, 4), (3, 5)).tolist() == [rows]
