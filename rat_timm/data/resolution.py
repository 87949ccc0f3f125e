"""Samples at other pixel sizes, drawn at random: coarser by averages, finer with the noise that smaller pixels have.

Networks that are trained at a few pixel sizes are worse at those between (arXiv 2601.02198: up to 4 points in
pathology). Here a factor is drawn from a range, its logarithm uniformly, and the field of view stays:

```python
import torch

from rat_timm.data import Sample, resolution_transform

sample = Sample(torch.rand(1, 64, 64), torch.tensor([0.5, 0.5]), target=torch.zeros(64, 64, dtype=torch.long))
other = resolution_transform(factors=(0.5, 2.0))(sample)  # 128 to 32 pixels along each axis, of 0.25 to 1.0
assert other.target.shape == other.image.shape[1:]
```

What becomes coarser is averaged by the triangle filter, so that nothing is aliased; what becomes finer is interpolated,
and has no more detail than before. Both leave less noise than a detector of such pixels would have, which would give
the factor away: a detector's white noise has a variance that is inverse to the area of a pixel, or to its volume. What
lacks to that is added, as white noise.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors

from ..geometry.grid import Grid, Tokens
from ..geometry.resample import resample
from .samples import Sample, Target, Transform, check_sample, is_map
from .targets import check_target, from_corners, from_planes, to_corners, to_planes

_MEASURED = 2**16  # how many places the noise is measured at; the median of more is no better
_MAD = 0.6745  # the median of the absolute values of a normal distribution of variance 1


def resolution_transform(
    factors: tuple[float, float] = (0.5, 2.0), noise: float | None = None, p: float = 1.0
) -> Transform:
    """Returns a transform that resamples images or volumes, all axes alike, by a factor drawn log-uniformly.

    The lower corner and the spacing times the factor are exact; the field of view keeps its extent up to half a pixel.
    What is masked has no weight. Masks, and maps of whole numbers and bool, have the value of the nearest pixel; maps
    of floating-point numbers are resampled as the image is, without noise; boxes are scaled. Images come as float32,
    their numbers as they are. Chance is PyTorch's: seeding PyTorch repeats a transform.

    Args:
        factors: Least and largest factor of the pixel size; above 1 is coarser.
        noise: Standard deviation of the noise in the images, in their numbers; 0 adds none. Default: measured in each
            image and channel (`noise_level`).

        p: Probability that a sample is resampled. With ``factors=(1.0, 4.0)`` and a half, networks that are trained at
            one pixel size held at all others that were tried (``examples/resolution_study``).

    Raises:
        ValueError: If factors, noise or probability are not allowed.
    """
    return _AtRandomResolution(factors, noise, p)


def check_variation(factors: tuple[float, float], noise: float | None, p: float) -> None:
    """Raises ``ValueError`` unless factors, noise and probability are what `resolution_transform` allows."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be a probability, got {p}")
    if len(factors) != 2 or not 0 < factors[0] <= factors[1] < math.inf:
        raise ValueError(f"factors must be two positive numbers, the lesser first, got {factors}")
    if noise is not None and not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a standard deviation, not negative, or None, got {noise}")


def draw_factor(factors: tuple[float, float], p: float = 1.0) -> float:
    """Draws a factor log-uniformly with probability ``p``, else 1; chance is PyTorch's."""
    if p < 1 and float(torch.rand(())) >= p:
        return 1.0
    low, high = map(math.log, factors)
    return math.exp(low + (high - low) * float(torch.rand((), dtype=torch.float64)))


class _AtRandomResolution:
    """See `resolution_transform`."""

    def __init__(self, factors: tuple[float, float], noise: float | None, p: float) -> None:
        check_variation(factors, noise, p)
        self.factors, self.noise, self.p = factors, noise, p

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, sample.image.ndim - 1)
        check_target(sample.target, sample.image.shape[1:])
        factor = draw_factor(self.factors, self.p)
        return with_noise(lambda given: at_factor(given, factor), sample, self.noise)


def at_factor(sample: Sample, factor: float) -> Sample:
    """Resamples a sample to ``factor`` times its pixel size, without noise; see `resolution_transform`."""
    grid, axes, target = tuple(sample.image.shape[1:]), sample.image.ndim - 1, sample.target
    planes = to_planes(target, axes) if is_map(target, grid) else None
    numbers = planes.values if planes is not None and planes.labels is None else None
    channels = sample.image.float() if numbers is None else torch.cat((sample.image.float(), numbers))
    mask = None if sample.mask is None else sample.mask.expand(len(channels), *grid)
    steps = [step * factor for step in sample.spacing.tolist()]
    # channels as samples of one channel, which lie side by side in memory
    tokens = Tokens(channels.unsqueeze(-1), Grid.create(grid, sample.spacing.tolist()), mask)
    done = resample(tokens, steps).x.squeeze(-1)
    size = done.shape[1:]
    if sample.mask is not None:
        mask = _nearest(sample.mask, size, factor)
        done = done.where(mask, 0.0)
    if planes is not None:
        values = done[len(sample.image) :] if planes.labels is None else _nearest(planes.values, size, factor)
        target = from_planes(planes._replace(values=values), target, axes)
    elif isinstance(target, Mapping):
        target = _scaled_objects(target, grid, size, factor)
    spacing = torch.tensor(steps, dtype=sample.spacing.dtype)
    return Sample(done[: len(sample.image)], spacing, mask, target)


def _nearest(x: Tensor, size: Sequence[int], factor: float) -> Tensor:
    """Returns ``[..., *grid]`` at the centres of pixels ``factor`` times as large, ``[..., *size]``."""
    for axis, n in enumerate(size, start=x.ndim - len(size)):
        places = ((torch.arange(n, dtype=torch.float64) + 0.5) * factor).long()
        x = x.index_select(axis, places.clamp(max=x.shape[axis] - 1).to(x.device))
    return x


def _scaled_objects(target: Mapping[str, Tensor], grid: Sequence[int], size: Sequence[int], factor: float) -> Target:
    objects = to_corners(target, grid)
    boxes = objects["boxes"].as_subclass(Tensor) / factor
    objects["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size))
    if "masks" in target:
        objects["masks"] = tv_tensors.Mask(_nearest(target["masks"], size, factor))
    return from_corners(objects, target)


def with_noise(transform: Transform, sample: Sample, noise: float | None) -> Sample:
    """Transforms a sample, and adds what noise lacks to a variance that is inverse to the area of a pixel.

    Args:
        transform: Any that changes the pixel size. A channel of white noise goes through it with the image, and tells
            how much of a noise it leaves.
        sample: Before.
        noise: See `resolution_transform`.
    """
    image = sample.image.float()
    level = noise_level(image, sample.mask) if noise is None else image.new_full((len(image),), noise)
    if not bool((level > 0).any()):
        return transform(sample)
    probe = torch.randn_like(image[:1])
    done = transform(sample._replace(image=torch.cat((image, probe))))
    if torch.equal(done.spacing, sample.spacing):
        return done._replace(image=done.image[:-1])
    left = done.image[-1] if done.mask is None or not bool(done.mask.any()) else done.image[-1][done.mask]
    variance = (sample.spacing.double() / done.spacing.double()).prod() - left.double().square().mean()
    image = done.image[:-1]
    level = level.view(-1, *[1] * (image.ndim - 1)) * float(variance.clamp(min=0).sqrt())
    noisy = image + level * torch.randn_like(image)
    return done._replace(image=noisy if done.mask is None else noisy.where(done.mask, image))


def noise_level(image: Tensor, mask: Tensor | None = None) -> Tensor:
    """Measures white noise in an image: the median of its second differences along all axes, of which edges have few.

    Follows Immerkaer, Fast noise variance estimation (1996), with the median in place of the mean.

    Args:
        image: ``[C, *grid]``, floating-point.
        mask: ``[*grid]``, bool, True = valid.

    Returns:
        Standard deviations ``[C]``, taken along the axes of three pixels or more; zero where no three in a row are
        valid.
    """
    valid = torch.ones(image.shape[1:], dtype=torch.bool) if mask is None else mask
    axes = [axis for axis, n in enumerate(valid.shape) if n > 2]
    step = max(1, round((valid.numel() / _MEASURED) ** (1 / max(1, len(axes)))))
    for axis in axes:
        n = valid.shape[axis]
        parts = [slice(start, max(start, n - 2 + start), step) for start in range(3)]
        before, middle, after = (image[(slice(None), *[slice(None)] * axis, part)] for part in parts)
        image = before - 2 * middle + after
        before, middle, after = (valid[(*[slice(None)] * axis, part)] for part in parts)
        valid = before & middle & after
    places = image[:, valid].abs()
    if not axes or not places.numel():
        return image.new_zeros(len(image))
    return places.median(dim=1).values / _MAD / 6 ** (len(axes) / 2)
