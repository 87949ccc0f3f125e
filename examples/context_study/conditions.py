"""What is changed in the tests of a trained network, and for which networks it can not be done."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from context_study.networks import NETWORKS
from context_study.tasks import Task
from context_study.views import Batch, Level
from rat_timm import Grid


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition of a test.

    Attributes:
        meaning: In a sentence.
        views: What is shown in place of crop and overview; None for what the network was trained with.
        change: What is changed of that.
        without: By families of networks, and by views of networks that are shown one image: why it can not be done.
    """

    meaning: str
    views: tuple[str, ...] | None = None
    change: Callable[[Task, Batch], Batch] = lambda task, batch: batch
    without: dict[str, str] = dataclasses.field(default_factory=dict)

    def why_not(self, network: str) -> str:
        """Returns why a network can not be tested so; empty if it can."""
        known = NETWORKS[network]
        if self.views is None and self.change is CONDITIONS[""].change:
            return ""
        if len(known.views) == 1:
            return self.without.get(known.views[0], "it is shown one image")
        return self.without.get(known.family, "")


def shifted(share: float) -> Callable[[Task, Batch], Batch]:
    """Returns what tells that the overview lies further on, by a share of a crop along each axis."""

    def change(task: Task, batch: Batch) -> Batch:
        crop, *others = batch.levels
        by = crop.origin.new_tensor([share * n * step for n, step in zip(task.size, task.spacing, strict=True)])
        moved = (level._replace(origin=level.origin + by) for level in others)
        return batch._replace(levels=(crop, *moved))

    return change


def hidden(task: Task, batch: Batch) -> Batch:
    """Tells of all levels that they show what the crop shows."""
    crop = batch.levels[0]
    return batch._replace(levels=tuple(_as_wide_as(crop, level) for level in batch.levels))


def _as_wide_as(crop: Level, level: Level) -> Level:
    sizes = zip(crop.image.shape[2:], level.image.shape[2:], crop.spacing, strict=True)
    spacing = tuple(n * step / count for n, count, step in sizes)
    half = [(new - old) / 2 for new, old in zip(spacing, crop.spacing, strict=True)]
    return level._replace(spacing=spacing, origin=crop.origin + crop.origin.new_tensor(half))


def swapped(task: Task, batch: Batch) -> Batch:
    """Gives the overview first, and asks for the classes at the crop's pixels as before."""
    crop = batch.levels[0]
    return batch._replace(levels=batch.levels[::-1], place=crop.grid)


def half_masked(task: Task, batch: Batch) -> Batch:
    """Masks the half of the overview, along the last axis, in which the middle of the crop is not."""
    crop, *others = batch.levels
    middle = (crop.grid.corners()[0] + crop.grid.corners()[1])[:, -1] / 2
    return batch._replace(levels=(crop, *(_masked(level, middle) for level in others)))


def _masked(level: Level, middle: Tensor) -> Level:
    grid: Grid = level.grid
    lower, upper = (corner[:, -1] for corner in grid.corners())
    half = (lower + upper) / 2
    along = grid.origin[:, -1:] + grid.spacing[:, -1:] * torch.arange(grid.shape[-1])  # [B, n]
    kept = (along < half[:, None]) == (middle < half)[:, None]
    mask = kept.view(len(kept), *[1] * (len(grid.shape) - 1), -1).expand(len(kept), *grid.shape)
    return level._replace(mask=mask, image=level.image.masked_fill(~mask[:, None], 0.0))


_FIXED = "its levels, each of as many pixels and with a projection of its own, are fixed when it is built"
_CHANNELS = "its channels are fixed when it is built"

CONDITIONS: dict[str, Condition] = {
    "": Condition("As in training."),
    "half a crop off": Condition("The overview is said to lie half a crop further on.", change=shifted(0.5)),
    "a crop off": Condition("The overview is said to lie a crop further on.", change=shifted(1.0)),
    "spacing hidden": Condition("Both images are said to show what the crop shows.", change=hidden),
    "levels swapped": Condition(
        "The overview comes first, and is the one that is classified, at the crop's pixels.",
        change=swapped,
        without={"unet": _CHANNELS},
    ),
    "third level": Condition(
        "An image between crop and overview is added.",
        views=("crop", "overview", "between"),
        without={"muvit": _FIXED, "unet": _CHANNELS},
    ),
    "finer overview": Condition(
        "The overview has finer pixels, and more of them.",
        views=("crop", "finer overview"),
        without={"muvit": _FIXED},
    ),
    "coarser overview": Condition(
        "The overview has coarser pixels, and fewer of them.",
        views=("crop", "coarser overview"),
        without={"muvit": _FIXED},
    ),
    "half masked": Condition(
        "The half of the overview in which the crop is not is masked.",
        change=half_masked,
        without={"muvit": "it takes no mask"},
    ),
}
"""Conditions by name; all but the first are for networks that are shown an overview beside the crop."""
