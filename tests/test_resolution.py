"""`rat_timm.data.resolution`: what is where after resampling, and how noisy it is."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import tv_tensors

from rat_timm.data import Sample, resolution_transform, training_transform
from rat_timm.data.resolution import at_factor, draw_factor, noise_level

GRIDS = {2: (24, 37), 3: (12, 18, 25)}
STEPS = {2: (0.5, 0.25), 3: (2.0, 0.5, 0.25)}


def ramps(axes):
    """Channels hold the physical position along each axis; a block is masked and holds no numbers."""
    along = [(torch.arange(n) + 0.5) * s for n, s in zip(GRIDS[axes], STEPS[axes], strict=True)]
    image = torch.stack(torch.meshgrid(*along, indexing="ij"))
    mask = torch.ones(GRIDS[axes], dtype=torch.bool)
    mask[..., :7] = False
    return Sample(image.where(mask, torch.nan), torch.tensor(STEPS[axes]), mask)


def centres(size, spacing):
    """The physical positions of pixels from one corner, ``[axes, *size]``, float64."""
    along = [(np.arange(n) + 0.5) * s for n, s in zip(size, spacing, strict=True)]
    return np.stack(np.meshgrid(*along, indexing="ij"))


def slowly(image, mask, size, factor):
    """Weighs valid pixels by triangles as wide as the wider of the old and the new pixels, in float64."""
    x, weight = np.where(mask, image, 0).astype(np.float64), mask.astype(np.float64)
    for axis, n in enumerate(size):
        centre = (np.arange(n)[:, None] + 0.5) * factor - 0.5
        triangle = np.maximum(0, 1 - np.abs(np.arange(mask.shape[axis]) - centre) / max(1, factor))
        x = np.moveaxis(np.tensordot(triangle, x, (1, axis + 1)), 0, axis + 1)
        weight = np.moveaxis(np.tensordot(triangle, weight, (1, axis)), 0, axis)
    return x / np.where(weight > 0, weight, 1)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("factor", [0.37, 0.8, 1.0, 1.3, 2.0, 3.7])
def test_everything_stays_where_it_is(axes, factor):
    """Positions, which linear filters keep, tell where image, map and label of each new pixel come from."""
    sample, steps = ramps(axes), np.array(STEPS[axes])
    labels = 2**40 + torch.arange(math.prod(GRIDS[axes])).reshape(GRIDS[axes])
    done = at_factor(sample._replace(target=labels), factor)
    numbers = at_factor(sample._replace(target=sample.image.double()), factor)
    size = tuple(max(1, round(n / factor)) for n in GRIDS[axes])
    assert done.image.shape[1:] == done.mask.shape == done.target.shape == size
    assert done.spacing.tolist() == pytest.approx((steps * factor).tolist(), rel=1e-6)
    where = centres(size, steps * factor)
    expected = np.stack(np.unravel_index((done.target - 2**40).numpy(), GRIDS[axes]))
    off = np.abs((expected + 0.5) * steps.reshape(-1, *[1] * axes) - where) / steps.reshape(-1, *[1] * axes)
    assert off.max() <= 0.5 + 1e-6
    assert torch.equal(done.mask, torch.from_numpy(expected[-1] >= 7))  # a label's mask is its own pixel's
    valid, size = done.mask.numpy(), done.mask.shape
    expected = slowly(sample.image.numpy(), sample.mask.numpy(), size, factor)
    np.testing.assert_allclose(done.image.numpy()[:, valid], expected[:, valid], rtol=1e-5, atol=1e-5)
    inner = where[-1] > (7 + 1 + factor) * steps[-1]  # else filters reach over the mask's border, or the image's
    for axis, step in enumerate(steps):
        middle = GRIDS[axes][axis] * step / 2
        inner &= np.abs(where[axis] - middle) < middle - factor * step - step
    off = np.abs(done.image.numpy()[:, inner] - where[:, inner]).max(axis=1)
    assert (off <= 0.15 * steps).all()  # between pixels the triangle's taps are not quite even
    assert numbers.target.dtype == torch.float64
    assert torch.equal(numbers.target.float(), done.image)
    assert done.image.isfinite().all()
    assert not done.image[:, ~done.mask].any()


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_labels_are_never_blended(axes, dtype):
    chance = torch.Generator().manual_seed(0)
    labels = (torch.randint(0, 2, GRIDS[axes], generator=chance) * 100).to(dtype)
    for factor in (0.6, 1.7):
        done = at_factor(ramps(axes)._replace(target=labels[None]), factor).target
        assert done.dtype == dtype
        assert done.shape == (1, *(round(n / factor) for n in GRIDS[axes]))
        assert set(done.unique().tolist()) == set(labels.unique().tolist())


def test_coarser_is_averaged():
    """A pattern finer than the new pixels leaves its mean, also at a valid border."""
    image = torch.ones(1, 32, 32)
    image[:, ::2] = -1
    done = at_factor(Sample(image, torch.ones(2)), 4.0)
    torch.testing.assert_close(done.image[:, 1:-1], torch.zeros(1, 6, 8))


def test_boxes_and_masks_of_objects_are_scaled():
    masks = torch.zeros(2, 24, 37, dtype=torch.bool)
    masks[0, 4:16, 10:30] = True
    masks[1, 0, 0] = True
    target = {"boxes": torch.tensor([[10.0, 4, 30, 16], [0, 0, 1, 1]]), "labels": torch.tensor([5, 6]), "masks": masks}
    done = at_factor(ramps(2)._replace(target=target), 2.0).target
    assert done["boxes"].tolist() == [[5.0, 2.0, 15.0, 8.0]]
    assert done["labels"].tolist() == [5]  # the other one has less than a pixel
    y, x = done["masks"][0].nonzero().T
    assert (y.min(), y.max(), x.min(), x.max()) == (2, 7, 5, 14)
    boxes = tv_tensors.BoundingBoxes([[18.0, 12.0, 12.0, 8.0]], format="CXCYWH", canvas_size=GRIDS[2])
    finer = at_factor(ramps(2)._replace(target={"boxes": boxes}), 0.5).target["boxes"]
    assert finer.tolist() == [[36.0, 24.0, 24.0, 16.0]]
    assert (finer.format, finer.canvas_size) == (boxes.format, (48, 74))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("factor", [0.5, 0.71, 1.4, 2.0])
def test_noise_per_area_does_not_give_the_factor_away(axes, factor):
    """A detector's white noise: variance inverse to the area, in each channel, and none between neighbours."""
    torch.manual_seed(0)
    grid = {2: (160, 150), 3: (40, 44, 36)}[axes]
    levels = torch.tensor([0.5, 3.0]).view(2, *[1] * axes)
    sample = Sample(levels * torch.randn(2, *grid), torch.ones(axes))
    alone = at_factor(sample, factor).image
    for noise in (None, 3.0):
        done = resolution_transform((factor, factor), noise)(sample).image
        expected = torch.tensor([0.5, 3.0]) * factor ** (-axes / 2)
        measured = done.flatten(1).std(dim=1)
        last = slice(1, None) if noise else slice(None)  # the level that was given is that of one channel
        torch.testing.assert_close(measured[last], expected[last], rtol=0.05, atol=0)
        assert alone[1].std() < 0.9 * expected[1]  # the defect without


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_random_crops_have_the_noise_of_their_pixels(axes, factor):
    torch.manual_seed(1)
    size = {2: (64, 64), 3: (24, 24, 24)}[axes]
    sample = Sample(torch.randn(1, *[2 * n for n in size]), torch.full((axes,), 0.5))
    transform = training_transform(size, scale=(1.0, 1.0), factors=(factor, factor))
    for _ in range(3):
        done = transform(sample)
        assert done.image.shape == (1, *(round(n / factor) for n in size))
        expected = float((sample.spacing / done.spacing).prod().sqrt())
        assert float(done.image.std()) == pytest.approx(expected, rel=0.06)


def test_no_noise_where_there_is_none():
    torch.manual_seed(0)
    image = torch.zeros(1, 40, 40)
    image[:, 10:30, 12:31] = 1
    for noise in (None, 0.0):
        done = resolution_transform((0.4, 3.0), noise)(Sample(image, torch.ones(2)))
        factor = float(done.spacing[0])
        torch.testing.assert_close(done.image, at_factor(Sample(image, torch.ones(2)), factor).image)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("level", [0.0, 0.2, 5.0])
def test_the_noise_is_measured(axes, level):
    chance = torch.Generator().manual_seed(0)
    grid = {2: (600, 700), 3: (70, 80, 90)}[axes]
    along = torch.meshgrid(*[torch.linspace(0, 6, n) for n in grid], indexing="ij")
    smooth = sum(part.sin() for part in along)
    smooth = smooth + 10 * (along[0] > 3)  # an edge
    image = torch.stack([smooth + level * torch.randn(grid, generator=chance), smooth])
    mask = along[-1] < 4
    noisy = image.where(mask, torch.nan)
    for measured in (noise_level(image), noise_level(noisy, mask)):
        assert float(measured[0]) == pytest.approx(level, rel=0.03, abs=0.002)
        assert float(measured[1]) == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (1, 9), (3, 3), (1, 2, 3)])
def test_the_noise_of_few_pixels(shape):
    level = noise_level(torch.randn(2, *shape))
    assert level.shape == (2,)
    assert bool((level > 0).all()) == (max(shape) > 2)
    assert noise_level(torch.randn(2, *shape), torch.zeros(shape, dtype=torch.bool)).tolist() == [0, 0]


def test_factors_are_drawn_log_uniformly():
    torch.manual_seed(0)
    drawn = np.log([draw_factor((0.25, 2.0)) for _ in range(2000)])
    uniform = stats.uniform(math.log(0.25), math.log(8.0))
    assert stats.kstest(drawn, uniform.cdf).pvalue > 0.01
    assert math.log(0.25) <= drawn.min() < drawn.max() <= math.log(2.0)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", ["alone", "crop"])
def test_seeding_repeats_it(axes, kind):
    size = (16, 12, 14)[:axes]
    transform = resolution_transform() if kind == "alone" else training_transform(size, factors=(0.5, 2.0))
    transform = pickle.loads(pickle.dumps(transform))  # as workers get it
    sample = Sample(torch.randn(1, *GRIDS[axes]), torch.tensor(STEPS[axes]), target=torch.ones(GRIDS[axes]))

    def draw(seed):
        torch.manual_seed(seed)
        return transform(sample)

    first, again = draw(3), draw(3)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.spacing, again.spacing)
    assert first.target.shape == first.image.shape[1:]
    assert len({draw(seed).image.shape for seed in range(6)}) > 3
    assert all(draw(seed).mask is None for seed in range(3))


def test_some_samples_stay_as_they_are():
    sample = Sample(torch.rand(1, 32, 32), torch.tensor([0.5, 0.5]))
    torch.manual_seed(0)
    for transform in (
        resolution_transform((2.0, 2.0), p=0.25),
        training_transform((32, 32), (1.0, 1.0), False, (2.0, 2.0), p=0.25),
    ):
        done = [transform(sample) for _ in range(400)]
        same = [each for each in done if each.spacing.tolist() == [0.5, 0.5]]
        assert 0.69 < len(same) / 400 < 0.81  # 0.75 and 2.8 deviations
        assert all(each.spacing.tolist() == [1.0, 1.0] for each in done if each.image.shape != sample.image.shape)
        assert all(torch.allclose(each.image, sample.image, atol=1e-6) for each in same)
    with pytest.raises(ValueError, match="p must be a probability"):
        resolution_transform(p=1.5)
    with pytest.raises(ValueError, match="noise and p go with factors"):
        training_transform((8, 8), p=0.5)


@pytest.mark.parametrize("factors", [(0, 1), (2, 1), (1, math.inf), (1,), (-1, 2)])
def test_factors_that_are_not_allowed(factors):
    for make in (resolution_transform, lambda given: training_transform((8, 8), factors=given)):
        with pytest.raises(ValueError, match="factors must be two positive numbers"):
            make(factors)


def test_what_does_not_fit():
    for noise in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise must be a standard deviation"):
            resolution_transform(noise=noise)
    with pytest.raises(ValueError, match="noise and p go with factors"):
        training_transform((8, 8), noise=0.1)
    sample = ramps(2)
    with pytest.raises(ValueError, match="mask must be bool"):
        resolution_transform()(sample._replace(mask=sample.mask.float()))
    with pytest.raises(ValueError, match="target must be a map of the image's size"):
        resolution_transform()(sample._replace(target=torch.zeros(3, 4)))
    assert resolution_transform()(sample._replace(target=7)).target == 7
