import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import references
from helpers import lively
from rat_timm.dense.decoders import (
    ConvNorm,
    DetailLevels,
    FpnDecoder,
    GroupDecoder,
    Refine,
    SimplePyramid,
    add_context,
    average_cells,
    contrast,
    refined,
)
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.layers import DenseSpatialGroupingAttention, SparseSpatialGroupingAttention
from rat_timm.ops.masking import pool_mask

SHAPES = [[(9, 6), (5, 3), (3, 2)], [(5, 3, 4), (3, 2, 2), (2, 1, 1)]]


def carried(query, key, x, allowed):
    """y[n] = sum over m of Ah[m, n] x[m] of one sample, Ah averaged over heads; query [heads, M, d], x [M, C]."""
    shares = [references.assignments(q, k, allowed)[1] for q, k in zip(query, key, strict=True)]
    out = []
    for n in range(allowed.shape[1]):
        total = torch.zeros(x.shape[1], dtype=x.dtype)
        for m in range(allowed.shape[0]):
            total = total + sum(share[m, n] for share in shares) / len(shares) * x[m]
        out.append(total)
    return torch.stack(out)


def grouping(kind, fine, coarse, masked):
    """A grouping of two heads in float64: its assignment, queries, keys and which pairs are allowed."""
    axes = len(fine)
    layer = kind(8, axes, 3, 2, 2)
    query = torch.randn(2, *coarse, 2, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, *fine, 2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, *fine) > 0.4 if masked else torch.ones(2, *fine, dtype=torch.bool)
    groups = pool_mask(mask, (2,) * axes)
    window = 3 if kind is SparseSpatialGroupingAttention else 99
    near = references.windows(coarse, fine, (2,) * axes, (window,) * axes)
    allowed = near & mask.flatten(1)[:, None] & groups.flatten(1)[:, :, None]
    assignment = layer.assign(query, key, mask if masked else None, groups if masked else None)
    return assignment, query, key, allowed


@pytest.mark.parametrize("kind", [SparseSpatialGroupingAttention, DenseSpatialGroupingAttention])
@pytest.mark.parametrize("shapes", SHAPES, ids=["2d", "3d"])
@pytest.mark.parametrize("masked", [False, True])
def test_carrying_up_follows_its_definition(kind, shapes, masked):
    fine, coarse, _ = shapes
    assignment, query, key, allowed = grouping(kind, fine, coarse, masked)
    x = torch.randn(2, *coarse, 3, dtype=torch.float64, requires_grad=True)
    out = assignment.carry_up(x)
    rows = zip(query, key, x, allowed, strict=True)
    flat = [[part.flatten(0, -3).transpose(0, 1) for part in (q, k)] + [v.flatten(0, -2), a] for q, k, v, a in rows]
    expected = torch.stack([carried(*row) for row in flat]).view_as(out)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), (query, key, x)),
        torch.autograd.grad((expected * weight).sum(), (query, key, x)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def interpolated(x, mask, source, target):
    """Linear interpolation of one sample, place by place; beyond the outermost centres values hold."""
    out = torch.zeros(*target.shape, x.shape[-1], dtype=x.dtype)
    for place in references.places(target.shape):
        index = []
        for axis, step in enumerate(place):
            position = float(target.origin[0, axis]) + step * float(target.spacing[0, axis])
            index.append((position - float(source.origin[0, axis])) / float(source.spacing[0, axis]))
        index = [min(max(i, 0.0), n - 1.0) for i, n in zip(index, source.shape, strict=True)]
        total, weight = torch.zeros(x.shape[-1], dtype=x.dtype), 0.0
        for corner in itertools.product(*((math.floor(i), math.ceil(i)) for i in index)):
            share = math.prod(1 - abs(i - c) for i, c in zip(index, corner, strict=True))
            share /= math.prod(2 if math.floor(i) == math.ceil(i) else 1 for i in index)
            if mask[corner]:
                total, weight = total + share * x[corner], weight + share
        out[place] = total / weight if weight else 0
    return out


def maps_of(shapes, dims, masked):
    """Maps of a chain of strided convolutions over one image, in float64."""
    axes = len(shapes[0])
    grid = Grid.create(shapes[0], [0.5 + 0.25 * i for i in range(axes)], 0.3)
    mask = torch.rand(2, *shapes[0]) > 0.5 if masked else None
    maps = []
    for shape, dim in zip(shapes, dims, strict=True):
        assert grid.shape == shape
        maps.append(Tokens(torch.randn(2, *shape, dim, dtype=torch.float64), grid, mask))
        grid = grid.conv((3,) * axes, (2,) * axes, (1,) * axes)
        mask = None if mask is None else pool_mask(mask, (2,) * axes)
    return maps


def decoded(decoder, maps, up):
    """A decoder by its formula; ``up(index, y)`` brings a coarse map to the finer places."""
    conv = F.conv2d if len(maps[0].grid.shape) == 2 else F.conv3d

    def kept(x, tokens):
        return x if tokens.mask is None else x * tokens.mask[..., None]

    def lateral(index):
        norm, linear = decoder.laterals[index]
        x = F.layer_norm(maps[index].x, norm.normalized_shape, norm.weight, norm.bias)
        return kept(x @ linear.weight.T + linear.bias, maps[index])

    y = lateral(-1)
    for index in reversed(range(len(maps) - 1)):
        fusion = decoder.fusions[index]
        x = kept(lateral(index) + up(index, kept(y, maps[index + 1])), maps[index])
        x = conv(x.movedim(-1, 1), fusion.conv.weight, fusion.conv.bias, padding=1).movedim(1, -1)
        y = F.gelu(F.layer_norm(x, x.shape[-1:], fusion.norm.weight, fusion.norm.bias, 1e-6))
    return y


@pytest.mark.parametrize("shapes", SHAPES, ids=["2d", "3d"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fpn_decoder_follows_its_formula(shapes, masked):
    dims = (5, 6, 7)
    decoder, maps = FpnDecoder(dims, 4, len(shapes[0])).double(), maps_of(shapes, dims, masked)

    def up(index, y):
        coarse, fine = maps[index + 1], maps[index]
        mask = torch.ones(y.shape[:-1], dtype=torch.bool) if coarse.mask is None else coarse.mask
        return torch.stack([interpolated(y[b], mask[b], coarse.grid, fine.grid) for b in range(2)])

    out = decoder(maps)
    torch.testing.assert_close(out.filled(), out._replace(x=decoded(decoder, maps, up)).filled())
    assert out.grid is maps[0].grid
    assert out.mask is maps[0].mask


@pytest.mark.parametrize("shapes", SHAPES, ids=["2d", "3d"])
def test_the_group_decoder_follows_its_formula(shapes):
    dims = (5, 6, 7)
    decoder, maps = GroupDecoder(dims, 4, len(shapes[0])).double(), maps_of(shapes, dims, False)
    found = [grouping(SparseSpatialGroupingAttention, *pair, False) for pair in itertools.pairwise(shapes)]

    def up(index, y):
        _, query, key, allowed = found[index]
        rows = zip(query, key, y, allowed, strict=True)
        flat = [[part.flatten(0, -3).transpose(0, 1) for part in (q, k)] + [v.flatten(0, -2), a] for q, k, v, a in rows]
        return torch.stack([carried(*row).unflatten(0, shapes[index]) for row in flat])

    out = decoder(maps, [assignment for assignment, *_ in found])
    torch.testing.assert_close(out.x, decoded(decoder, maps, up))


def test_the_decoders_differ_in_nothing_but_how_they_go_up():
    one, other = (kind((8, 16, 32), 12, 2) for kind in (GroupDecoder, FpnDecoder))
    assert [(n, p.shape) for n, p in one.named_parameters()] == [(n, p.shape) for n, p in other.named_parameters()]


def test_going_up_holds_no_matrix_of_tokens_and_groups():
    layer, fine = SparseSpatialGroupingAttention(8, 2, 3, 2, 2), (64, 64)
    with torch.no_grad():
        _, assignment = layer(Tokens(torch.randn(1, *fine, 8), Grid.create(fine)), return_assignment=True)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Sizes(), torch.no_grad():
        assignment.carry_up(torch.randn(1, 32, 32, 16))
    assert max(sizes) <= 64 * 64 * 64  # 64 * 64 * 32 * 32 would be the matrix


@pytest.mark.parametrize("module", [ConvNorm(3, 4, (2, 2)), Refine(3, 4, (2, 1)), ConvNorm(3, 4, (1, 1))])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_places_may_hold_anything(module, poison):
    x, mask, grid = torch.randn(2, 7, 5, 3), torch.rand(2, 7, 5) > 0.5, Grid.create((7, 5))
    clean, dirty = (module(Tokens(v, grid, mask)) for v in (x, torch.where(mask[..., None], x, poison)))
    assert torch.equal(clean.x, dirty.x)
    assert torch.equal(clean.mask, dirty.mask)
    assert clean.grid.shape == clean.x.shape[1:-1]


@pytest.mark.parametrize("factors", [(2, 2), (2, 1), (1, 2, 2)])
def test_refined_places_divide_their_cell(factors):
    axes = len(factors)
    grid = Grid.create((3,) * axes, [0.5 + i for i in range(axes)], 0.2)
    fine = refined(grid, factors)
    for corner, expected in zip(fine.corners(), grid.corners(), strict=True):
        torch.testing.assert_close(corner, expected)
    assert fine.numbers.spacing == pytest.approx(fine.spacing[0].tolist())
    assert fine.numbers.origin == pytest.approx(fine.origin[0].tolist())
    module = Refine(2, 3, factors)
    x, mask = torch.randn(1, *grid.shape, 2), torch.rand(1, *grid.shape) > 0.5
    out = module(Tokens(x, grid, mask))
    for place in references.places(fine.shape):
        cell = tuple(i // f for i, f in zip(place, factors, strict=True))
        tap = tuple(i % f for i, f in zip(place, factors, strict=True))
        expected = module.conv.bias + mask[(0, *cell)] * (x[(0, *cell)] @ module.conv.weight[(slice(None),) * 2 + tap])
        torch.testing.assert_close(out.x[(0, *place)], expected)
        assert out.mask[(0, *place)] == mask[(0, *cell)]


CELLS = pytest.mark.parametrize(("shape", "cells"), [((5, 4), (2, 2)), ((9, 14), (4, 4)), ((3, 5, 11), (1, 2, 4))])


@CELLS
@pytest.mark.parametrize("masked", [False, True])
def test_averages_are_of_the_valid_places_of_a_cell(shape, cells, masked):
    grid, x = Grid.create(shape), torch.randn(2, *shape, 3, dtype=torch.float64)
    mask = torch.rand(2, *shape) > 0.6
    out = average_cells(Tokens(x, grid, mask if masked else None), cells)
    assert out.grid.shape == tuple(-(-n // f) for n, f in zip(shape, cells, strict=True))
    assert out.grid.spacing.tolist() == [[float(f) for f in cells]]
    assert out.grid.origin.tolist() == [[f / 2 for f in cells]]
    for b, place in itertools.product(range(2), references.places(out.grid.shape)):
        cell = (b, *(slice(f * i, f * i + f) for i, f in zip(place, cells, strict=True)))
        values = x[cell].flatten(0, -2)
        values = values[mask[cell].flatten()] if masked else values
        expected = values.mean(0) if len(values) else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(out.x[(b, *place)], expected)
        if masked:
            assert out.mask[(b, *place)] == mask[cell].any()


@CELLS
def test_contrast_is_to_the_mean_between_the_centres_of_cells(shape, cells):
    """At each pixel: the mean of the valid pixels of the cells whose centres are nearest, by their distance."""
    x, mask = torch.randn(1, *shape, 2, dtype=torch.float64), torch.rand(1, *shape) > 0.4
    x[~mask] = torch.nan
    values = contrast(Tokens(x, Grid.create(shape, 0.3, 5.0), mask), cells)
    counts = [-(-n // f) for n, f in zip(shape, cells, strict=True)]
    for place in references.places(shape):
        if not mask[(0, *place)]:
            continue
        total, weight = torch.zeros(2, dtype=torch.float64), 0.0
        for cell in references.places(counts):
            share = 1.0
            for at, f, i, count in zip(place, cells, cell, counts, strict=True):
                index = min(max((at + 0.5) / f - 0.5, 0), count - 1)  # beyond the outermost centres their value holds
                share *= max(0.0, 1 - abs(index - i))
            here = (0, *(slice(f * i, f * i + f) for i, f in zip(cell, cells, strict=True)))
            if mask[here].any():
                total, weight = total + share * x[here][mask[here]].mean(0), weight + share
        torch.testing.assert_close(values[(0, *place)], x[(0, *place)] - total / weight)


@pytest.mark.parametrize("size", [(24, 20), (9, 16, 12)])
def test_detail_does_not_know_how_bright_it_is(size):
    strides = (4.0,) * len(size)
    image = Tokens(torch.randn(1, *size, 3), Grid.create(size), torch.rand(1, *size) > 0.3)
    brighter = image._replace(x=image.x + torch.tensor([3.0, -2.0, 7.0]))
    coarse = average_cells(Tokens(torch.randn(1, *size, 32), image.grid), [4] * len(size))
    for sees, same in (("contrast", True), ("pixels", False)):
        detail = lively(DetailLevels(3, 32, strides, sees))
        change = (detail(image, coarse).x - detail(brighter, coarse).x).abs().max()
        assert (change < 1e-4) == same


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (2, 16, 16), (1, 4, 8)])
def test_a_simple_pyramid_stands_at_four_strides(patch):
    pyramid = SimplePyramid(8, patch)
    shape = (3, 2, 3)[: len(patch)]
    grid = Grid.create(shape, [float(p) for p in patch])
    maps = pyramid(Tokens(torch.randn(1, *shape, 8), grid))
    assert [m.x.shape[-1] for m in maps] == pyramid.dims == [2, 4, 8, 8]
    assert maps[0].grid.spacing[0].tolist() == pytest.approx(pyramid.strides)
    assert min(pyramid.strides) >= 1
    for finer, coarser in itertools.pairwise(maps):
        ratio = coarser.grid.spacing / finer.grid.spacing
        assert ((ratio == 1) | (ratio == 2)).all()
        torch.testing.assert_close(finer.grid.corners()[0], coarser.grid.corners()[0])


@pytest.mark.parametrize("size", [(13, 10), (5, 6, 7)])
def test_detail_ends_on_the_images_own_grid(size):
    axes = len(size)
    image = Tokens(torch.randn(2, *size, 3), Grid.create(size, 0.5), torch.rand(2, *size) > 0.3)
    coarse = image.grid.conv((3,) * axes, (2,) * axes, (1,) * axes).conv((3,) * axes, (2,) * axes, (1,) * axes)
    detail = DetailLevels(3, 32, (4.0,) * axes)
    x = torch.randn(2, *coarse.shape, 32)
    out = detail(image, Tokens(x, coarse))
    assert out.grid is image.grid
    assert out.mask is image.mask
    assert out.x.shape == (2, *size, detail.dims)
    other = detail(image, Tokens(x + 1 + torch.randn_like(x), coarse))
    assert (out.x != other.x).any(-1).all()  # to the last pixel, which lies beyond the coarse map's last centre


@pytest.mark.parametrize("axes", [2, 3])
def test_context_is_the_mean_of_what_levels_have_at_a_place(axes):
    """Levels hold linear functions of position, so that interpolation is exact; one ends early, one is half masked."""
    shape = (6,) * axes
    tokens = Tokens(torch.randn(2, *shape, 3, dtype=torch.float64), Grid.create(shape, 1.0, 10.0))

    def level(n, spacing, start, factor):
        grid = Grid.create((n,) * axes, spacing, start)
        return Tokens((grid.coordinates().sum(-1, keepdim=True) * factor).expand(2, *grid.shape, 3), grid)

    wide, short = level(12, 2.0, 1.0, 1.0), level(2, 2.0, 10.0, 5.0)  # the second covers places up to 13
    half = level(12, 2.0, 1.0, 3.0)
    half = half._replace(mask=(half.grid.coordinates()[..., -1] > 13).expand(2, *half.grid.shape))
    half = half._replace(x=half.x.masked_fill(~half.mask.unsqueeze(-1), torch.nan))
    added = add_context(tokens, [wide, short, half]).x - tokens.x
    for place in itertools.product(range(6), repeat=axes):
        at = [10.0 + index for index in place]
        values = [sum(at)]
        if max(at) <= 13:
            values.append(5 * sum(min(x, 12.0) for x in at))  # beyond its outermost centres a level's values hold
        if at[-1] > 13:
            values.append(3 * (sum(at[:-1]) + max(at[-1], 15.0)))  # the first valid centre is at 15
        expected = torch.full((2, 3), sum(values) / len(values), dtype=torch.float64)
        torch.testing.assert_close(added[(slice(None), *place)], expected, rtol=0, atol=1e-9)
    assert add_context(tokens, []) is tokens
