"""Resampling to a pixel size: against sums written out in float64, and what must hold with masks."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rat_timm.geometry.box import Box
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.resample import Resampling, resample, spacing_rows

SIZES = [(11,), (7, 9), (3, 5, 4)]


def image(*size, batch=2, spacing=1.0, origin=None, mask=None, dtype=torch.float64):
    return Tokens(torch.randn(batch, *size, 3, dtype=dtype), Grid.create(size, spacing, origin, batch), mask)


def by_sums(tokens, spacing):
    """Weights every pixel for every new one by its distance; None where no valid pixel lies under the new one."""
    old = tokens.grid.spacing[0].tolist()
    size = [max(1, round(n * s / new)) for n, s, new in zip(tokens.grid.shape, old, spacing, strict=True)]
    out = {}
    for row in range(len(tokens.x)):
        for place in itertools.product(*map(range, size)):
            total, weights, covered = torch.zeros(tokens.x.shape[-1], dtype=torch.float64), 0.0, False
            for pixel in itertools.product(*map(range, tokens.grid.shape)):
                if tokens.mask is not None and not tokens.mask[(row, *pixel)]:
                    continue
                away = [
                    (p + 0.5) * s - (q + 0.5) * new for p, q, s, new in zip(pixel, place, old, spacing, strict=True)
                ]
                weight = math.prod(max(0, 1 - abs(a) / max(s, n)) for a, s, n in zip(away, old, spacing, strict=True))
                over = [(s + n) / 2 - abs(a) > 1e-6 * s for a, s, n in zip(away, old, spacing, strict=True)]
                total, weights, covered = (
                    total + weight * tokens.x[(row, *pixel)],
                    weights + weight,
                    covered | all(over),
                )
            out[(row, *place)] = total / weights if covered else None
    return size, out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ratio", [(0.5, 0.5, 0.5), (2.0, 1.0, 3.0), (0.7, 1.4, 0.31), (0.1, 0.9, 1.7)])
@pytest.mark.parametrize("size", SIZES)
def test_every_new_pixel_is_a_weighted_mean_of_those_near_it(size, ratio, masked):
    mask = torch.rand(2, *size) > 0.6 if masked else None
    tokens = image(*size, spacing=(0.8, 1.3, 2.0)[: len(size)], mask=mask)
    spacing = [s * r for s, r in zip((0.8, 1.3, 2.0), ratio, strict=True)][: len(size)]
    shape, expected = by_sums(tokens, spacing)
    found = resample(tokens, spacing)
    assert list(found.grid.shape) == shape == list(found.x.shape[1:-1])
    for place, value in expected.items():
        assert found.mask is None or bool(found.mask[place]) == (value is not None)
        torch.testing.assert_close(found.x[place], torch.zeros(3).double() if value is None else value)


@pytest.mark.parametrize("size", [64, 32, 128])
def test_in_2d_it_is_pytorchs_antialiased_interpolation(size):
    tokens = image(64, 64)
    expected = F.interpolate(tokens.x.movedim(-1, 1), (size, size), mode="bilinear", antialias=True).movedim(1, -1)
    torch.testing.assert_close(resample(tokens, (64 / size,) * 2).x, expected)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 40), spacing=st.floats(0.1, 8.0), new=st.floats(0.1, 8.0))
def test_the_field_of_view_stays_and_so_does_what_is_constant(size, spacing, new):
    tokens = Tokens(torch.ones(1, size, 5, 1), Grid.create((size, 5), (spacing, 1.0), (3.0, -2.0)))
    found = resample(tokens, (new, 1.0))
    torch.testing.assert_close(found.x, torch.ones_like(found.x))
    (low, high), (found_low, found_high) = tokens.grid.corners(), found.grid.corners()
    torch.testing.assert_close(found_low, low)
    assert (
        (found_high - high).abs()[0] <= torch.tensor([max(new, 1e-6) * (0.5 if found.x.shape[1] > 1 else 1e9), 1e-6])
    ).all()


def test_an_image_of_that_spacing_is_left_alone():
    tokens = image(5, 6, spacing=(0.5, 2.0))
    assert resample(tokens, (0.5, 2.0)) is tokens


def test_values_stay_where_they_are():
    ramp = ((torch.arange(12.0) + 0.5) * 0.4).reshape(1, 12, 1).double()
    for new in (0.13, 0.4, 0.9):
        found = resample(Tokens(ramp, Grid.create((12,), 0.4)), (new,))
        inner = slice(math.ceil(0.4 / new) + 1, -math.ceil(0.4 / new) - 1)
        away = found.x[0, inner, 0] - found.grid.coordinates()[0, inner, 0]
        assert len(away) > 0
        assert away.abs().max() < (0.02 * new if new > 0.4 else 1e-6)  # sampled, the triangle is not quite balanced


@pytest.mark.parametrize("size", SIZES)
def test_what_is_masked_has_no_influence_and_no_gradient(size):
    mask = torch.rand(2, *size) > 0.5
    tokens = image(*size, mask=mask)
    spacing = (0.6, 1.7, 1.2)[: len(size)]
    clean = resample(tokens, spacing)
    x = torch.where(mask.unsqueeze(-1), tokens.x, float("nan")).requires_grad_()
    dirty = resample(tokens._replace(x=x), spacing)
    assert torch.equal(clean.x, dirty.x)
    dirty.x.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~mask].any()
    assert x.grad[mask].any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_different_spacing_are_resampled_each_by_itself(size, masked):
    axes = len(size)
    spacing = torch.tensor([[1.0, 2.0, 0.5][:axes], [0.7, 1.0, 1.0][:axes]])
    mask = torch.rand(2, *size) > 0.3 if masked else None
    tokens = image(*size, spacing=spacing, origin=torch.randn(2, axes), mask=mask)
    found = resample(tokens, (1.0,) * axes)
    for row in range(2):
        alone = Tokens(
            tokens.x[row : row + 1],
            Grid.create(size, spacing[row].tolist(), tokens.grid.origin[row].tolist()),
            None if mask is None else mask[row : row + 1],
        )
        alone = resample(alone, (1.0,) * axes)
        here = (row, *(slice(n) for n in alone.grid.shape))
        torch.testing.assert_close(found.x[here], alone.filled()[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.mask[here], torch.ones_like(found.mask[here]) if mask is None else alone.mask[0])
        assert found.mask[row].sum() == found.mask[here].sum()
        torch.testing.assert_close(found.grid.origin[row], alone.grid.origin[0])
        torch.testing.assert_close(found.grid.spacing.expand(2, -1)[row], alone.grid.spacing[0])


@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_sums_many_pixels(masked):
    mask = torch.ones(1, 256, 256, dtype=torch.bool) if masked else None
    tokens = Tokens(torch.full((1, 256, 256, 1), 1000.0).half(), Grid.create((256, 256), 1 / 30), mask)
    found = resample(tokens, (1.0, 1.0))
    assert found.x.dtype == torch.float16
    torch.testing.assert_close(found.x, torch.full_like(found.x, 1000.0))


def test_a_huge_pixel_is_the_mean_of_all():
    tokens = image(5, 7, spacing=1e-6)
    found = resample(tokens, (1.0, 1.0))
    torch.testing.assert_close(found.x[:, 0, 0], tokens.x.mean((1, 2)), rtol=0, atol=1e-5)  # a very wide triangle


def test_a_compiled_model_cannot_read_a_tensor():
    grid = Grid.create((4, 4), torch.tensor([[1.0, 2.0]]))
    assert spacing_rows(grid) == [(1.0, 2.0)]
    with pytest.raises(ValueError, match="spacing must be numbers"):
        spacing_rows(grid._replace(spacing=grid.spacing.to("meta")))


@pytest.mark.parametrize(("shape", "ratio"), [((23, 17), (0.37, 1.9)), ((9, 14, 11), (1.3, 0.5, 1.0))])
def test_a_part_of_the_result_is_made_of_a_part_of_the_image(shape, ratio):
    torch.manual_seed(0)
    x, mask = torch.randn(1, *shape, 2), torch.rand(1, *shape) > 0.5
    plan = Resampling.create(shape, ratio)
    for masked in (None, mask):
        whole, whole_mask = plan.apply(x, masked, Box.whole(shape), Box.whole(plan.size))
        for start in range(0, min(plan.size), 3):
            box = Box((start,) * len(shape), tuple(min(n, start + 4) for n in plan.size))
            source = plan.source(box)
            index = (slice(None), *source.slices)
            part, part_mask = plan.apply(x[index], None if masked is None else masked[index], source, box)
            assert torch.equal(part, whole[(slice(None), *box.slices)])
            assert masked is None or torch.equal(part_mask, whole_mask[(slice(None), *box.slices)])
