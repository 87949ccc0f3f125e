"""Real textures whose class is what they are and how large they are: crops of photographs that scikit-image ships.

Each photograph stands for two classes, one of which is magnified, as if its subject were larger: which of the two it
is, only the pixel size tells. The left part of a photograph is for training, the right part for tests.
"""

import functools
from collections.abc import Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates
from skimage import color, data

NAMES = ("brick", "grass", "gravel", "immunohistochemistry")
MAGNIFICATIONS = (1.0, 2.0)
KINDS = tuple((name, magnification) for name in NAMES for magnification in MAGNIFICATIONS)
TRAINED = 0.5  # share of a photograph's width that is for training
NOISE = 0.08  # standard deviation, per pixel; that of a photograph is 1
SPAN = 1.0  # pixels of a photograph that are as wide as the training spacing


@functools.cache
def _photograph(name: str) -> np.ndarray:
    """Returns a photograph in grey, between 0 and 1."""
    image = getattr(data, name)()
    image = color.rgb2gray(image) if image.ndim == 3 else image / 255
    return image.astype(np.float32)


@functools.cache
def _part(name: str, train: bool, blur: float) -> np.ndarray:
    """Returns the part for training or for tests, blurred by so many pixels."""
    image = _photograph(name)
    middle = int(image.shape[1] * TRAINED)
    return gaussian_filter(image[:, :middle] if train else image[:, middle:], blur, mode="mirror")


def photograph(label: int, seed: int, size: Sequence[int], spacing: Sequence[float], train: bool) -> np.ndarray:
    """Cuts ``size`` pixels of a spacing out of a photograph, around a random place; mirrored where it ends."""
    name, magnification = KINDS[label]
    steps = [s * SPAN / magnification for s in spacing]  # pixels of the photograph per pixel of the image
    part = _part(name, train, round(max(0.0, max(steps) - 1) * 0.4, 2))
    rng = np.random.default_rng([seed, train])
    axes = [
        rng.uniform(0, extent) + (np.arange(n) - (n - 1) / 2) * step
        for extent, n, step in zip(part.shape, size, steps, strict=True)
    ]
    image = map_coordinates(part, np.meshgrid(*axes, indexing="ij"), order=1, mode="mirror")
    image = (image - image.mean()) / _photograph(name).std()  # light and contrast differ between photographs
    return (image + rng.normal(0, NOISE, size)).astype(np.float32)
