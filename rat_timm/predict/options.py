"""What a user asks of a prediction."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, TypeAlias

import torch

from ..data.pyramid import Level
from ..dense.instances import instances

OVERVIEW = "overview"
DTYPES = ("float32", "bfloat16", "float16", "float64")
SAME_RESULT = ("device", "workers", "scheduler", "preview", "progress", "resume", "compile", "max_bytes")
"""Options that a run may change when it goes on: all others are compared."""

Context: TypeAlias = float | str


@dataclass(frozen=True)
class Options:
    """How to predict. Lengths are in ``unit``, in array-axis order (z, y, x), one for all axes or one per axis.

    Attributes:
        task: "labels" (the likeliest class, 0 where nothing is predicted), "probabilities", "instances" (of a network
            of `rat_timm.dense.instances`), or "features".
        spacing: The image's pixel size, in place of the file's.
        unit: The unit of the model's reference spacing, and of all lengths here.
        assumed_unit: Unit of the pixel sizes of files that have numbers and no unit; else they are an error.
        level: Level of the image's pyramid on whose pixels is predicted, 0 is the finest.
        time: Index on the time axis.
        region: Pixels of that level to predict, one slice per axis. What lies around them is still seen.
        out: Pixel size of the output. Default: the image's own pixels; for features of a backbone, its map's places.
        background: A number: windows without a pixel above it, in any channel, are not computed. A file: an image that
            is not zero where pixels are valid, of any pixel size; others influence nothing and become 0.
        intensities: Pixel values that become 0 and 1, as in training. Default: those that the model's folder says
            (`rat_timm.predict.facts`); pixels go to the model as they are if it says none, and with (0, 1).
        levels: What the model sees beside a window, as further levels of a pyramid: pixel sizes, at which a window of
            as many pixels around it is seen, and "overview", the whole field. Default: "overview" for models that look
            at everything, where the image is larger than a window; nothing for others.
        tile: Length of what one call of the model predicts.
        halo: How far it sees beyond. Default: as far as the model looks, if that is bounded and fits.
        batch_size: Windows in a call of the model.
        stage: Of a hierarchical backbone, for its features.
        scale: The length with which a network for instances was trained, which "instances" needs. Default: what the
            model's folder says.
        threshold: See `rat_timm.dense.instances`.
        depth: See `rat_timm.dense.instances`.
        smoothing: See `rat_timm.dense.instances`.
        min_distance: See `rat_timm.dense.instances`.
        min_size: See `rat_timm.dense.instances`.
        largest: Diameter of the largest object, for instances. Default: ten times ``scale``.
        dtype: One of `DTYPES`.
        device: Where the model computes. Default: a GPU if there is one.
        compile: Whether to compile the model.
        workers: Processes; 0: this one.
        scheduler: See `rat_timm.predict.engines.run`.
        resume: Whether to go on where an interrupted run stopped; otherwise it begins again.
        preview: A PNG file, for a picture of a slice with what was predicted.
        progress: Whether to say what is done, with a progress bar. A function instead is called, in this process, with
            how many places of the output are done and how many are to be, after each tile; what it raises ends the run.
        max_bytes: What a part that is read may take in memory.
    """

    task: str = "labels"
    spacing: float | Sequence[float] | None = None
    unit: str = "um"
    assumed_unit: str | None = None
    level: int = 0
    time: int | None = None
    region: Sequence[slice] | None = None
    out: float | Sequence[float] | None = None
    background: float | str | PathLike | Level | None = None
    intensities: tuple[float, float] | None = None
    levels: Sequence[Context] | None = None
    tile: float | Sequence[float] | None = None
    halo: float | Sequence[float] | None = None
    batch_size: int = 1
    stage: int = -1
    scale: float | None = None
    threshold: float = 0.5
    depth: float | None = None
    smoothing: float | None = None
    min_distance: float = 0.0
    min_size: float = 0.0
    largest: float | None = None
    dtype: str = "float32"
    device: str | None = None
    compile: bool = False
    workers: int = 0
    scheduler: str | None = None
    resume: bool = True
    preview: str | PathLike | None = None
    progress: bool | Callable[[int, int], object] = True
    max_bytes: int | None = 16 * 2**30

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if self.batch_size < 1 or self.workers < 0:
            raise ValueError(
                f"batch_size must be positive and workers not negative, got {self.batch_size}, {self.workers}"
            )
        for context in self.levels or ():
            if context != OVERVIEW and not (isinstance(context, int | float) and context > 0):
                raise ValueError(f"levels must be pixel sizes and {OVERVIEW!r}, got {context!r}")
        if self.intensities is not None and not self.intensities[0] < self.intensities[1]:
            raise ValueError(f"intensities must be two numbers, the lower first, got {self.intensities}")
        if self.largest is not None and not 0 <= self.largest < math.inf:
            raise ValueError(f"largest must be a length, got {self.largest}")
        if self.scale is not None:
            instances(torch.zeros(1, 2, 1, 1), 1.0, **self.of_objects())  # checks them

    def of_objects(self) -> dict[str, Any]:
        """Returns those of `rat_timm.dense.instances`."""
        names = ("scale", "threshold", "depth", "smoothing", "min_distance", "min_size")
        return {name: getattr(self, name) for name in names}

    def described(self) -> dict[str, str]:
        """Returns what a run that goes on must have in common with the one before, in words."""
        compared = (field.name for field in fields(self) if field.name not in SAME_RESULT)
        return {name: _in_words(getattr(self, name)) for name in compared}


def _in_words(value: object) -> str:
    if isinstance(value, Level):
        return f"image of {value.grid.shape}"
    return repr(str(value) if isinstance(value, PathLike) else value)
