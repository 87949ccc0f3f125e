"""Crops of large images with overviews around them, read from the levels that a file has.

A crop shows detail, an overview around it shows what the crop is part of. Models take both as a pyramid, each with its
own spacing and origin, so that both are seen where they are:

```python
import numpy as np

from rat_timm.data import Crop, collate_crops, crop_levels, levels_of

levels = levels_of(np.random.rand(1, 256, 192), spacing=(0.5, 0.5), factors=(1, 4))  # or read_levels("slide.ome.zarr")
crop = crop_levels(levels, center=(20.0, 30.0), size=(64, 64), spacings=(0.5, 2.0))
batch = collate_crops([crop, crop])
# model(batch.image, spacing=batch.spacing, mask=batch.mask, origin=batch.origin)
```

Nothing is resampled when a crop is cut: each level of it has pixels that are stored, at their own spacing and origin,
and is masked where it leaves the image.
"""

import functools
import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry.grid import Grid, Tokens
from ..geometry.resample import resample
from .readers import MAX_BYTES, read, read_grids
from .samples import Target

if TYPE_CHECKING:
    import zarr

_ROUNDING = 1e-6  # by which a level may be coarser than what is asked for


class Level(NamedTuple):
    """One level of an image whose pixels are read in parts.

    Attributes:
        grid: Where its pixels are; one row.
        read: Returns the pixels ``[channels, *size]`` of a region, one slice per axis within the grid.
    """

    grid: Grid
    read: Callable[[Sequence[slice]], Tensor]


class Crop(NamedTuple):
    """A pyramid cut out of an image, finest first: detail, and overviews around it.

    Attributes:
        image: ``[channels, *size]`` of each level, zero outside the image.
        spacing: ``[axes]`` of each level, float64, in array-axis order (z, y, x).
        origin: ``[axes]`` of each level, float64: the position of the first pixel's centre.
        mask: ``[*size]`` of each level, bool, True = valid: where the image is.
        target: What is to be learned.
    """

    image: list[Tensor]
    spacing: list[Tensor]
    origin: list[Tensor]
    mask: list[Tensor]
    target: Target = None


class CropBatch(NamedTuple):
    """Crops side by side; ``model(batch.image, spacing=batch.spacing, mask=batch.mask, origin=batch.origin)``.

    Attributes:
        image: ``[B, channels, *size]`` of each level.
        spacing: ``[B, axes]`` of each level.
        mask: ``[B, *size]`` of each level, bool, True = valid; None if all of it is.
        origin: ``[B, axes]`` of each level.
        target: ``[B, ...]``; None if there are none.
    """

    image: list[Tensor]
    spacing: list[Tensor]
    mask: list[Tensor | None]
    origin: list[Tensor]
    target: Tensor | None


def read_levels(
    source: "str | PathLike | zarr.Group",
    unit: str = "um",
    *,
    image: int | None = None,
    time: int | None = None,
    assumed_unit: str | None = None,
    format: str | None = None,
    max_bytes: int | None = MAX_BYTES,
    spacing: Sequence[float] | None = None,
) -> list[Level]:
    """Opens the levels of an image, finest first; pixels are read when a region is, and no others.

    The keywords are those of `rat_timm.data.read`, which reads the regions; ``max_bytes`` is the limit of one region,
    and ``spacing`` level 0's pixel size (`rat_timm.data.read_grids`).

    Raises:
        ReadError: If metadata cannot be read, or make no sense; errors of pixels come when they are read.
    """
    grids = read_grids(source, unit, image=image, assumed_unit=assumed_unit, format=format, spacing=spacing)
    options = {"image": image, "time": time, "assumed_unit": assumed_unit, "format": format, "max_bytes": max_bytes}
    parts = [
        functools.partial(_read_region, source, unit, level, options | {"spacing": grid.numbers.spacing})
        for level, grid in enumerate(grids)
    ]
    return sorted(map(Level, grids, parts), key=lambda level: float(level.grid.spacing.prod()))


def _read_region(source: Any, unit: str, level: int, options: dict[str, Any], region: Sequence[slice]) -> Tensor:
    return read(source, unit, level=level, region=region, **options).pixels


def levels_of(pixels: Tensor | np.ndarray, spacing: Sequence[float], factors: Sequence[float] = (1, 4)) -> list[Level]:
    """Makes the levels of an image in memory, averaged without aliasing; their outer corner is at zero.

    Args:
        pixels: ``[channels, *grid]``; levels come as float32.
        spacing: Of its pixels, one value per axis.
        factors: By how much each level's pixels are larger, all axes alike.

    Raises:
        ValueError: If a factor is below 1.
    """
    if not factors or min(factors) < 1:
        raise ValueError(f"factors must be numbers of at least 1, got {tuple(factors)}")
    tokens = Tokens(torch.as_tensor(pixels).float().movedim(0, -1)[None], Grid.create(pixels.shape[1:], spacing))
    made = [tokens if factor == 1 else resample(tokens, [s * factor for s in spacing]) for factor in sorted(factors)]
    return [Level(level.grid, functools.partial(_slice, level.x[0].movedim(-1, 0))) for level in made]


def _slice(pixels: Tensor, region: Sequence[slice]) -> Tensor:
    return pixels[(slice(None), *region)]


def crop_levels(
    levels: Sequence[Level], center: Sequence[float], size: Sequence[int], spacings: Sequence[float | Sequence[float]]
) -> Crop:
    """Cuts a pyramid out of an image, around one point.

    Args:
        levels: From `read_levels` or `levels_of`.
        center: Physical position (z, y, x) around which all levels are cut, up to half of one of their pixels.
        size: Pixels of each level along each axis.
        spacings: The pixel size wanted of each, one number or one per axis: taken is the coarsest level whose pixels
            are not larger, or the finest if there is none, with its own pixels and its own spacing.

    Raises:
        ValueError: If numbers of axes differ, or a level of the crop has no pixel in the image.
    """
    axes = len(levels[0].grid.shape)
    for name, value in (("center", center), ("size", size)):
        if len(value) != axes:
            raise ValueError(f"{name} must have {axes} values, one per axis, got {tuple(value)}")
    cut = [_cut(closest_level(levels, wanted), center, size) for wanted in spacings]
    return Crop(*map(list, zip(*cut, strict=True)))


def closest_level(levels: Sequence[Level], wanted: float | Sequence[float]) -> Level:
    """Returns the coarsest level that is as fine as what is wanted along all axes."""
    limit = torch.as_tensor(wanted, dtype=torch.float64) * (1 + _ROUNDING)
    fine = [level for level in levels if bool((level.grid.spacing[0] <= limit).all())]
    return max(fine or levels[:1], key=lambda level: float(level.grid.spacing.prod()))


def _cut(level: Level, center: Sequence[float], size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns pixels, spacing, origin and mask of a part of a level."""
    grid, middle = level.grid, torch.tensor(list(center), dtype=torch.float64)
    first = (middle - grid.origin[0]) / grid.spacing[0] - (torch.tensor(list(size)) - 1) / 2
    starts = [math.floor(float(at) + 0.5) for at in first]
    inside = [slice(max(s, 0), min(s + n, most)) for s, n, most in zip(starts, size, grid.shape, strict=True)]
    if any(part.start >= part.stop for part in inside):
        raise ValueError(f"center must be such that each level shows some of the image, got {tuple(center)}")
    pixels = level.read(inside)
    there = tuple(slice(p.start - s, p.stop - s) for p, s in zip(inside, starts, strict=True))
    image, mask = pixels.new_zeros(len(pixels), *size), torch.zeros(*size, dtype=torch.bool)
    image[(slice(None), *there)] = pixels
    mask[there] = True
    return image, grid.spacing[0], grid.origin[0] + torch.tensor(starts) * grid.spacing[0], mask


def collate_crops(crops: Sequence[Crop]) -> CropBatch:
    """Makes a batch of crops, which have as many levels of the same sizes; a ``collate_fn`` for data loaders.

    Raises:
        ValueError: If they differ in that, or only some have a target.
    """
    shapes = {tuple(tuple(level.shape) for level in crop.image) for crop in crops}
    if len(shapes) != 1:
        raise ValueError(f"crops must have the same levels, got {sorted(shapes)}")
    image, spacing, origin, mask = (
        [torch.stack(level) for level in zip(*parts, strict=True)]
        for parts in zip(*(crop[:4] for crop in crops), strict=True)
    )
    targets = [crop.target for crop in crops]
    missing = sum(target is None for target in targets)
    if missing not in (0, len(targets)):
        raise ValueError(f"crops must all have a target, or none, got {missing} of {len(targets)} without")
    target = None if missing else torch.stack([torch.as_tensor(t) for t in targets])
    return CropBatch(image, spacing, [None if level.all() else level for level in mask], origin, target)
