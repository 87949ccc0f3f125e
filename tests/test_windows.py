import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from rat_timm.geometry import plans
from rat_timm.layers import local_grouping_attention, neighborhood_attention
from rat_timm.ops import grouping, tiling, windows
from rat_timm.ops.neighborhood import neighborhood_plan

CPU = torch.device("cpu")
axes = st.lists(st.tuples(st.integers(1, 13), st.integers(2, 6)), min_size=1, max_size=3)


@pytest.fixture
def kept():
    """No plans, and the limit as it was afterwards."""
    plans.set_plan_limit(0)
    plans.set_plan_limit(1 << 28)
    yield
    plans.set_plan_limit(1 << 28)


def make(axes):
    """Tiles of about the given sizes; each query sees the keys that are at most one place away."""

    def axis(length, size):
        place = np.arange(length)
        return tiling.AxisTiles.create(np.maximum(place - 1, 0), np.minimum(place + 1, length - 1), size)

    return windows.Tiles.create([axis(*entry) for entry in axes], CPU, True), [length for length, _ in axes]


def numbered(shape, batch=2, heads=3, width=4):
    return torch.arange(float(batch * heads * width * torch.Size(shape).numel())).view(batch, *shape, heads, width)


@given(axes)
def test_untile_undoes_take(axes):
    tiles, shape = make(axes)
    x = numbered(shape)
    for heads in (3, 1):
        assert torch.equal(tiles.untile(tiles.queries.take(x[..., :heads, :])), x[..., :heads, :])


@given(axes)
def test_every_query_is_new_once(axes):
    tiles, shape = make(axes)
    place = tiles.queries.take(torch.arange(torch.Size(shape).numel()).view(1, *shape, 1, 1))[:, 0, 0, :, 0]
    new = place if tiles.repeated is None else place[~tiles.repeated]
    assert sorted(new.flatten().tolist()) == list(range(torch.Size(shape).numel()))


@given(axes)
def test_queries_see_the_keys_around_them(axes):
    tiles, shape = make(axes)
    where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij"), dim=-1)[None, ..., None, :]
    query, key = tiles.queries.take(where)[:, 0, 0], tiles.keys.take(where)[:, 0, 0]  # [tiles, places, axes]
    near = ((query[:, :, None] - key[:, None]).abs() <= 1).all(-1)
    assert torch.equal(tiles.allowed(), near)
    inside = [sum(0 <= i + step < n for step in (-1, 0, 1)) for n in shape for i in (0, n // 2)]
    assert near.sum(-1).max() == math.prod(max(pair) for pair in zip(inside[::2], inside[1::2], strict=True))


@given(axes)
def test_add_is_take_transposed(axes):
    tiles, shape = make(axes)
    x = torch.randn(2, *shape, 3, 4, dtype=torch.float64, requires_grad=True)
    taken = tiles.keys.take(x)
    other = torch.randn_like(taken, requires_grad=True)
    added = tiles.keys.add(other)
    torch.testing.assert_close((taken * other).sum(), (x * added).sum())
    (grad,) = torch.autograd.grad((taken * other).sum(), x)
    torch.testing.assert_close(grad, added)
    (grad,) = torch.autograd.grad((x * added).sum(), other)
    torch.testing.assert_close(grad, taken)
    torch.testing.assert_close(tiles.overlaps.add(other), added)


def test_take_and_add_have_second_derivatives():
    tiles, shape = make([(5, 2), (4, 3)])
    x = torch.randn(1, *shape, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: tiles.keys.add(tiles.keys.take(x) ** 3), (x,))


@given(axes)
def test_overlaps_lay_what_tiles_hold_of_a_place_side_by_side(axes):
    tiles, _ = make(axes)
    x = torch.randn(tiles.keys.tiles, 2, 3, tiles.keys.places, 1, dtype=torch.float64)
    expected = tiles.keys.add(x.exp()).log().flatten(1, -3).transpose(0, 1).flatten(1)
    torch.testing.assert_close(tiles.overlaps.take(x, -torch.inf).logsumexp(1), expected)


@given(axes, st.integers(1, 9), st.integers(1, 9))
def test_parts_are_the_whole(axes, size, mixed):
    tiles, shape = make(axes)
    x, mask = numbered(shape), torch.rand(2, *shape) > 0.5
    parts = tiles.split(size, min(size, mixed))
    assert all(len(part.kind) <= (size if len(part.counts) == 1 else mixed) for part in parts)
    assert torch.equal(torch.cat([part.keys.take(x) for part in parts]), tiles.keys.take(x))
    assert torch.equal(torch.cat([part.allowed() for part in parts]), tiles.allowed())
    assert torch.equal(torch.cat([part.keys.take_mask(mask) for part in parts]), tiles.keys.take_mask(mask))
    assert torch.equal(tiles.untile(*(part.queries.take(x) for part in parts)), x)
    if tiles.repeated is not None:
        assert torch.equal(torch.cat([part.repeated for part in parts]), tiles.repeated)


def test_take_mask_takes_the_named_places():
    tiles, _ = make([(6, 3)])
    mask = torch.arange(12).view(2, 6) % 3 > 0
    assert torch.equal(tiles.keys.take_mask(mask)[:, 1], mask[1][torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])])


def test_plans_are_kept_per_argument_and_serve_training():
    calls = []

    @plans.per_geometry
    def plan(size, device):
        calls.append(size)
        return torch.arange(size, device=device)

    with torch.inference_mode():
        first = plan(3, CPU)
    assert plan(3, CPU) is first
    assert not first.is_inference()
    assert plan(4, CPU).tolist() == [0, 1, 2, 3]
    assert calls == [3, 4]


def test_plans_are_kept_up_to_a_number_of_bytes(kept):
    calls = []

    @plans.per_geometry
    def plan(size, device):
        calls.append(size)
        return windows.RowIndex(torch.zeros(size, dtype=torch.uint8, device=device), None, None), (size,)

    plans.set_plan_limit(100)
    for size in (40, 50, 40, 60, 40):  # that of 50 is the least recently used when room for 60 is wanted
        plan(size, CPU)
    assert plans.plan_bytes() == 100
    assert calls == [40, 50, 60]
    assert len(plan(101, CPU)[0].row) == len(plan(101, CPU)[0].row) == 101
    assert calls == [40, 50, 60, 101, 101]
    plan(40, CPU)
    assert len(calls) == 5
    plans.set_plan_limit(50)
    assert plans.plan_bytes() == 40
    with pytest.raises(ValueError, match="size must not be negative, got -1"):
        plans.set_plan_limit(-1)


@pytest.mark.parametrize("axes", [2, 3])
def test_plans_know_neither_samples_nor_heads(axes, kept):
    def run(batch, heads):
        for length in range(8, 16) if axes == 3 else range(16, 80, 8):
            x = torch.randn(batch, *[length] * axes, heads, 2)
            neighborhood_attention(x, x, x, 7 if axes == 2 else 5)
            coarse = x[(slice(None), *[slice(None, None, 2)] * axes)]
            local_grouping_attention(coarse, x, x, 2)

    run(1, 1)
    held = plans.plan_bytes()
    run(8, 3)
    assert plans.plan_bytes() == held
    assert 0 < held < 1 << 25


def test_plans_of_a_model_stay_small(kept):
    """Eight sizes of 1024 x 1024 pixels and less at the first stage of rat_base, heads and batch left out."""
    for size in range(200, 264, 8):
        neighborhood_plan((size, size), (7, 7), CPU)
        grouping.local_tiles((size, size), (2, 2), (3, 3), CPU)
    assert 0 < plans.plan_bytes() < 1 << 27


def test_a_tracers_tensors_are_not_kept():
    @plans.per_geometry
    def plan(size, device):
        return torch.arange(size, device=device)

    with FakeTensorMode():
        fake = plan(3, CPU)
    assert type(plan(3, CPU)) is torch.Tensor
    with FakeTensorMode():
        assert type(plan(3, CPU)) is type(fake)


def test_a_transforms_tensors_are_not_kept():
    @plans.per_geometry
    def plan(size, device):
        return torch.arange(size, device=device)

    torch.func.grad(lambda x: (x * plan(3, CPU)).sum())(torch.ones(3))
    assert plan(3, CPU).untyped_storage() is not None  # a wrapper has none


def test_an_empty_batch_passes():
    tiles, shape = make([(5, 2)])
    assert tiles.untile(tiles.queries.take(numbered(shape, batch=0))).shape == (0, 5, 3, 4)


def test_forward_derivatives():
    tiles, shape = make([(5, 2), (4, 3)])
    x = torch.randn(2, *shape, 3, 4, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, 2 * x)
        out = tiles.keys.add(tiles.keys.take(dual))
        value, tangent = torch.autograd.forward_ad.unpack_dual(out)
    torch.testing.assert_close(tangent, 2 * value)


def test_trees_of_tensors_reach_into_tiles():
    tiles, _ = make([(5, 2)])
    moved = torch.utils._pytree.tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, tiles)
    assert moved.keys.rows.row.is_meta
    assert moved.once.row.is_meta
    assert moved.keys.shape == tiles.keys.shape


@pytest.mark.parametrize("function", ["take", "add"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(function, dtype):
    tiles, shape = make([(7, 3), (5, 2)])
    x = torch.randn(2, *shape, 3, 4)
    call = tiles.keys.take if function == "take" else lambda x: tiles.keys.add(tiles.keys.take(x))
    torch.testing.assert_close(call(x.to(dtype)).float(), call(x), rtol=0.03, atol=0.1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*:FutureWarning")
@pytest.mark.parametrize("grid", [(9, 13), (5, 7, 4)])
@pytest.mark.parametrize("layer", ["neighborhood", "grouping"])
def test_a_torchscript_trace_gives_what_the_layer_gives(layer, grid):
    coarse = tuple(-(-n // 2) for n in grid)
    shapes, function = {
        "neighborhood": ([grid] * 3, lambda *tensors: neighborhood_attention(*tensors, 3)),
        "grouping": ([coarse, grid, grid], lambda *tensors: local_grouping_attention(*tensors, 2)),
    }[layer]

    def inputs():
        return [torch.randn(2, *shape, 3, 4) for shape in shapes]

    function(*inputs())  # a plan that is kept must not keep the tracer from its own
    traced = torch.jit.trace(function, inputs())
    given = inputs()
    torch.testing.assert_close(traced(*given), function(*given), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("grid", "kernel"), [((5, 7), (5, 7)), ((4, 3), 15), ((2, 3, 4), 5), ((1,), 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_window_as_wide_as_its_grid_needs_no_index(grid, kernel, masked, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *_: pytest.fail("an index was used"))
    query, key, value = torch.randn(3, 2, *grid, 3, 4, dtype=torch.float64)
    mask = torch.rand(2, *grid) > 0.4 if masked else None
    if masked:
        mask[0] = False
    out = neighborhood_attention(query, key, value, kernel, mask)
    weights = torch.einsum("bqhd,bkhd->bhqk", query.flatten(1, -3), key.flatten(1, -3)).div(2).exp()
    weights = weights if mask is None else weights * mask.flatten(1)[:, None, None]
    weights = torch.nan_to_num(weights / weights.sum(-1, keepdim=True))
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value.flatten(1, -3)).view_as(out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("grid", "kernel", "whole"), [((5, 7), 7, True), ((8, 7), 7, False), ((3, 4, 9), 8, False)])
def test_tiles_know_that_every_query_sees_every_key(grid, kernel, whole):
    assert neighborhood_plan(grid, (kernel,) * len(grid), CPU).is_whole == whole


@pytest.mark.parametrize("places", [3, 300])  # either side of what is few
@pytest.mark.parametrize("biased", [False, True])
def test_attention_agrees_with_its_definition(places, biased):
    tensors = [torch.randn(2, 8, places, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = tensors
    bias = torch.randn(2, 1, places, places, dtype=torch.float64) if biased else None
    weights = ((query[..., None, :] * key[..., None, :, :]).sum(-1) / 2 + (bias if biased else 0)).exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    out = windows.attention(query, key, value, bias)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(o.square().sum(), tensors, retain_graph=True) for o in (out, expected))
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        torch.testing.assert_close(windows.attention(query, key, value, bias), expected)


def test_attention_leaves_out_what_is_not_allowed():
    query, key, value = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    allowed = torch.rand(2, 1, 5, 7) > 0.5
    allowed[0, 0, 2] = False
    weights = (query @ key.mT * 0.5).exp() * allowed
    expected = torch.nan_to_num(weights / weights.sum(-1, keepdim=True)) @ value
    out = windows.masked_attention(query, key, value, allowed)
    torch.testing.assert_close(out, expected)
    assert out[0, :, 2].abs().max() == 0
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (query, key, value))
