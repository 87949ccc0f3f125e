"""What the networks learn: tasks, the pixel sizes to train at, and the images to train and to test on.

Pixel sizes are factors of a task's own; images are cached, since all networks see the same ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Memory
from photographs import KINDS, photograph
from scenes import DIAMETERS, Scene, render
from torch import Tensor

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)  # of the training spacing, to test at
REGIMES = {"one": (1.0,), "two": (0.7, 1.4), "mixed": (0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)}  # to train at


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        draw: Renders an image of a class: from label, seed, size, spacing, and whether it is to be trained on.
        classes: Number of classes.
        size: Pixels of a training image, per axis.
        spacing: Their size, per axis.
        training: Number of images to train on.
        test: Number of images to test on at each factor.
    """

    draw: Callable[[int, int, Sequence[int], Sequence[float], bool], np.ndarray]
    classes: int
    size: tuple[int, ...]
    spacing: tuple[float, ...]
    training: int
    test: int

    def size_at(self, factor: float, fixed: str) -> tuple[int, ...]:
        """Returns the number of pixels at a factor: as in training, or about as much field of view, in fours."""
        if fixed == "size":
            return self.size
        return tuple(max(4, 4 * round(n / factor / 4)) for n in self.size)


def draw_cells(label: int, seed: int, size: Sequence[int], spacing: Sequence[float], train: bool) -> np.ndarray:
    """Cells whose diameter is the class."""
    return render(Scene(label, 2 * seed + train), size, spacing)


TASKS = {
    "cells": Task(draw_cells, len(DIAMETERS), (48, 48), (1.0, 1.0), 1500, 300),
    "cells in volumes": Task(draw_cells, len(DIAMETERS), (16, 32, 32), (2.0, 1.0, 1.0), 600, 90),
    "photographs": Task(photograph, len(KINDS), (48, 48), (1.0, 1.0), 1500, 300),
}


class Images(NamedTuple):
    """Images of one size.

    Attributes:
        pixels: ``[N, 1, *size]``.
        factor: Of the training spacing, ``[N]``.
        label: ``[N]``.
    """

    pixels: Tensor
    factor: Tensor
    label: Tensor


def training_images(name: str, regime: str, count: int, cache: Path) -> Images:
    """Draws images to train on; each has one factor of the regime's."""
    factors = np.random.default_rng(0).choice(REGIMES[regime], count)
    return _images(name, factors, TASKS[name].size, True, cache)


def test_images(name: str, factor: float, fixed: str, count: int, cache: Path) -> Images:
    """Draws images to test on, at a factor, with the training images' ``size`` or ``field`` of view fixed."""
    return _images(name, np.full(count, factor), TASKS[name].size_at(factor, fixed), False, cache)


def _images(name: str, factors: np.ndarray, size: tuple[int, ...], train: bool, cache: Path) -> Images:
    draw = Memory(cache, verbose=0).cache(_draw)
    label = np.arange(len(factors)) % TASKS[name].classes
    pixels = draw(name, label, factors, size, train)
    return Images(torch.from_numpy(pixels), torch.from_numpy(factors).float(), torch.from_numpy(label))


def _draw(name: str, label: np.ndarray, factors: np.ndarray, size: tuple[int, ...], train: bool) -> np.ndarray:
    task = TASKS[name]
    drawn = [
        task.draw(int(kind), seed, size, [s * factor for s in task.spacing], train)
        for seed, (kind, factor) in enumerate(zip(label, factors, strict=True))
    ]
    return np.stack(drawn)[:, None]
