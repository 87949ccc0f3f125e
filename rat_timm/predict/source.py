"""Images as prediction reads them: any part of one, at any pixel size, with its mask."""

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..data.pyramid import Level, closest_level, read_levels
from ..geometry.box import Box, part_of
from ..geometry.grid import Grid, Tokens, pyramid_grids
from ..geometry.resample import Resampling

ImageLike: TypeAlias = str | PathLike | Sequence[Level]
"""A file or folder that `rat_timm.data.read` reads, or the levels of an image (`rat_timm.data.levels_of`)."""

_SAME = 1e-6  # how near 1 a ratio of pixel sizes is taken for 1


class Masked(NamedTuple):
    """A level of an image and what is valid of it.

    Attributes:
        level: Its pixels.
        mask: An image of one channel that is not zero where pixels are valid, of any pixel size: a pixel's centre
            decides, and what lies outside of it is not valid. None if all pixels are.
        intensities: Pixel values that become 0 and 1; None for pixels as they are.
        dtype: In which pixels are read.
    """

    level: Level
    mask: Level | None = None
    intensities: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> Grid:
        """Where the pixels are."""
        return self.level.grid

    def read(self, box: Box) -> Tokens:
        """Reads a part of the image, ``[1, *box, C]``."""
        grid = part_of(self.grid, box)
        pixels = self.level.read(box.slices).to(self.dtype).movedim(0, -1)[None]
        if self.intensities is not None:
            low, high = self.intensities
            pixels = (pixels - low) / (high - low)
        return Tokens(pixels, grid, self.valid(grid))

    def valid(self, grid: Grid) -> Tensor | None:
        """Returns which places of a grid are valid, ``[1, *grid]``; None if all are."""
        if self.mask is None:
            return None
        there = self.mask.grid
        index, inside = [], []
        for axis, n in enumerate(grid.shape):
            at = grid.origin[0, axis] + torch.arange(n, dtype=torch.float64) * grid.spacing[0, axis]
            place = ((at - there.corners()[0][0, axis]) / there.spacing[0, axis] + _SAME).floor().long()
            inside.append((place >= 0) & (place < there.shape[axis]))
            index.append(place.clamp(0, there.shape[axis] - 1))
        box = Box(tuple(int(i.min()) for i in index), tuple(int(i.max()) + 1 for i in index))
        valid = self.mask.read(box.slices)[0] != 0
        for axis, (places, here) in enumerate(zip(index, inside, strict=True)):
            shape = [-1 if other == axis else 1 for other in range(len(index))]
            valid = valid.index_select(axis, places - box.start[axis]) & here.view(shape)
        return valid[None]


class Scaled(NamedTuple):
    """An image at another pixel size, of which parts are read.

    Attributes:
        image: The image.
        plan: How its pixels become those of the other size; None if they are the same.
        grid: Where the pixels are.
    """

    image: Masked
    plan: Resampling | None
    grid: Grid

    @classmethod
    def at(cls, image: Masked, spacing: Sequence[float]) -> "Scaled":
        """Plans an image at a pixel size."""
        return cls(image, *rescaling(image.grid, spacing))

    def source(self, box: Box) -> Box:
        """Returns the pixels of the image that a part is made of."""
        return box if self.plan is None else self.plan.source(box)

    def read(self, box: Box) -> tuple[Tokens, Tokens]:
        """Reads a part.

        Returns:
            The part at this pixel size, and the pixels of the image that it is made of, both ``[1, *size, C]``.
        """
        source = self.source(box)
        pixels = self.image.read(source)
        if self.plan is None:
            return pixels, pixels
        x, valid = self.plan.apply(pixels.x, pixels.mask, source, box)
        return Tokens(x, part_of(self.grid, box), valid), pixels

    def read_in_slabs(self, pixels: int) -> Tokens:
        """Reads all of it, a slab of at most so many pixels of the image at a time."""
        shape = self.grid.shape
        per_place = max(1, self.image.grid.shape[0] // shape[0])
        plane = max(1, Box.whole(self.image.grid.shape).size // self.image.grid.shape[0])
        count = max(1, pixels // (plane * per_place))
        slabs = []
        for start in range(0, shape[0], count):
            box = Box((start, *[0] * (len(shape) - 1)), (min(start + count, shape[0]), *shape[1:]))
            slabs.append(self.read(box)[0])
        masks = [slab.mask for slab in slabs if slab.mask is not None]
        return Tokens(torch.cat([slab.x for slab in slabs], dim=1), self.grid, torch.cat(masks, 1) if masks else None)


def rescaling(grid: Grid, spacing: Sequence[float]) -> tuple[Resampling | None, Grid]:
    """Returns how an image comes to a pixel size, None if it has it, and where its pixels are then."""
    ratio = [step / new for step, new in zip(grid.spacing[0].tolist(), spacing, strict=True)]
    if all(abs(r - 1) < _SAME for r in ratio):
        return None, grid
    plan = Resampling.create(grid.shape, ratio)
    return plan, plan.grid(grid, tuple(spacing))


def open_levels(
    image: ImageLike,
    unit: str,
    spacing: Sequence[float] | None = None,
    time: int | None = None,
    assumed_unit: str | None = None,
) -> list[Level]:
    """Opens the levels of an image, finest first."""
    if isinstance(image, str | PathLike):
        place = os.path.abspath(image) if Path(image).exists() else image  # workers may begin in another folder
        return read_levels(place, unit, time=time, assumed_unit=assumed_unit, spacing=spacing)
    levels = list(image)
    if spacing is None:
        return levels
    grids = pyramid_grids([level.grid.shape for level in levels], tuple(spacing), reference=spacing)
    return [Level(grid, level.read) for grid, level in zip(grids, levels, strict=True)]


def overview(levels: Sequence[Level], image: Masked, spacing: Sequence[float]) -> Scaled:
    """Plans the whole field at a coarse pixel size, from the coarsest level that is not coarser."""
    return Scaled.at(image._replace(level=closest_level(levels, list(spacing))), spacing)
