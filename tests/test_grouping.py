import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from rat_timm.geometry import plans
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.layers import (
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    grouping_attention,
    local_grouping_attention,
)
from rat_timm.ops import grouping as operations
from rat_timm.ops.grouping import MASK_VALUE, log_sum_exp
from test_neighborhood import gradients

GRIDS = [((9,), 2, 3), ((7, 9), 2, 3), ((11, 6), (3, 2), 3), ((5, 20), 2, (5, 1)), ((5, 7, 4), 2, 3), ((1, 1), 2, 3)]


@contextlib.contextmanager
def cut_into_tiles(is_cut):
    """Sparse grouping in several tiles even of a small grid, or as it comes: in one."""
    with contextlib.ExitStack() as stack:
        if is_cut:
            stack.enter_context(mock.patch.object(operations, "_FEW", 0))
            stack.callback(plans.forget)
            plans.forget()
        yield


@pytest.fixture(params=[False, True], ids=["one tile", "tiles"])
def tiled(request):
    with cut_into_tiles(request.param):
        yield


def as_tuple(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def coarse_shape(fine, stride):
    return tuple(math.ceil(n / s) for n, s in zip(fine, as_tuple(stride, len(fine)), strict=True))


def local_inputs(fine, stride, batch=2, heads=3, width=4):
    shapes = [coarse_shape(fine, stride), fine, fine]
    return [torch.randn(batch, *shape, heads, width, dtype=torch.float64) for shape in shapes]


def flat(x):
    return x.flatten(1, -3).transpose(1, 2)  # [B, heads, N, d]


def local_reference(query, key, value, stride, window, mask=None, group_mask=None):
    coarse, fine = query.shape[1:-2], key.shape[1:-2]
    axes = len(fine)
    allowed = references.windows(coarse, fine, as_tuple(stride, axes), as_tuple(window, axes))
    allowed = allowed.expand(query.shape[0], -1, -1)
    if mask is not None:
        allowed = allowed & mask.flatten(1)[:, None]
    if group_mask is not None:
        allowed = allowed & group_mask.flatten(1)[..., None]
    out = references.grouping_attention(flat(query), flat(key), flat(value), allowed)
    return out.transpose(1, 2).reshape(query.shape)


def assert_same(ours, expected):
    (out, grads), (reference, reference_grads) = ours, expected
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-10)
    for grad, other in zip(grads, reference_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-8)


def test_logarithms_of_sums_are_right_where_they_show():
    x = torch.linspace(-80, 0, 81)
    assert torch.equal(log_sum_exp(torch.stack((torch.zeros(81), x)), 0), (1 + x.exp()).log())
    low = torch.tensor([-90.0, MASK_VALUE, -torch.inf])
    assert torch.equal(log_sum_exp(torch.stack((torch.zeros(3), low)), 0), torch.zeros(3))
    small = torch.tensor([0.0, -700.0], dtype=torch.float64)
    assert log_sum_exp(small + 700, 0, keepdim=True) == 700
    many = torch.full((4,), MASK_VALUE)
    torch.testing.assert_close(log_sum_exp(many, 0), many[0])


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("masked", ["nothing", "tokens", "groups and tokens"])
def test_dense_agrees_with_explicit_matrices(chunk_size, masked):
    tensors = [torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (7, 23, 23)]
    mask = torch.rand(2, 23) > 0.4 if "tokens" in masked else None
    group_mask = torch.rand(2, 7) > 0.4 if "groups" in masked else None
    allowed = torch.ones(2, 7, 23, dtype=torch.bool) if mask is None else mask[:, None].expand(-1, 7, -1)
    if group_mask is not None:
        allowed = allowed & group_mask[..., None]
    ours = gradients(grouping_attention, tensors, mask, group_mask, chunk_size)
    assert_same(ours, gradients(references.grouping_attention, tensors, allowed))


@pytest.mark.parametrize("masked", ["nothing", "tokens", "groups and tokens", "groups"])
@pytest.mark.parametrize("width", [4, 15, 16])  # with the channel for the bias: below, at and above a multiple of 16
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@torch.no_grad()
def test_without_gradients_dense_is_fused(masked, width, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("rat_timm.ops.grouping._chunk_take", None)
    tensors = [torch.randn(3, 2, n, width).to(dtype) / width**0.25 for n in (7, 23, 23)]
    mask = torch.rand(3, 23) > 0.4 if "tokens" in masked else None
    group_mask = torch.rand(3, 7) > 0.4 if "groups" in masked else None
    allowed = torch.ones(3, 7, 23, dtype=torch.bool)
    if mask is not None:
        mask[1] = False
        tensors[1][~mask[:, None].expand(-1, 2, -1)] = torch.nan
        allowed = allowed & mask[:, None]
    if group_mask is not None:
        group_mask[2] = False
        tensors[0][~group_mask[:, None].expand(-1, 2, -1)] = torch.nan
        allowed = allowed & group_mask[..., None]
    out = grouping_attention(*tensors, mask, group_mask, chunk_size=4)
    clean = [torch.nan_to_num(t).double() for t in tensors]
    expected = references.grouping_attention(*clean, allowed)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("fine", "stride", "window"), GRIDS)
@pytest.mark.parametrize("masked", ["nothing", "tokens", "groups and tokens"])
@pytest.mark.usefixtures("tiled")
def test_sparse_agrees_with_explicit_matrices(fine, stride, window, masked):
    tensors = local_inputs(fine, stride)
    mask = torch.rand(2, *fine) > 0.4 if "tokens" in masked else None
    group_mask = torch.rand(2, *coarse_shape(fine, stride)) > 0.4 if "groups" in masked else None
    ours = gradients(local_grouping_attention, tensors, stride, window, mask, group_mask)
    assert_same(ours, gradients(local_reference, tensors, stride, window, mask, group_mask))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 22), min_size=1, max_size=2),
    st.integers(1, 4),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_sparse_on_any_grid(fine, stride, window, seed, is_cut):
    torch.manual_seed(seed)
    tensors = local_inputs(tuple(fine), stride, batch=1, heads=1, width=2)
    expected = local_reference(*tensors, stride, window)
    with cut_into_tiles(is_cut):
        out = local_grouping_attention(*tensors, stride, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(16, 16), (17, 16), (4, 8, 8), (16, 8, 8)])
def test_few_pairs_are_one_tile(shape):
    coarse = coarse_shape(shape, 2)
    tiles = operations.local_tiles(shape, (2,) * len(shape), (3,) * len(shape), torch.device("cpu"))
    assert (tiles.queries.tiles == 1) == (math.prod(shape) * math.prod(coarse) <= 1 << 14)
    if tiles.queries.tiles == 1:  # the order in which tokens and groups are taken as they lie
        assert tiles.queries.rows.row.tolist() == list(range(math.prod(shape)))
        assert tiles.keys.rows.row.tolist() == list(range(math.prod(coarse)))


@pytest.mark.parametrize("fine", [(13, 10), (5, 6, 7)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("tiled")
def test_a_window_over_the_grid_is_dense(fine, masked):
    query, key, value = local_inputs(fine, 2)
    mask = torch.rand(2, *fine) > 0.4 if masked else None
    sparse = local_grouping_attention(query, key, value, 2, 99, mask)
    dense = grouping_attention(flat(query), flat(key), flat(value), None if mask is None else mask.flatten(1))
    torch.testing.assert_close(flat(sparse), dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.usefixtures("tiled")
def test_masked_tokens_may_hold_anything(poison):
    query, key, value = local_inputs((9, 12), 2)
    mask = torch.rand(2, 9, 12) > 0.4

    def both():
        dense = grouping_attention(flat(query), flat(key), flat(value), mask.flatten(1))
        return local_grouping_attention(query, key, value, 2, 3, mask), dense

    clean = both()
    key[~mask], value[~mask] = poison, poison
    assert all(torch.equal(a, b) for a, b in zip(both(), clean, strict=True))


@pytest.mark.usefixtures("tiled")
def test_groups_without_valid_tokens_are_zero_with_finite_gradients():
    tensors, mask = local_inputs((8, 12), 2), torch.zeros(2, 8, 12, dtype=torch.bool)
    out, grads = gradients(local_grouping_attention, tensors, 2, 3, mask)
    assert out.abs().max() == 0
    assert all(torch.isfinite(grad).all() for grad in grads)


@torch.no_grad()
def test_autocast_gives_one_dtype_whatever_the_chunks():
    tensors = [torch.randn(1, 2, n, 16) for n in (5, 12, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        whole, fused = (grouping_attention(*tensors, chunk_size=chunk) for chunk in (None, 4))
    assert whole.dtype == fused.dtype == torch.bfloat16
    torch.testing.assert_close(fused, whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grids", [[(6, 9), (8, 5)], [(4, 5, 6), (5, 3, 4)]])
@pytest.mark.usefixtures("tiled")
def test_a_compiled_sparse_grouping_takes_another_size(grids):
    torch._dynamo.reset()
    compiled = torch.compile(local_grouping_attention, fullgraph=True, backend="eager")
    for grid in grids:
        tensors = local_inputs(grid, 2)
        expected = local_grouping_attention(*tensors, 2)
        torch.testing.assert_close(compiled(*tensors, 2), expected, rtol=0, atol=1e-10)


def test_memory_of_dense_grouping_is_bounded_by_chunks():
    """The M x N matrices of these inputs would take 17 GB."""
    query, key = torch.randn(1, 1, 8192, 8), torch.randn(1, 1, 1 << 18, 8)
    few = grouping_attention(query[:, :, :1], key, key)
    assert torch.isfinite(few).all()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        grouping_attention(query[:, :, :64].requires_grad_(), key[:, :, : 1 << 12], key[:, :, : 1 << 12], chunk_size=8)
    assert max(saved) <= key[:, :, : 1 << 12].numel()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 4, 5, 3, 4)}, "key, value"),
        ({"stride": 0}, "stride must be"),
        ({"window": 2}, "window must be an odd"),
        ({"stride": 3}, "query must be"),
        ({"mask": torch.ones(2, 9, 12)}, "mask must be bool"),
    ],
)
def test_bad_arguments_of_sparse_are_named(change, message):
    query, key, value = local_inputs((9, 12), 2)
    arguments = {"query": query, "key": key, "value": value, "stride": 2, "window": 3} | change
    with pytest.raises(ValueError, match=message):
        local_grouping_attention(**arguments)


def test_bad_arguments_of_dense_are_named():
    query = torch.zeros(2, 3, 5, 4)
    with pytest.raises(ValueError, match="query must be"):
        grouping_attention(query, query[0], query[0])
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 5\]"):
        grouping_attention(query, query, query, torch.ones(2, 6, dtype=torch.bool))


def module_reference(layer, tokens):
    """DESIGN section 3 step by step, with explicit matrices."""
    x, heads, width = tokens.x, layer.num_heads, layer.q.out_features // layer.num_heads
    coarse = tokens.grid.conv(layer.kernel_size, layer.stride, layer.padding)
    center = tokens.grid.coordinates()[0].flatten(0, -2).mean(0)

    def rotated(flat_tokens, grid):
        offsets = (grid.coordinates()[0].flatten(0, -2) - center) / torch.tensor(layer.unit)
        split = flat_tokens.unflatten(-1, (heads, width))
        turned = [[references.rotate(t, o, layer.rose.freqs) for t, o in zip(s, offsets, strict=True)] for s in split]
        return torch.stack([torch.stack(sample) for sample in turned]).transpose(1, 2)  # [B, heads, N, d]

    key, value = layer.kv(x.flatten(1, -2)).chunk(2, dim=-1)
    key = layer.temp * rotated(key, tokens.grid)
    value = value.unflatten(-1, (heads, width)).transpose(1, 2)
    groups = layer.norm1(layer.strider(x.movedim(-1, 1)).flatten(2).mT)
    if isinstance(layer, SparseSpatialGroupingAttention):
        window = (layer.neighborhood_kernel,) * len(coarse.shape)
        allowed = references.windows(coarse.shape, tokens.grid.shape, layer.stride, window)
    else:
        allowed = torch.ones(math.prod(coarse.shape), math.prod(tokens.grid.shape), dtype=torch.bool)
    for _ in range(layer.iters):
        query = rotated(layer.q(groups), coarse)
        taken = references.grouping_attention(query, key, value, allowed.expand(len(x), -1, -1))
        taken = taken.transpose(1, 2).flatten(2)
        groups = groups + layer.norm2(taken if layer.proj is None else layer.proj(taken))
        groups = groups + layer.norm3(layer.mlp(groups))
    return groups.unflatten(1, coarse.shape)


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
@pytest.mark.parametrize("fine", [(7, 6), (3, 5, 4)])
def test_the_module_follows_the_design(grouping, fine):
    layer = grouping(16, len(fine), 3, 4, 2, unit=2.0, rotary_ratio=1.0, mlp_ratio=1.0).double()
    tokens = Tokens(torch.randn(2, *fine, 16, dtype=torch.float64), Grid.create(fine, 1.5))
    out, _ = layer(tokens)
    # phases are float32 by design, so that agreement ends there
    torch.testing.assert_close(out.x, module_reference(layer, tokens), rtol=0, atol=2e-6)
    assert out.grid.shape == coarse_shape(fine, 2)


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
@pytest.mark.parametrize("fine", [(7, 6), (3, 5, 4)])
def test_attention_narrower_than_the_groups(grouping, fine):
    layer = grouping(24, len(fine), 3, 2, 2, unit=2.0, rotary_ratio=1.0, mlp_ratio=0.5, in_dims=16, attn_dims=12)
    layer = layer.double()
    assert (layer.q.in_features, layer.kv.in_features) == (24, 16)
    assert (layer.q.out_features, layer.kv.out_features, layer.proj.out_features) == (12, 24, 24)
    tokens = Tokens(torch.randn(2, *fine, 16, dtype=torch.float64), Grid.create(fine, 1.5))
    out, _ = layer(tokens)
    torch.testing.assert_close(out.x, module_reference(layer, tokens), rtol=0, atol=2e-6)
    assert out.x.shape == (2, *coarse_shape(fine, 2), 24)


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
def test_the_coarse_mask_is_any_pixel_of_the_cell(grouping):
    layer = grouping(8, 2, 3, 2, 2, rotary_ratio=1.0)
    mask = torch.zeros(1, 5, 6, dtype=torch.bool)
    mask[0, 4, 1] = True
    out, _ = layer(Tokens(torch.randn(1, 5, 6, 8), Grid.create((5, 6)), mask))
    assert out.mask.nonzero().tolist() == [[0, 2, 0]]


@pytest.mark.parametrize("grouping", [DenseSpatialGroupingAttention, SparseSpatialGroupingAttention])
def test_masked_cells_take_no_share(grouping):
    """What valid groups take does not depend on how much masked padding lies beside them."""
    layer = grouping(8, 2, 3, 2, 2, rotary_ratio=1.0)
    x, mask = torch.randn(1, 8, 16, 8), torch.zeros(1, 8, 16, dtype=torch.bool)
    mask[:, :, :8] = True
    alone = layer(Tokens(x[:, :, :8], Grid.create((8, 8)), None))[0].x
    padded = layer(Tokens(x, Grid.create((8, 16)), mask))[0].x[:, :, :4]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_bad_constructions_are_named():
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        DenseSpatialGroupingAttention(16, num_heads=2, spacing=2.0)
    with pytest.raises(ValueError, match="num_heads 3 does not divide feature_dims 16"):
        DenseSpatialGroupingAttention(16, 2, 3, 3)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        DenseSpatialGroupingAttention(16, 2, 4, 2)
