import itertools
import math

import pytest
import torch

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.resample import resample
from rat_timm.geometry.sample import sample_at


def reference(x, mask, source, target):
    """One sample, place by place: corners around a place weighed by their nearness, those that are masked left out."""
    out = torch.zeros(*target.shape, x.shape[-1], dtype=torch.float64)
    valid = torch.zeros(target.shape, dtype=torch.bool)
    for place in itertools.product(*map(range, target.shape)):
        total, weight, inside = torch.zeros(x.shape[-1], dtype=torch.float64), 0.0, True
        index = []
        for axis, step in enumerate(place):
            position = float(target.origin[0, axis]) + step * float(target.spacing[0, axis])
            index.append((position - float(source.origin[0, axis])) / float(source.spacing[0, axis]))
            inside &= -0.5 - 1e-6 < index[-1] < source.shape[axis] - 0.5 + 1e-6
            index[-1] = min(max(index[-1], 0.0), source.shape[axis] - 1.0)
        lower = [min(math.floor(i), n - 1) for i, n in zip(index, source.shape, strict=True)]
        for corner in itertools.product((0, 1), repeat=len(place)):
            at = [low + c for low, c in zip(lower, corner, strict=True)]
            share = math.prod(1 - abs(i - a) for i, a in zip(index, at, strict=True))
            if share > 0 and mask[tuple(at)]:
                total, weight = total + share * x[tuple(at)], weight + share
        valid[place] = inside and weight > 0
        if valid[place]:
            out[place] = total / weight
    return out, valid


SIZES = [(7,), (5, 6), (4, 3, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_sampling_follows_its_definition(size, masked):
    torch.manual_seed(0)
    axes = len(size)
    spacing, origin = torch.rand(2, axes) + 0.5, torch.randn(2, axes)
    x, mask = torch.randn(2, *size, 3, dtype=torch.float64), torch.rand(2, *size) > (0.4 if masked else -1)
    source = Grid.create(size, spacing, origin, batch_size=2)
    target = Grid.create([n + 1 for n in size], spacing * 0.9, origin + 0.7 * spacing, batch_size=2)
    out = sample_at(Tokens(x, source, mask if masked else None), target)
    for row in range(2):
        one, other = (Grid(g.shape, g.spacing[row : row + 1], g.origin[row : row + 1]) for g in (source, target))
        expected, valid = reference(x[row], mask[row], one, other)
        assert torch.equal(out.mask[row], valid)
        torch.testing.assert_close(out.x[row], expected, rtol=0, atol=1e-9)
    assert out.mask.any()
    assert not out.mask.all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_places_may_hold_anything(poison):
    x, mask, grid = torch.randn(1, 6, 5, 2), torch.rand(1, 6, 5) > 0.5, Grid.create((6, 5))
    at = Grid.create((9, 9), 0.6)
    clean, dirty = (sample_at(Tokens(v, grid, mask), at).x for v in (x, torch.where(mask[..., None], x, poison)))
    assert torch.equal(clean, dirty)


def test_an_image_comes_back_to_its_own_pixels():
    ramp = (torch.arange(48.0).double() + 0.5).view(1, 48, 1, 1) * 0.5 + torch.zeros(1, 48, 40, 1)  # in physical units
    image = Tokens(ramp, Grid.create((48, 40), 0.5))
    back = sample_at(resample(image, (1.0, 1.0)), image.grid)
    torch.testing.assert_close(back.x[:, 6:-6], ramp[:, 6:-6])
    assert back.mask.all()
    assert back.grid is image.grid


def test_values_hold_as_far_as_they_are_said_to_reach():
    values = torch.arange(3.0).view(1, 3, 1)
    tokens, at = Tokens(values, Grid.create((3,), 4.0, 0.5)), Grid.create((16,), 1.0, -3.5)  # places at 0.5, 4.5, 8.5
    found = [sample_at(tokens, at, reach) for reach in (0.5, 1.0)]
    assert [f.mask[0].nonzero().flatten().tolist() for f in found] == [list(range(2, 15)), list(range(16))]
    assert found[1].x[0, :, 0].tolist() == pytest.approx([0] * 4 + [i / 4 for i in range(9)] + [2] * 3)
    valid = found[0].mask
    assert torch.equal(found[0].x[valid], found[1].x[valid])


def test_half_precision_and_gradients():
    x = torch.randn(1, 5, 5, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, 5, 5) > 0.3
    at = Grid.create((4, 7), (1.1, 0.8), (0.4, 0.2))
    assert torch.autograd.gradcheck(lambda v: sample_at(Tokens(v, Grid.create((5, 5)), mask), at).x, x)
    half = sample_at(Tokens(x.detach().bfloat16(), Grid.create((5, 5))), at)
    assert half.x.dtype == torch.bfloat16


def test_grids_that_do_not_go_together_are_named():
    tokens = Tokens(torch.randn(2, 4, 4, 1), Grid.create((4, 4)))
    with pytest.raises(ValueError, match=r"grid must have 2 axes .* got shape \(4, 4, 4\)"):
        sample_at(tokens, Grid.create((4, 4, 4)))
    with pytest.raises(ValueError, match=r"one per sample \(2\), got .* 3 rows"):
        sample_at(tokens, Grid.create((4, 4), torch.ones(3, 2), batch_size=3))
