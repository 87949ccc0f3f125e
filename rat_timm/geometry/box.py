"""Boxes of places on a grid: what is read, computed or written at once."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .grid import Grid

_ROUNDING = 1e-6  # of a place's width: what `rat_timm.geometry.sample` takes for a centre


class Box(NamedTuple):
    """Places from ``start`` to before ``stop`` along each axis, in array-axis order (z, y, x).

    Attributes:
        start: The first place along each axis.
        stop: The place after the last one.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Box":
        """Returns the box of all places of a grid."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of places along each axis."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of places."""
        return math.prod(max(0, n) for n in self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index of an array."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def clipped(self, shape: Sequence[int]) -> "Box":
        """Returns the part that lies on a grid of a shape."""
        return self & Box.whole(shape)

    def __and__(self, other: "Box") -> "Box":
        """Returns what both have."""
        return Box(_each(max, self.start, other.start), _each(min, self.stop, other.stop))

    def __or__(self, other: "Box") -> "Box":
        """Returns the smallest box around both."""
        return Box(_each(min, self.start, other.start), _each(max, self.stop, other.stop))

    def grown(self, by: Sequence[int]) -> "Box":
        """Returns a box that reaches so much further on both sides."""
        start = tuple(a - n for a, n in zip(self.start, by, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, by, strict=True)))

    def moved(self, by: Sequence[int]) -> "Box":
        """Returns a box of the same shape that many places further on."""
        start = tuple(a + n for a, n in zip(self.start, by, strict=True))
        return Box(start, tuple(b + n for b, n in zip(self.stop, by, strict=True)))

    def inside(self, other: "Box") -> "Box":
        """Returns the same places, counted from where another box starts."""
        return self.moved([-n for n in other.start])

    def aligned(self, step: Sequence[int]) -> "Box":
        """Returns the smallest box around it that starts and ends at multiples of ``step``."""
        start = tuple(a // n * n for a, n in zip(self.start, step, strict=True))
        return Box(start, tuple(-(-b // n) * n for b, n in zip(self.stop, step, strict=True)))


def _each(function: Callable[[int, int], int], one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(function(a, b) for a, b in zip(one, other, strict=True))


def part_of(grid: Grid, box: Box) -> Grid:
    """Returns the grid of the places in a box."""
    start = grid.spacing.new_tensor(box.start)
    numbers = grid.numbers.moved([1] * len(box.start), box.start)
    return Grid(box.shape, grid.spacing, grid.origin + start * grid.spacing, numbers)


def places_around(box: Box, grid: Grid, other: Grid) -> Box:
    """Returns the places of another grid between which the places of a box lie, as interpolation needs them.

    Args:
        box: Places of ``grid``.
        grid: Its spacing and origin have one row.
        other: Likewise.
    """
    start, stop = [], []
    for axis, n in enumerate(other.shape):
        step, first = (float(values[0, axis]) for values in (grid.spacing, grid.origin))
        other_step, other_first = (float(values[0, axis]) for values in (other.spacing, other.origin))
        ends = [(first + at * step - other_first) / other_step for at in (box.start[axis], box.stop[axis] - 1)]
        low, high = (min(max(end, 0), n - 1) for end in ends)
        start.append(math.floor(low + _ROUNDING))
        stop.append(math.ceil(high - _ROUNDING) + 1)
    return Box(tuple(start), tuple(stop))
