"""Scenes of cells, described in micrometres and rendered at any pixel size, in 2D and 3D.

What a scene's class is follows from the size of its cells alone: their distance and the wavelength of their texture are
so many diameters, so that a scene of one class, seen at another pixel size, looks like one of another class. Clutter is
of any size in all classes, blur is the microscope's, noise the camera's. A scene is a function of its seed and of
physical position: at any pixel size and in any field of view it is the same scene.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from studies.places import area_axes, around, direction, dot, edge, lattice, pixels

DIAMETERS = (7.0, 10.5, 15.75)  # micrometres, one per class
DISTANCE = 1.3  # of neighbours, in diameters
WAVELENGTH = 0.4  # of the cells' texture, in diameters
BLUR = 0.6  # standard deviation, micrometres
NOISE = 0.08  # standard deviation, per pixel; cells are between 0.6 and 1
FINE = 1.0  # micrometres that area sampling tells apart, at most


class Scene(NamedTuple):
    """A scene.

    Attributes:
        label: Its class, an index of `DIAMETERS`.
        seed: What else it is.
    """

    label: int
    seed: int


def render(scene: Scene, size: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """Renders the middle of a scene, with area sampling: ``size`` pixels of ``spacing`` micrometres per axis."""
    axes, parts = area_axes(size, spacing, [-n * step / 2 for n, step in zip(size, spacing, strict=True)], FINE)
    fine = [step / part for step, part in zip(spacing, parts, strict=True)]
    rng = np.random.default_rng([scene.seed, 0])
    image = np.maximum(_cells(axes, scene), _clutter(axes, scene, rng.uniform(6, 24)))
    slope = rng.normal(0, 0.002, len(size)).astype(np.float32)
    shade = dot(np.meshgrid(*axes, indexing="ij", sparse=True), slope)  # light from one side
    image = gaussian_filter(image * rng.uniform(0.7, 1.0) + rng.uniform(0, 0.2) + shade, [BLUR / f for f in fine])
    return (pixels(image, parts) + np.random.default_rng([scene.seed, 1]).normal(0, NOISE, size)).astype(np.float32)


def _cells(axes: Sequence[np.ndarray], scene: Scene) -> np.ndarray:
    """Cells on a disturbed lattice: somewhat elongated, each with a plane wave for a texture."""
    diameter = DIAMETERS[scene.label]
    elongation = np.random.default_rng([scene.seed, 2]).uniform(1.0, 1.6)
    points, chance = lattice(axes, DISTANCE * diameter, scene.seed)
    long, wave = (direction(chance, first, len(axes)) for first in (4, 8))
    radius, phase, light = diameter / 2 * (0.9 + 0.2 * chance(0)), chance(1), 0.6 + 0.4 * chance(2)
    thickness = elongation ** (1 / len(axes))  # of a sphere as large, over that of the cell
    image = np.zeros([len(axis) for axis in axes], np.float32)
    for index, point in enumerate(points):
        part, away = around(axes, point, radius[index] * elongation / thickness)
        along = dot(away, long[index])
        distance = np.sqrt(dot(away, away) - (1 - elongation**-2) * along**2) * thickness
        wavelengths = dot(away, wave[index]) / (WAVELENGTH * diameter) + phase[index]
        texture = 0.8 + 0.2 * np.cos(2 * np.pi * wavelengths)
        image[part] = np.maximum(image[part], edge(radius[index] - distance) * light[index] * texture)
    return image


def _clutter(axes: Sequence[np.ndarray], scene: Scene, pitch: float) -> np.ndarray:
    """Round specks of all sizes, on a lattice whose pitch differs from scene to scene, so that none is a ruler."""
    points, chance = lattice(axes, pitch, scene.seed + (1 << 32))
    radius, light, there = pitch * 0.04 * 10 ** chance(0), 0.2 + 0.5 * chance(1), chance(2) < 0.5  # up to 0.4 pitches
    image = np.zeros([len(axis) for axis in axes], np.float32)
    for index in np.flatnonzero(there):
        part, away = around(axes, points[index], radius[index])
        inside = edge(radius[index] - np.sqrt(dot(away, away)))
        image[part] = np.maximum(image[part], inside * light[index])
    return image
