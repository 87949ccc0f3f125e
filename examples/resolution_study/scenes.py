"""Scenes of cells, described in micrometres and rendered at any pixel size, in 2D and 3D.

What a scene's class is follows from the size of its cells alone: their distance and the wavelength of their texture are
so many diameters, so that a scene of one class, seen at another pixel size, looks like one of another class. Clutter is
of any size in all classes, blur is the microscope's, noise the camera's. A scene is a function of its seed and of
physical position: at any pixel size and in any field of view it is the same scene.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

DIAMETERS = (7.0, 10.5, 15.75)  # micrometres, one per class
DISTANCE = 1.3  # of neighbours, in diameters
WAVELENGTH = 0.4  # of the cells' texture, in diameters
BLUR = 0.6  # standard deviation, micrometres
NOISE = 0.08  # standard deviation, per pixel; cells are between 0.6 and 1
EDGE = 0.3  # micrometres over which something ends
FINE = 1.0  # micrometres that area sampling tells apart, at most

Chance = Callable[[int], np.ndarray]  # from the index of a number to that number, between 0 and 1, of each point


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
    parts = [int(np.ceil(step / FINE)) for step in spacing]
    fine = [step / part for step, part in zip(spacing, parts, strict=True)]
    axes = [
        ((np.arange(n * p) + 0.5 - n * p / 2) * f).astype(np.float32) for n, p, f in zip(size, parts, fine, strict=True)
    ]
    rng = np.random.default_rng([scene.seed, 0])
    image = np.maximum(_cells(axes, scene), _clutter(axes, scene, rng.uniform(6, 24)))
    slope = rng.normal(0, 0.002, len(size)).astype(np.float32)
    shade = _dot(np.meshgrid(*axes, indexing="ij", sparse=True), slope)  # light from one side
    image = gaussian_filter(image * rng.uniform(0.7, 1.0) + rng.uniform(0, 0.2) + shade, [BLUR / f for f in fine])
    image = image.reshape([n for pair in zip(size, parts, strict=True) for n in pair])
    image = image.mean(axis=tuple(range(1, 2 * len(size), 2)))
    return (image + np.random.default_rng([scene.seed, 1]).normal(0, NOISE, size)).astype(np.float32)


def _cells(axes: Sequence[np.ndarray], scene: Scene) -> np.ndarray:
    """Cells on a disturbed lattice: somewhat elongated, each with a plane wave for a texture."""
    diameter = DIAMETERS[scene.label]
    elongation = np.random.default_rng([scene.seed, 2]).uniform(1.0, 1.6)
    points, chance = _lattice(axes, DISTANCE * diameter, scene.seed)
    long, wave = (_direction(chance, first, len(axes)) for first in (4, 8))
    radius, phase, light = diameter / 2 * (0.9 + 0.2 * chance(0)), chance(1), 0.6 + 0.4 * chance(2)
    thickness = elongation ** (1 / len(axes))  # of a sphere as large, over that of the cell
    image = np.zeros([len(axis) for axis in axes], np.float32)
    for index, point in enumerate(points):
        part, away = _around(axes, point, radius[index] * elongation / thickness)
        along = _dot(away, long[index])
        distance = np.sqrt(_dot(away, away) - (1 - elongation**-2) * along**2) * thickness
        wavelengths = _dot(away, wave[index]) / (WAVELENGTH * diameter) + phase[index]
        texture = 0.8 + 0.2 * np.cos(2 * np.pi * wavelengths)
        image[part] = np.maximum(image[part], _edge(radius[index] - distance) * light[index] * texture)
    return image


def _clutter(axes: Sequence[np.ndarray], scene: Scene, pitch: float) -> np.ndarray:
    """Round specks of all sizes, on a lattice whose pitch differs from scene to scene, so that none is a ruler."""
    points, chance = _lattice(axes, pitch, scene.seed + (1 << 32))
    radius, light, there = pitch * 0.04 * 10 ** chance(0), 0.2 + 0.5 * chance(1), chance(2) < 0.5  # up to 0.4 pitches
    image = np.zeros([len(axis) for axis in axes], np.float32)
    for index in np.flatnonzero(there):
        part, away = _around(axes, points[index], radius[index])
        inside = _edge(radius[index] - np.sqrt(_dot(away, away)))
        image[part] = np.maximum(image[part], inside * light[index])
    return image


def _edge(depth: np.ndarray) -> np.ndarray:
    """From 0 outside to 1 inside, over about a micrometre."""
    return 1 / (1 + np.exp(-np.clip(depth / EDGE, -30, 30)))


def _lattice(axes: Sequence[np.ndarray], pitch: float, seed: int) -> tuple[np.ndarray, Chance]:
    """Returns the points ``[N, axes]`` of a disturbed lattice in and around a field of view, and their chance."""
    ends = np.array([axis[[0, -1]] for axis in axes]) / pitch
    first, last = np.round(ends).astype(np.int64).T
    box = np.stack(np.meshgrid(*map(np.arange, first - 1, last + 2), indexing="ij"), axis=-1).reshape(-1, len(axes))
    keys = _hash(box, seed)
    moves = np.stack([_uniform(keys, 16 + axis) for axis in range(len(axes))], axis=-1)
    return ((box + 0.35 * (2 * moves - 1)) * pitch).astype(np.float32), functools.partial(_uniform, keys)


def _around(axes: Sequence[np.ndarray], point: np.ndarray, radius: float) -> tuple[tuple[slice, ...], list[np.ndarray]]:
    """Returns the part of an image that something at a point may touch, and the way there from the point, per axis."""
    reach = radius + 14 * EDGE  # what is further outside is less than a millionth
    ends = [np.searchsorted(axis, (at - reach, at + reach)) for axis, at in zip(axes, point, strict=True)]
    part = tuple(slice(*end) for end in ends)
    away = [axis[along] - at for axis, along, at in zip(axes, part, point, strict=True)]
    return part, np.meshgrid(*away, indexing="ij", sparse=True)


def _dot(a: Sequence[np.ndarray], b: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _direction(chance: Chance, first: int, axes: int) -> np.ndarray:
    """A unit vector, from uniform numbers, evenly over the circle or the sphere."""
    angle = 2 * np.pi * chance(first)
    if axes == 2:
        return np.stack((np.cos(angle), np.sin(angle)), axis=-1)
    height = 2 * chance(first + 1) - 1
    width = np.sqrt(1 - height**2)
    return np.stack((height, width * np.cos(angle), width * np.sin(angle)), axis=-1)


def _hash(point: np.ndarray, seed: int) -> np.ndarray:
    """A number of 64 bits for each lattice point."""
    key = np.full(point.shape[:-1], seed, np.uint64)
    for axis in range(point.shape[-1]):
        key = _mix(key ^ point[..., axis].astype(np.uint64))
    return key


def _uniform(key: np.ndarray, index: int) -> np.ndarray:
    return (_mix(key + np.uint64(index + 1)) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
