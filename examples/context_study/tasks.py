"""The tasks: what scenes they are of, how crops and overviews lie in them, and scenes that are drawn once and kept.

A scene is kept as its whole field of view at the pixel size of crops; what coarser images show are means of its pixels.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from joblib import Memory, Parallel, delayed

from context_study import brain, scenes
from context_study.scenes import Field, Tissue
from studies import places
from studies.results import digest


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name: Its key in `TASKS`.
        draw: Renders a scene: from seed, whether it is to be trained on, size and spacing.
        classes: Names of the classes.
        size: Pixels of a crop, and of an overview, per axis.
        spacing: Size of a crop's pixels, per axis.
        unit: Of the spacing.
        factors: By what an overview's pixels are larger, and its field of view wider, per axis.
        finer: The same of an overview whose pixels are finer than in training.
        coarser: The same of one whose pixels are coarser.
        training: Number of scenes to train on.
        test: Number of scenes to test on.
        crops: Crops of each of them.
        steps: Steps of training.
        batch: Crops in a step.
        flips: Whether mirrored scenes are scenes.
    """

    name: str
    draw: Callable[[int, bool, Sequence[int], Sequence[float]], Field]
    classes: tuple[str, ...]
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    unit: str
    factors: tuple[int, ...]
    finer: tuple[int, ...]
    coarser: tuple[int, ...]
    training: int
    test: int
    crops: int
    steps: int
    batch: int
    flips: bool

    @property
    def field(self) -> tuple[int, ...]:
        """Pixels of the whole field of view at the crops' pixel size."""
        return tuple(n * by for n, by in zip(self.size, self.factors, strict=True))

    def scaled(self, factors: Sequence[float]) -> tuple[float, ...]:
        """Returns the size of pixels that are larger than a crop's by factors."""
        return tuple(step * by for step, by in zip(self.spacing, factors, strict=True))


def _draw_tissue(tissue: Tissue) -> Callable[[int, bool, Sequence[int], Sequence[float]], Field]:
    def draw(seed: int, train: bool, size: Sequence[int], spacing: Sequence[float]) -> Field:
        return scenes.render(tissue, 2 * seed + train, size, spacing)

    return draw


TISSUE = Tissue(diameter=9.0, pitch=11.0, texture=3.0, wavelength=120.0, region=240.0)
TISSUE_3D = Tissue(diameter=7.0, pitch=8.0, texture=3.5, wavelength=60.0, region=110.0)
_ALL = (
    Task(
        "tissue",
        _draw_tissue(TISSUE),
        scenes.CLASSES,
        size=(48, 48),
        spacing=(1.0, 1.0),
        unit="um",
        factors=(8, 8),
        finer=(4, 4),
        coarser=(12, 12),
        training=400,
        test=100,
        crops=4,
        steps=500,
        batch=16,
        flips=True,
    ),
    Task(
        "tissue in volumes",
        _draw_tissue(TISSUE_3D),
        scenes.CLASSES,
        size=(8, 24, 24),
        spacing=(2.0, 1.0, 1.0),
        unit="um",
        factors=(4, 6, 6),
        finer=(2, 3, 3),
        coarser=(4, 8, 8),
        training=200,
        test=60,
        crops=4,
        steps=500,
        batch=8,
        flips=True,
    ),
    Task(
        "brain",
        brain.render,
        brain.CLASSES,
        size=(8, 24, 24),
        spacing=(3.0, 1.0, 1.0),
        unit="mm",
        factors=(6, 8, 8),
        finer=(3, 4, 4),
        coarser=(6, 12, 12),
        training=40,
        test=20,
        crops=12,
        steps=360,
        batch=8,
        flips=False,
    ),
)
TASKS = {task.name: task for task in _ALL}
"""Tasks by name."""


class Scenes(NamedTuple):
    """Scenes of a task at the pixel size of crops.

    Attributes:
        images: ``[N, *field]``, uint8: 0 to 255 for 0 to 1.
        labels: ``[N, *field]``, uint8.
    """

    images: np.ndarray
    labels: np.ndarray


def training_scenes(name: str, count: int, cache: Path, jobs: int = 1) -> Scenes:
    """Returns scenes to train on; draws what is not in the cache, ``jobs`` at a time."""
    return _scenes(name, range(count), True, cache, jobs)


def held_out_scenes(name: str, count: int, cache: Path, jobs: int = 1) -> Scenes:
    """Returns scenes to test on; draws what is not in the cache, ``jobs`` at a time."""
    return _scenes(name, range(count), False, cache, jobs)


def _scenes(name: str, seeds: range, train: bool, cache: Path, jobs: int) -> Scenes:
    memory = Memory(cache, verbose=0, mmap_mode="r")
    task = TASKS[name]
    draw = memory.cache(_draw, ignore=["jobs"])
    return Scenes(*draw(name, seeds, train, (task.field, task.spacing), _version(), jobs))


def _draw(
    name: str, seeds: range, train: bool, grid: tuple[Sequence[float], ...], version: str, jobs: int
) -> tuple[np.ndarray, np.ndarray]:
    drawn = Parallel(jobs)(delayed(_draw_one)(name, seed, train) for seed in seeds)
    images, labels = zip(*drawn, strict=True)
    return np.stack(images), np.stack(labels)


def _draw_one(name: str, seed: int, train: bool) -> tuple[np.ndarray, np.ndarray]:
    task = TASKS[name]
    field = task.draw(seed, train, task.field, task.spacing)
    return np.round(255 * field.image.clip(0, 1)).astype(np.uint8), field.labels


def _version() -> str:
    """A digest of the code that draws."""
    return digest(places, scenes, brain, sys.modules[__name__])
