"""A picture of a slice with what was predicted on it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.pyramid import Level
from ..geometry.box import Box, places_around
from ..geometry.grid import Grid
from ..geometry.sample import sample_at
from ..optional import import_optional
from .source import overview
from .work import Job

_EDGE = 1024  # pixels at most


def draw(job: Job, levels: Sequence[Level], file: Path) -> None:
    """Draws the middle slice, at the finest of the output's levels that is not larger than 1024 pixels.

    Args:
        job: Whose output is finished.
        levels: Of the image.
        file: A PNG.
    """
    store = job.store
    fits = [n for n in range(len(store.factors)) if max(store.level_shape(n)[-2:]) <= _EDGE]
    level = fits[0] if fits else len(store.factors) - 1
    shape, factor = store.level_shape(level), store.factors[level]
    middle = Box.whole(shape) if len(shape) < 3 else Box((shape[0] // 2, 0, 0), (shape[0] // 2 + 1, *shape[1:]))
    values = store.read(level, middle)
    values = values[0] if store.channels is None and len(shape) == 3 else values
    values = values[:, 0] if store.channels is not None and len(shape) == 3 else values
    steps = [s * f for s, f in zip(store.spacing, factor, strict=True)]
    first = [o + (f - 1) / 2 * s for o, f, s in zip(store.origin, factor, store.spacing, strict=True)]
    origin = [o + a * s for o, a, s in zip(first, middle.start, steps, strict=True)]
    picture = _image(job, levels, Grid.create(middle.shape, steps, origin))
    Image.fromarray((255 * _drawn(picture, values, store.is_labels)).astype(np.uint8)).save(file)


def _image(job: Job, levels: Sequence[Level], grid: Grid) -> np.ndarray:
    """Returns the image's channels' mean at the places of a grid, from 0 to 1, ``[y, x]``."""
    image = overview(levels, job.image.image, grid.spacing[0].tolist())
    box = places_around(Box.whole(grid.shape), grid, image.grid)
    tokens, _ = image.read(box)
    plane = sample_at(tokens, grid, 1.0).x[0].mean(dim=-1).reshape(grid.shape[-2:])
    low, high = torch.quantile(plane.flatten()[:: max(1, plane.numel() // 100_000)], torch.tensor([0.01, 0.99]))
    return ((plane - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).numpy()


def _drawn(image: np.ndarray, values: np.ndarray, is_labels: bool) -> np.ndarray:
    """Puts labels in colours over an image, or draws the likeliest class of channels; ``[y, x, 3]``."""
    labels = values if is_labels else values.argmax(axis=0) if len(values) > 1 else values[0] > 0.5
    paint = import_optional("skimage.color", "dense").label2rgb
    return paint(np.asarray(labels).astype(np.int64), image, alpha=0.4, bg_label=0)
