"""What the networks learn: tasks, the pixel sizes to train at, and the images to train and to test on.

Pixel sizes are factors of a task's own; images are cached, since all networks see the same ones.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Memory
from torch import Tensor

from resolution_study import photographs, scenes
from resolution_study.photographs import KINDS, photograph
from resolution_study.scenes import DIAMETERS, Scene, render
from studies import places
from studies.results import digest

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # of the training spacing, to test at
REGIMES = {"one": (1.0,), "two": (0.7, 1.4), "mixed": (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)}  # to train at


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        draw: Renders an image of a class: from label, seed, size, spacing, and whether it is to be trained on.
        classes: Number of classes.
        size: Pixels of a training image at factor 1, per axis.
        spacing: Their size, per axis.
        training: Number of images to train on.
        test: Number of images to test on at each factor.
        settings: How they are tested. With a factor, the field of view changes and the "size" is fixed; the number of
            pixels changes and the "field" is fixed; or that of "slices" along the first axis, and nothing else.
    """

    draw: Callable[[int, int, Sequence[int], Sequence[float], bool], np.ndarray]
    classes: int
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    training: int
    test: int
    settings: tuple[str, ...] = ("field", "size")

    def ratio(self, factor: float, setting: str) -> tuple[float, ...]:
        """Returns the spacing at a factor, relative to that at factor 1, per axis."""
        return tuple(1.0 if setting == "slices" and axis else factor for axis in range(len(self.size)))

    def size_at(self, factor: float, setting: str) -> tuple[int, ...]:
        """Returns the number of pixels at a factor."""
        if setting == "size":
            return self.size
        return tuple(round(n / by) for n, by in zip(self.size, self.ratio(factor, setting), strict=True))


def draw_cells(label: int, seed: int, size: Sequence[int], spacing: Sequence[float], train: bool) -> np.ndarray:
    """Cells whose diameter is the class."""
    return render(Scene(label, 2 * seed + train), size, spacing)


TASKS = {
    "cells": Task(draw_cells, len(DIAMETERS), (48, 48), (1.0, 1.0), 1500, 300),
    "photographs": Task(photograph, len(KINDS), (48, 48), (1.0, 1.0), 1500, 300),
    "cells in volumes": Task(
        draw_cells, len(DIAMETERS), (16, 32, 32), (2.0, 1.0, 1.0), 600, 150, settings=("field", "slices")
    ),
}


class Images(NamedTuple):
    """Images of one size.

    Attributes:
        pixels: ``[N, 1, *size]``.
        ratio: Their spacing, relative to that at factor 1, per axis.
        target: Their classes, ``[N]``.
    """

    pixels: Tensor
    ratio: tuple[float, ...]
    target: Tensor


def training_images(name: str, regime: str, count: int, cache: Path) -> list[Images]:
    """Draws images to train on, as many at each factor of the regime's, with the same field of view at all of them."""
    each = count // len(REGIMES[regime])
    return [
        _images(name, factor, "field", range(index * each, (index + 1) * each), True, cache)
        for index, factor in enumerate(REGIMES[regime])
    ]


def test_images(name: str, factor: float, setting: str, count: int, cache: Path) -> Images:
    """Draws images to test on: at all factors and in all settings of the same scenes."""
    return _images(name, factor, setting, range(count), False, cache)


def _images(name: str, factor: float, setting: str, seeds: range, train: bool, cache: Path) -> Images:
    task, draw = TASKS[name], Memory(cache, verbose=0).cache(_draw)
    ratio = task.ratio(factor, setting)
    pixels = draw(name, task.size_at(factor, setting), ratio, seeds, train, _version())
    return Images(torch.from_numpy(pixels), ratio, torch.tensor(seeds) % task.classes)


def _draw(
    name: str, size: Sequence[int], ratio: Sequence[float], seeds: range, train: bool, version: str
) -> np.ndarray:
    task = TASKS[name]
    spacing = [step * by for step, by in zip(task.spacing, ratio, strict=True)]
    return np.stack([task.draw(seed % task.classes, seed, size, spacing, train) for seed in seeds])[:, None]


def _version() -> str:
    """A digest of the code that draws, so that images of older code are drawn anew."""
    return digest(scenes, photographs, places, sys.modules[__name__])
