"""What of a scene a network is shown: a crop, an overview around it, others that were not in training."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from context_study.tasks import Scenes, Task
from rat_timm import Grid

NOISE = 0.05  # standard deviation, per pixel of whatever size
MIDDLE, SCALE = 0.35, 0.25  # of what becomes 0, and of what becomes 1 beyond that
POOLS = {2: F.avg_pool2d, 3: F.avg_pool3d}


class Level(NamedTuple):
    """An image and where it is.

    Attributes:
        image: ``[B, 1, *size]``.
        spacing: Size of a pixel, per axis.
        origin: Position of the first pixel's centre, ``[B, axes]``.
        mask: ``[B, *size]``, True = valid; None if all are.
    """

    image: Tensor
    spacing: tuple[float, ...]
    origin: Tensor
    mask: Tensor | None = None

    @property
    def grid(self) -> Grid:
        """Where its pixels are."""
        return Grid.create(self.image.shape[2:], self.spacing, self.origin, len(self.image), self.image.device)

    def to(self, device: str) -> "Level":
        """Moves it."""
        mask = None if self.mask is None else self.mask.to(device)
        return self._replace(image=self.image.to(device), origin=self.origin.to(device), mask=mask)


class Batch(NamedTuple):
    """Crops, what is shown of them, and their classes.

    Attributes:
        levels: What is shown.
        target: Classes of the crops' pixels, ``[B, *size]``.
        place: Where these pixels are, if they are not those of the first level.
    """

    levels: tuple[Level, ...]
    target: Tensor
    place: Grid | None = None

    def to(self, device: str) -> "Batch":
        """Moves it."""
        place = self.place
        if place is not None:
            place = place._replace(spacing=place.spacing.to(device), origin=place.origin.to(device))
        return Batch(tuple(level.to(device) for level in self.levels), self.target.to(device), place)


class Chosen(NamedTuple):
    """Crops: which scene each is of, and its first pixel ``[B, axes]``."""

    scene: np.ndarray
    corner: np.ndarray


def choose(task: Task, labels: np.ndarray, scene: np.ndarray, rng: np.random.Generator, tries: int = 20) -> Chosen:
    """Chooses crops at random, with something other than background in the middle, if some tries find it."""
    span = np.array(task.field) - task.size
    corner = rng.integers(0, span + 1, (len(scene), len(span)))
    for _ in range(tries):
        middle = corner + np.array(task.size) // 2
        empty = labels[(scene, *middle.T)] == 0
        corner[empty] = rng.integers(0, span + 1, (int(empty.sum()), len(span)))
    return Chosen(scene, corner)


def show(
    task: Task, scenes: Scenes, chosen: Chosen, views: Sequence[str], seed: int, mirrored: Sequence[bool]
) -> Batch:
    """Cuts views out of scenes.

    Args:
        task: What the scenes are of.
        scenes: All scenes.
        chosen: Crops.
        views: Names of `VIEWS`.
        seed: Of the noise.
        mirrored: Along which axes scenes are mirrored.
    """
    corner = np.where(mirrored, np.array(task.field) - task.size - chosen.corner, chosen.corner)
    axes = [axis for axis, flip in enumerate(mirrored, start=1) if flip]
    fields, labels = (
        torch.from_numpy(np.ascontiguousarray(np.flip(each[chosen.scene], axes)))
        for each in (scenes.images, scenes.labels)
    )
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for view in views:
        level = VIEWS[view](task, fields[:, None].float() / 255, corner)
        noise = NOISE * torch.randn(level.image.shape, generator=generator)
        levels.append(level._replace(image=(level.image + noise - MIDDLE) / SCALE))
    place = None if views[0] == "crop" else crop_grid(task, corner)
    return Batch(tuple(levels), cut(labels[:, None], corner, task.size)[:, 0].long(), place)


def crop_grid(task: Task, corner: np.ndarray) -> Grid:
    """Returns where the pixels of crops are."""
    return Grid.create(task.size, task.spacing, _origin(corner, task.spacing), len(corner))


def cut(images: Tensor, corner: np.ndarray, size: Sequence[int]) -> Tensor:
    """Cuts the same size out of each of the images ``[B, C, *field]``, at corners ``[B, axes]``."""
    parts = [
        image[(slice(None), *(slice(begin, begin + n) for begin, n in zip(at, size, strict=True)))]
        for image, at in zip(images, corner, strict=True)
    ]
    return torch.stack(parts)


def _crop(task: Task, fields: Tensor, corner: np.ndarray) -> Level:
    return Level(cut(fields, corner, task.size), task.spacing, _origin(corner, task.spacing))


def _whole(factors: Callable[[Task], Sequence[int]]) -> Callable[[Task, Tensor, np.ndarray], Level]:
    """Returns what makes an overview of the whole field, whose pixels are larger than a crop's."""

    def view(task: Task, fields: Tensor, corner: np.ndarray) -> Level:
        by = tuple(factors(task))
        spacing = task.scaled(by)
        return Level(POOLS[len(by)](fields, by), spacing, _origin(np.zeros_like(corner), spacing))

    return view


def _between(task: Task, fields: Tensor, corner: np.ndarray) -> Level:
    """A crop as large as the others, with pixels between theirs and the overview's, about the crop where it fits."""
    spacing, middle = task.scaled(task.finer), corner + np.array(task.size) / 2
    image = POOLS[len(spacing)](fields, task.finer)
    wanted = np.round(middle / task.finer - np.array(task.size) / 2)
    start = wanted.clip(0, np.array(image.shape[2:]) - task.size).astype(np.int64)
    return Level(cut(image, start, task.size), spacing, _origin(start, spacing))


def _origin(start: np.ndarray, spacing: Sequence[float]) -> Tensor:
    """Returns the centre of pixels of which so many come before them."""
    return torch.from_numpy((start + 0.5) * np.array(spacing))


VIEWS: dict[str, Callable[[Task, Tensor, np.ndarray], Level]] = {
    "crop": _crop,
    "overview": _whole(lambda task: task.factors),
    "field": _whole(lambda task: (1,) * len(task.size)),
    "between": _between,
    "finer overview": _whole(lambda task: task.finer),
    "coarser overview": _whole(lambda task: task.coarser),
}
"""Views by name."""


def show_nothing(task: Task, views: Sequence[str]) -> Batch:
    """Returns one crop of an empty scene, in the middle of the field."""
    corner = (np.array([task.field]) - task.size) // 2
    empty = np.zeros((1, *task.field), np.uint8)
    return show(task, Scenes(empty, empty), Chosen(np.array([0]), corner), views, 0, [False] * len(task.size))
