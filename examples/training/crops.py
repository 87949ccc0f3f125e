"""Crops of labelled images, with overviews around them, and batches of these."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rat_timm.data import Batch, Sample, collate, resolution_transform
from rat_timm.data.resolution import check_variation, draw_factor
from rat_timm.data.samples import Target
from rat_timm.geometry.grid import Grid
from training.config import Config
from training.data import seeded

TargetOf = Callable[[Sample], Target]


class Level(NamedTuple):
    """An image of a pyramid, and where it is.

    Attributes:
        sample: The image.
        origin: Position of its first pixel's centre ``[axes]``, from the corner of the whole image.
    """

    sample: Sample
    origin: Tensor


class Scenes(NamedTuple):
    """Pyramids side by side, whose first levels have targets.

    Attributes:
        levels: A batch for each level.
        origins: ``[B, axes]`` for each level.
        out: The places that are asked for. Default: the first level's pixels.
    """

    levels: list[Batch]
    origins: list[Tensor]
    out: Grid | None = None

    @property
    def spacing(self) -> Tensor:
        """Of the first level."""
        return self.levels[0].spacing

    @property
    def target(self) -> Any:
        """Of the first level."""
        return self.levels[0].target

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Scenes":
        """Moves it to a device."""
        levels = [batch.to(device, non_blocking) for batch in self.levels]
        return self._replace(levels=levels, origins=[origin.to(device) for origin in self.origins])

    def told(self) -> dict[str, Any]:
        """Returns what a `rat_timm.dense.Segmenter` is called with, ``x`` among it."""
        images, spacings, masks = zip(*(batch[:3] for batch in self.levels), strict=True)
        if any(mask is not None for mask in masks):
            masks = [_valid(image) if mask is None else mask for image, mask in zip(images, masks, strict=True)]
        told = {"spacing": list(spacings), "mask": list(masks), "origin": self.origins}
        if len(images) == 1:
            told = {name: values[0] for name, values in told.items()}
        elif masks[0] is None:
            told["mask"] = None
        return {"x": list(images) if len(images) > 1 else images[0], "out": self.out, **told}


def _valid(image: Tensor) -> Tensor:
    return image.new_ones(len(image), *image.shape[2:], dtype=torch.bool)


def collate_scenes(scenes: Sequence[Sequence[Level]]) -> Scenes:
    """Makes a batch of pyramids; see `rat_timm.data.collate`."""
    levels = list(zip(*scenes, strict=True))
    return Scenes(
        [collate([level.sample for level in same]) for same in levels],
        [torch.stack([level.origin for level in same]) for same in levels],
    )


class Box(NamedTuple):
    """Some pixels of an image, in which some axes run the other way.

    Attributes:
        start: First pixel along each axis.
        stop: Behind the last one.
        flipped: Axes that run the other way; ``start`` and ``stop`` count from what is then the first pixel.
    """

    start: list[int]
    stop: list[int]
    flipped: tuple[int, ...] = ()

    def cut(self, frame: Sample) -> Sample:
        """Returns these pixels of an image and of its mask and labels."""
        size = frame.image.shape[1:]
        slices = []
        for axis, (start, stop, n) in enumerate(zip(self.start, self.stop, size, strict=True)):
            slices.append(slice(n - stop, n - start) if axis in self.flipped else slice(start, stop))
        axes = [axis - len(size) for axis in self.flipped]
        image, mask, target = (
            None if x is None else x[(..., *slices)].flip(axes) for x in (frame.image, frame.mask, frame.target)
        )
        return Sample(image, frame.spacing, mask, target)


def at_pixel_size(frame: Sample, box: Box, factor: float, noise: float | None = 0.0) -> Level:
    """Cuts a box and resamples it to ``factor`` times the pixel size; noise as in `resolution_transform`."""
    cut = box.cut(frame)
    sample = cut if factor == 1 else resolution_transform((factor, factor), noise)(cut)
    return Level(sample, torch.tensor(box.start) * frame.spacing + sample.spacing / 2)


def overview(frame: Sample, box: Box, level: float, factor: float) -> Level:
    """Returns what lies around a box, ``level`` times as wide as far as the image reaches, and as much coarser.

    Args:
        frame: The whole image.
        box: The crop.
        level: How much wider.
        factor: That of the crop's own pixel size.
    """
    wider = []
    for start, stop, n in zip(box.start, box.stop, frame.image.shape[1:], strict=True):
        middle, reach = (start + stop) / 2, level * (stop - start) / 2
        wider.append((max(0, math.floor(middle - reach)), min(n, math.ceil(middle + reach))))
    starts, stops = zip(*wider, strict=True)
    around = Box(list(starts), list(stops), box.flipped)
    return at_pixel_size(frame._replace(target=None), around, level * factor)


def bent(level: Level, exponent: float) -> Level:
    """Raises intensities to a power, between their least and their largest."""
    from monai.transforms import AdjustContrast  # takes seconds

    image = AdjustContrast(exponent)(level.sample.image).as_tensor()
    return level._replace(sample=level.sample._replace(image=image))


class Crops(Dataset):
    """Random crops of whole images; chance follows from the seed, the epoch and the crop alone.

    Args:
        frames: Whole images with labels.
        size: Pixels of a crop along each axis; where an image has fewer, all of them.
        target: Makes the target of a crop with its labels.
        config: Says the rest.
    """

    def __init__(self, frames: Dataset, size: Sequence[int], target: TargetOf, config: Config) -> None:
        self.frames, self.size, self.target, self.epoch = frames, list(size), target, 0
        self.seed, self.count, self.levels = config.seed, config.crops, config.levels
        self.factors, self.p, self.flip = config.factors or (1.0, 1.0), config.p_factors, config.flip
        self.foreground, self.gamma = config.foreground, config.gamma
        check_variation(self.factors, None, self.p)

    def __len__(self) -> int:
        return len(self.frames) * self.count

    def __getitem__(self, index: int) -> list[Level]:
        frame = self.frames[index // self.count]
        with seeded(self.seed, self.epoch, index):
            factor = draw_factor(self.factors, self.p)
            box = self._box(frame, factor)
            first = at_pixel_size(frame, box, factor, noise=None)
            bend = self.gamma ** float(torch.empty(()).uniform_(-1, 1))
        first = first._replace(sample=self._trimmed(first.sample))
        first = first._replace(sample=first.sample._replace(target=self.target(first.sample)))
        levels = [first, *(overview(frame, box, level, factor) for level in self.levels[1:])]
        return levels if self.gamma == 1 else [bent(level, bend) for level in levels]

    def _box(self, frame: Sample, factor: float) -> Box:
        grid = frame.image.shape[1:]
        if len(grid) != len(self.size):
            raise ValueError(f"size must be {len(grid)} numbers, one per axis of the images, got {self.size}")
        extent = [min(n, math.ceil(size * factor)) for n, size in zip(grid, self.size, strict=True)]
        flips = torch.rand(len(grid)) < 0.5
        flipped = tuple(axis for axis in range(len(grid)) if self.flip and flips[axis])
        bounds = [(0, n - size) for n, size in zip(grid, extent, strict=True)]  # of the first pixel
        if float(torch.rand(())) < self.foreground:
            bounds = self._around_label(frame.target, extent, bounds, flipped)
        start = [int(torch.randint(low, high + 1, ())) for low, high in bounds]
        return Box(start, [a + size for a, size in zip(start, extent, strict=True)], flipped)

    def _around_label(
        self, labels: Tensor, extent: Sequence[int], bounds: Sequence[tuple[int, int]], flipped: Sequence[int]
    ) -> Sequence[tuple[int, int]]:
        """Narrows the bounds of a box's first pixel to those with which it has a labelled pixel, drawn at random."""
        labelled = (labels > 0).flatten().nonzero()[:, 0]
        if not len(labelled):
            return bounds
        drawn = labelled[torch.randint(len(labelled), ())]
        narrowed = []
        for axis, place in enumerate(torch.unravel_index(drawn, labels.shape)):
            at = labels.shape[axis] - 1 - int(place) if axis in flipped else int(place)
            low, high = bounds[axis]
            narrowed.append((max(low, at - extent[axis] + 1), min(high, at)))
        return narrowed

    def _trimmed(self, sample: Sample) -> Sample:
        """Removes what rounding of a crop's extent gives it too much."""
        size = [min(n, size) for n, size in zip(sample.image.shape[1:], self.size, strict=True)]
        return sample if size == list(sample.image.shape[1:]) else Box([0] * len(size), size).cut(sample)


class Wholes(Dataset):
    """Whole images with their labels as scenes, with overviews of all of them.

    Args:
        frames: Whole images with labels.
        levels: See `Config`.
    """

    def __init__(self, frames: Dataset, levels: Sequence[float]) -> None:
        self.frames, self.levels = frames, levels

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> list[Level]:
        return whole(self.frames[index], self.levels)


def whole(frame: Sample, levels: Sequence[float]) -> list[Level]:
    """Returns an image as a scene: all of it, and all of it coarser."""
    size = list(frame.image.shape[1:])
    box = Box([0] * len(size), size)
    return [at_pixel_size(frame, box, 1), *(overview(frame, box, level, 1) for level in levels[1:])]
