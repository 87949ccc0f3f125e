"""Things at random places of physical space: the same whatever part of it is looked at, and at any pixel size.

A place is a point of a disturbed lattice; what is there follows from its index in the lattice and a seed alone.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

EDGE = 0.3  # micrometres over which something ends

Chance = Callable[[int], np.ndarray]  # from the index of a number to that number, between 0 and 1, of each point


def edge(depth: np.ndarray) -> np.ndarray:
    """From 0 outside to 1 inside, over about a micrometre."""
    return 1 / (1 + np.exp(-np.clip(depth / EDGE, -30, 30)))


def area_axes(
    size: Sequence[int], spacing: Sequence[float], corner: Sequence[float], fine: float
) -> tuple[list[np.ndarray], list[int]]:
    """Returns where a field of view is sampled, per axis, and how many samples a pixel is the mean of (see `pixels`).

    Args:
        size: Pixels.
        spacing: Their size in micrometres.
        corner: Where the field of view begins.
        fine: Micrometres between samples, at most.
    """
    parts = [max(1, int(np.ceil(step / fine))) for step in spacing]
    axes = [
        (begin + (np.arange(n * p) + 0.5) * step / p).astype(np.float32)
        for n, p, step, begin in zip(size, parts, spacing, corner, strict=True)
    ]
    return axes, parts


def pixels(image: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Averages an image over so many samples per pixel and axis."""
    split = image.reshape([n for size, p in zip(image.shape, parts, strict=True) for n in (size // p, p)])
    return split.mean(axis=tuple(range(1, split.ndim, 2)))


def lattice(axes: Sequence[np.ndarray], pitch: float, seed: int, disturbed: float = 0.35) -> tuple[np.ndarray, Chance]:
    """Returns the points ``[N, axes]`` of a disturbed lattice in and around a field of view, and their chance.

    Args:
        axes: Positions of the field's pixels along each axis.
        pitch: Distance of neighbours before they are disturbed.
        seed: What else they depend on.
        disturbed: How far a point is from its place at most, along each axis, in pitches.
    """
    ends = np.array([axis[[0, -1]] for axis in axes]) / pitch
    first, last = np.round(ends).astype(np.int64).T
    box = np.stack(np.meshgrid(*map(np.arange, first - 1, last + 2), indexing="ij"), axis=-1).reshape(-1, len(axes))
    keys = _hash(box, seed)
    moves = np.stack([_uniform(keys, 16 + axis) for axis in range(len(axes))], axis=-1)
    return ((box + disturbed * (2 * moves - 1)) * pitch).astype(np.float32), functools.partial(_uniform, keys)


def around(axes: Sequence[np.ndarray], point: np.ndarray, radius: float) -> tuple[tuple[slice, ...], list[np.ndarray]]:
    """Returns the part of an image that something at a point may touch, and the way there from the point, per axis."""
    reach = radius + 14 * EDGE  # what is further outside is less than a millionth
    ends = [np.searchsorted(axis, (at - reach, at + reach)) for axis, at in zip(axes, point, strict=True)]
    part = tuple(slice(*end) for end in ends)
    away = [axis[along] - at for axis, along, at in zip(axes, part, point, strict=True)]
    return part, np.meshgrid(*away, indexing="ij", sparse=True)


def dot(a: Sequence[np.ndarray], b: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Returns the scalar product, over the axes, of vectors that are given axis by axis."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def direction(chance: Chance, first: int, axes: int) -> np.ndarray:
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
