"""How axes are cut into tiles: the numbers behind `rat_timm.ops.windows`, worked out by NumPy once per size."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class AxisTiles(NamedTuple):
    """How one axis is cut: T tiles of b queries, each with w keys. Every place of the axis stands in a tile.

    Attributes:
        queries: Place of each query, ``[T, b]``.
        keys: Place of each key, ``[T, w]``.
        allowed: Which key lies in which query's window, ``[T, b, w]``, bool.
    """

    queries: Array
    keys: Array
    allowed: Array

    @classmethod
    def create(cls, first: Array, last: Array, size: int) -> "AxisTiles":
        """Cuts an axis into tiles of ``size`` queries, and gives each tile the keys from its first to its last.

        Args:
            first: The first key in each query's window, ``[queries]``, ascending.
            last: The last one, likewise.
            size: Number of queries in a tile.
        """
        queries = stretches(range(0, len(first), size), size, len(first))
        first, last = first[queries], last[queries]  # [T, b]
        most = int((last[:, -1] - first[:, 0]).max()) + 1
        keys = stretches(first[:, 0], most, int(last.max()) + 1)
        return cls(queries, keys, (first[:, :, None] <= keys[:, None]) & (keys[:, None] <= last[:, :, None]))

    def steps(self, reach: int) -> Array:
        """Returns how far each key is from each query, ``[T, b, w]``: 0 if ``reach`` places before, -1 if not seen."""
        return np.where(self.allowed, self.keys[:, None] - self.queries[:, :, None] + reach, -1)

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of places of the queries' and of the keys' axis."""
        return int(self.queries.max()) + 1, int(self.keys.max()) + 1


def stretches(starts: Sequence[int] | Array, size: int, length: int) -> Array:
    """Returns stretches of ``size`` places of an axis, ``[T, size]``: moved inwards at the border, cut to the axis."""
    size = min(size, length)
    return np.clip(np.asarray(starts), 0, length - size)[:, None] + np.arange(size)


def by_row(index: Array, rows: int) -> tuple[Array, Array]:
    """Returns the entries of an index sorted by row, and where each row's begin, ``[rows + 1]``."""
    starts = np.concatenate(([0], np.bincount(index, minlength=rows).cumsum()))
    return index.argsort(kind="stable"), starts


def _spread(axes: Sequence[Array]) -> list[Array]:
    """Makes ``[T, n, ...]`` of each axis broadcast to ``[T, T', ..., n, n', ...]`` of all axes."""
    shapes = [np.ones(axis.ndim * len(axes), int) for axis in axes]
    for number, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
        shape[number :: len(axes)] = axis.shape
    return [axis.reshape(shape) for axis, shape in zip(axes, shapes, strict=True)]


def ravel(axes: Sequence[Array], shape: Sequence[int]) -> Array:
    """Combines indices of each axis into one of the flat grid, ``[T * T' * n * n']``."""
    return np.ravel_multi_index(_spread(axes), tuple(shape)).ravel()


def distinct(patterns: Array) -> tuple[Array, Array]:
    """Returns the distinct patterns of ``[T, b, w]`` as they come, and which of them each tile has, ``[T]``."""
    _, first, kind = np.unique(patterns, axis=0, return_index=True, return_inverse=True)
    return patterns[np.sort(first)], first.argsort().argsort()[kind.ravel()]


def outer_and(axes: Sequence[Array]) -> Array:
    """Combines patterns ``[kinds, b, w]`` of each axis into ``[kinds, queries, keys]``."""
    both = functools.reduce(np.logical_and, _spread(axes))
    return both.reshape([math.prod(sizes) for sizes in zip(*(axis.shape for axis in axes), strict=True)])


def outer_entries(axes: Sequence[Array], shape: Sequence[int]) -> Array:
    """Combines steps ``[kinds, b, w]`` of each axis into entries of a flat table of ``shape``.

    Returns:
        ``[kinds, queries, keys]``; where a key is not seen, the number of entries.
    """
    seen = outer_and([axis >= 0 for axis in axes])
    entries = np.ravel_multi_index([np.maximum(axis, 0) for axis in _spread(axes)], tuple(shape))
    return np.where(seen, entries.reshape(seen.shape), math.prod(shape))
