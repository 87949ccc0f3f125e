"""Windowed attention as a few dense products: tiles of queries, each with all the keys that its windows reach.

One axis of 10 places, windows of 3 places, tiles of 4 queries. Around a tile's queries lies the halo: keys that its
windows reach too. Where tiles do not fit, the last one is moved inwards and repeats queries; so are keys at the border,
so that all tiles have as many.

    place     0  1  2  3  4  5  6  7  8  9
    tile 0    q  q  q  q  .  .                    q  query, and key
    tile 1             .  q  q  q  q  .           .  key of the halo
    tile 2                .  .  r  r  q  q        r  query that an earlier tile has, and key

What attention does on this axis: it gathers queries by the index ``0 1 2 3 | 4 5 6 7 | 6 7 8 9`` and keys and values by
``0 1 2 3 4 5 | 3 4 5 6 7 8 | 4 5 6 7 8 9``, attends inside each tile where the window allows it, and takes each query
back from the first tile that has it, by ``0 1 2 3 4 5 6 7 10 11``. Grids are products of their axes.

A gather index knows places alone, not samples, heads or channels: one row of numbers is all that a batch holds at one
place. It depends on sizes only; it is made once by NumPy and kept. Programs (torch.compile, torch.export) have it as a
constant.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..geometry.plans import is_traced
from .masking import has_gradient, log_sum_exp, mask_value

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

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of places of the queries' and of the keys' axis."""
        return int(self.queries.max()) + 1, int(self.keys.max()) + 1


def stretches(starts: Sequence[int] | Array, size: int, length: int) -> Array:
    """Returns stretches of ``size`` places of an axis, ``[T, size]``: moved inwards at the border, cut to the axis."""
    size = min(size, length)
    return np.clip(np.asarray(starts), 0, length - size)[:, None] + np.arange(size)


class RowIndex(NamedTuple):
    """An index of rows, and the same by row, so that a sum over repetitions takes one pass.

    Attributes:
        row: Row of each entry, ``[entries]``.
        order: Entries sorted by row; None in a part of an index, which has no gradient, and in exports.
        starts: Where each row's entries begin in ``order``, ``[rows + 1]``; None likewise.
    """

    row: Tensor
    order: Tensor | None
    starts: Tensor | None

    @classmethod
    def create(cls, index: Array, rows: int, device: torch.device) -> "RowIndex":
        """Sorts an index of ``rows`` rows."""
        if torch.compiler.is_exporting():  # constants of a program stay in it, used or not
            return cls(tensor_of(index, device), None, None)
        return cls(*(tensor_of(part, device) for part in (index, *_by_row(index, rows))))

    def take(self, x: Tensor) -> Tensor:
        """``[rows, C]`` -> ``[entries, C]``."""
        if self.order is None or not has_gradient(x) or is_plain(x):
            return x.index_select(0, self.row)
        return _Take.apply(x, self)

    def add(self, x: Tensor) -> Tensor:
        """``[entries, C]`` -> ``[rows, C]``, summing repetitions: `take` transposed."""
        return _Add.apply(x, self)


class _OfRows(torch.autograd.Function):
    """A linear function of ``[rows, C]`` that a `RowIndex` describes."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, RowIndex], output: Tensor) -> None:
        ctx.rows = inputs[1]


class _Take(_OfRows):
    """`RowIndex.take`, whose gradient is summed in one pass and not row by row."""

    @staticmethod
    def forward(x: Tensor, rows: RowIndex) -> Tensor:
        return x.index_select(0, rows.row)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, rows: None) -> Tensor:
        return _Take.forward(x, ctx.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Add.apply(grad, ctx.rows), None


class _Add(_OfRows):
    """`RowIndex.add`."""

    @staticmethod
    def forward(x: Tensor, rows: RowIndex) -> Tensor:
        assert rows.order is not None
        return F.embedding_bag(rows.order, x, rows.starts, mode="sum", include_last_offset=True)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, rows: None) -> Tensor:
        return _Add.forward(x, ctx.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Take.apply(grad, ctx.rows), None


class Gather(NamedTuple):
    """Which places of a grid stand in which tile.

    Attributes:
        rows: Index of the flat grid's places, over ``tiles x places``.
        tiles: Number of tiles.
        places: Number of places in a tile.
        shape: The grid.
    """

    rows: RowIndex
    tiles: int
    places: int
    shape: tuple[int, ...]

    @classmethod
    def create(cls, place: Array, shape: tuple[int, ...], device: torch.device) -> "Gather":
        """Takes places of the flat grid, ``[tiles, places]``."""
        return cls(RowIndex.create(place.ravel(), math.prod(shape), device), len(place), place.shape[1], shape)

    def take(self, x: Tensor) -> Tensor:
        """``[B, *grid, heads, d]`` -> ``[tiles, B, heads, places, d]``, in memory ``[tiles, places, B, heads, d]``."""
        rows = x.flatten(1, -3).transpose(0, 1)  # [N, B, heads, d]
        taken = self.rows.take(rows.flatten(1))
        return taken.view(self.tiles, self.places, *rows.shape[1:]).permute(0, 2, 3, 1, 4)

    def take_in_program(self, x: Tensor) -> Tensor:
        """``[B, *grid, heads, d]`` -> ``[B * tiles, heads, places, d]``: what `take` gives, in few operations."""
        taken = _places_of(x, math.prod(self.shape)).index_select(1, self.rows.row)  # [B, tiles * places, heads * d]
        return taken.reshape(-1, self.places, *x.shape[-2:]).transpose(1, 2)

    def add(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, places, d]`` -> ``[B, *grid, heads, d]``, summing overlaps: `take` transposed."""
        return _unflatten(self.rows.add(_flatten(x)), self.shape, x)

    def take_mask(self, mask: Tensor) -> Tensor:
        """``[B, *grid]`` -> ``[tiles, B, places]``."""
        return self.take(mask[..., None, None])[:, :, 0, :, 0]

    def part(self, start: int, stop: int) -> "Gather":
        """Returns the places of some tiles."""
        part = self.rows.row[start * self.places : stop * self.places]
        return Gather(RowIndex(part, None, None), stop - start, self.places, self.shape)


class Overlaps(NamedTuple):
    """Where each place of a grid stands in tiles, padded to the most that one has.

    Attributes:
        entry: Where, over ``tiles x places``, ``[N, K]``.
        held: Whether the place stands there, ``[N, K]``: some stand in fewer tiles than others.
        shape: The grid.
        entries: ``tiles x places``.
    """

    entry: Tensor
    held: Tensor
    shape: tuple[int, ...]
    entries: int

    @classmethod
    def create(cls, place: Array, shape: tuple[int, ...], device: torch.device) -> "Overlaps":
        """Takes places of the flat grid, ``[tiles, places]``."""
        order, starts = _by_row(place.ravel(), math.prod(shape))
        counts = np.diff(starts)[:, None]
        number = np.arange(counts.max())
        entry = order[np.minimum(starts[:-1, None] + number, len(order) - 1)]
        return cls(tensor_of(entry, device), tensor_of(number < counts, device), shape, len(order))

    def reduce(self, x: Tensor, combine: Callable[[Tensor, int], Tensor], absent: float) -> Tensor:
        """Combines overlaps of ``[tiles, B, heads, places, d]`` into ``[B, *grid, heads, d]``.

        Args:
            x: What the tiles hold.
            combine: Reduces the dimension that it is given, in which one place's values stand.
            absent: What changes no result of it.
        """
        rows = _flatten(x).index_select(0, self.entry.flatten()).unflatten(0, self.entry.shape)  # [N, K, C]
        return _unflatten(combine(torch.where(self.held.unsqueeze(-1), rows, absent), 1), self.shape, x)

    def reduce_in_program(self, x: Tensor, combine: Callable[[Tensor, int], Tensor], absent: float) -> Tensor:
        """Combines overlaps of ``[B * tiles, heads, places, d]`` into ``[B, N, heads * d]``: `reduce`, exported."""
        rows = _places_of(x.transpose(1, 2), self.entries).index_select(1, self.entry.flatten())
        rows = rows.reshape(-1, *self.entry.shape, rows.shape[-1])  # [B, N, K, heads * d]
        return combine(torch.where(self.held.unsqueeze(-1), rows, absent), 2)


class Tiles(NamedTuple):
    """How queries and keys on their grids are cut into tiles.

    Attributes:
        queries: The tiles' queries.
        keys: The tiles' keys.
        once: Where each query stands in the first tile that has it, over ``tiles x queries``.
        repeated: Whether an earlier tile has a query, ``[tiles, queries]``; None if none does.
        kinds: The distinct patterns of which key lies in which query's window, ``[kinds, queries, keys]``, bool.
        kind: Which of them a tile has, ``[tiles]``, ascending.
        counts: How many tiles have each kind.
        overlaps: Where each key stands in the tiles, if asked for.
        bias: What is added to the logits of a batch, ``[B * tiles, 1, queries, keys]``; in exports alone, where several
            calls share it.
    """

    queries: Gather
    keys: Gather
    once: RowIndex
    repeated: Tensor | None
    kinds: Tensor
    kind: Tensor
    counts: tuple[int, ...]
    overlaps: Overlaps | None
    bias: Tensor | None = None

    @classmethod
    def create(cls, axes: Sequence[AxisTiles], device: torch.device, with_overlaps: bool = False) -> "Tiles":
        """Combines the tiles of all axes."""
        patterns, pattern = zip(*(_distinct(axis.allowed) for axis in axes), strict=True)
        kind = _ravel(pattern, [len(each) for each in patterns])
        order, (shape, key_shape) = kind.argsort(kind="stable"), zip(*(axis.lengths for axis in axes), strict=True)
        queries = _ravel([axis.queries for axis in axes], shape).reshape(len(kind), -1)[order]
        keys = _ravel([axis.keys for axis in axes], key_shape).reshape(len(kind), -1)[order]
        once = np.unique(queries, return_index=True)[1]
        repeated = np.ones(queries.shape, bool)
        repeated.flat[once] = False
        return cls(
            queries=Gather.create(queries, shape, device),
            keys=Gather.create(keys, key_shape, device),
            once=RowIndex.create(once, queries.size, device),
            repeated=tensor_of(repeated, device) if repeated.any() else None,
            kinds=tensor_of(_outer_and(patterns), device),
            kind=tensor_of(kind[order], device),
            counts=tuple(np.bincount(kind).tolist()),
            overlaps=Overlaps.create(keys, key_shape, device) if with_overlaps else None,
        )

    def untile(self, *parts: Tensor) -> Tensor:
        """``[tiles, B, heads, queries, d]`` -> ``[B, *grid, heads, d]``, taking each query once.

        Args:
            *parts: What `split` parts of the tiles hold, in order.
        """
        rows = [_flatten(part) for part in parts]
        return _unflatten(self.once.take(rows[0] if len(rows) == 1 else torch.cat(rows)), self.queries.shape, parts[0])

    def untile_in_program(self, x: Tensor) -> Tensor:
        """``[B * tiles, heads, queries, d]`` -> ``[B, *grid, heads, d]``: `Gather.take_in_program` undone."""
        rows = _places_of(x.transpose(1, 2), self.queries.tiles * self.queries.places)
        return rows.index_select(1, self.once.row).reshape(-1, *self.queries.shape, x.shape[1], x.shape[3])

    def add_keys(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, keys, d]`` -> ``[B, *grid, heads, d]``, summing overlaps."""
        if is_plain(x):
            return self._overlaps().reduce(x, torch.sum, 0.0)
        return self.keys.add(x)

    def add_keys_in_program(self, x: Tensor) -> Tensor:
        """``[B * tiles, heads, keys, d]`` -> ``[B, *grid, heads, d]``: `add_keys`, exported."""
        rows = self._overlaps().reduce_in_program(x, torch.sum, 0.0)
        return rows.reshape(-1, *self.keys.shape, x.shape[1], x.shape[3])

    def log_sum_exp_in_program(self, x: Tensor) -> Tensor:
        """Adds up overlaps of logarithms ``[B * tiles, heads, keys]`` in all their tiles: `log_sum_exp`, exported."""
        total = self._overlaps().reduce_in_program(x.unsqueeze(-1), log_sum_exp, mask_value(x.dtype))  # [B, N, heads]
        return self.keys.take_in_program(total.unsqueeze(-1)).squeeze(-1)

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Adds up overlaps of ``[tiles, B, heads, keys]``, given and returned as logarithms, in all their tiles."""
        total = self._overlaps().reduce(x.unsqueeze(-1), log_sum_exp, mask_value(x.dtype))
        return self.keys.take(total).squeeze(-1)

    def _overlaps(self) -> Overlaps:
        assert self.overlaps is not None
        return self.overlaps

    def split(self, size: int, mixed: int) -> "list[Tiles]":
        """Returns the tiles in parts, from which to take without a gradient.

        Args:
            size: Number of tiles in a part of one kind, at most.
            mixed: Number of tiles in a part of several kinds, at most.
        """
        parts, start = [], 0
        for kinds in _bundles(self.counts, mixed):
            stop = start + sum(self.counts[kinds])
            parts += [self._part(first, min(first + size, stop), kinds) for first in range(start, stop, size)]
            start = stop
        return parts

    def _part(self, start: int, stop: int, kinds: slice) -> "Tiles":
        return self._replace(
            queries=self.queries.part(start, stop),
            keys=self.keys.part(start, stop),
            repeated=None if self.repeated is None else self.repeated[start:stop],
            kinds=self.kinds[kinds],
            kind=self.kind[start:stop] - kinds.start,
            counts=self.counts[kinds],
        )

    def allowed(self) -> Tensor:
        """Returns which key lies in which query's window, ``[tiles, queries, keys]``, bool."""
        return self.of_tiles(self.kinds)

    def of_tiles(self, x: Tensor) -> Tensor:
        """``[kinds, ...]`` -> ``[tiles, ...]``, without a copy if the tiles are of one kind."""
        if len(self.counts) == 1:
            return x.expand(self.queries.tiles, *x.shape[1:])
        return x.index_select(0, self.kind)


def is_plain(x: Tensor) -> bool:
    """Tells whether PyTorch's own operations have to do: a compiler fuses them, and not every device has bags."""
    return is_traced() or x.device.type not in ("cpu", "cuda")


def _places_of(x: Tensor, places: int) -> Tensor:
    """``[..., heads, d]`` -> ``[-1, places, heads * d]``: no size is asked for, which is some nodes of a program."""
    return x.reshape(-1, places, x.shape[-2] * x.shape[-1])


def _flatten(x: Tensor) -> Tensor:
    """``[tiles, B, heads, places, d]`` -> ``[tiles * places, B * heads * d]``."""
    return x.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)


def _unflatten(rows: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """``[N, B * heads * d]`` -> ``[B, *shape, heads, d]``, sizes being those of ``like`` ``[..., B, heads, _, d]``."""
    batch, heads, _, width = like.shape[-4:]
    return rows.unflatten(1, (batch, heads, width)).transpose(0, 1).unflatten(1, tuple(shape))


def _by_row(index: Array, rows: int) -> tuple[Array, Array]:
    """Returns the entries of an index sorted by row, and where each row's begin, ``[rows + 1]``."""
    starts = np.concatenate(([0], np.bincount(index, minlength=rows).cumsum()))
    return index.argsort(kind="stable"), starts


def _spread(axes: Sequence[Array]) -> list[Array]:
    """Makes ``[T, n, ...]`` of each axis broadcast to ``[T, T', ..., n, n', ...]`` of all axes."""
    shapes = [np.ones(axis.ndim * len(axes), int) for axis in axes]
    for number, (axis, shape) in enumerate(zip(axes, shapes, strict=True)):
        shape[number :: len(axes)] = axis.shape
    return [axis.reshape(shape) for axis, shape in zip(axes, shapes, strict=True)]


def _ravel(axes: Sequence[Array], shape: Sequence[int]) -> Array:
    """Combines indices of each axis into one of the flat grid, ``[T * T' * n * n']``."""
    return np.ravel_multi_index(_spread(axes), tuple(shape)).ravel()


def _distinct(allowed: Array) -> tuple[Array, Array]:
    """Returns the distinct patterns of ``[T, b, w]`` as they come, and which of them each tile has, ``[T]``."""
    _, first, kind = np.unique(allowed, axis=0, return_index=True, return_inverse=True)
    return allowed[np.sort(first)], first.argsort().argsort()[kind.ravel()]


def _bundles(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Bundles kinds, of which each has so many tiles, into slices of no more than ``most`` tiles, or of one kind."""
    first = tiles = 0
    for kind, count in enumerate(counts):
        if kind > first and tiles + count > most:
            yield slice(first, kind)
            first, tiles = kind, 0
        tiles += count
    yield slice(first, len(counts))


def _outer_and(axes: Sequence[Array]) -> Array:
    """Combines patterns ``[kinds, b, w]`` of each axis into ``[kinds, queries, keys]``."""
    both = functools.reduce(np.logical_and, _spread(axes))
    return both.reshape([math.prod(sizes) for sizes in zip(*(axis.shape for axis in axes), strict=True)])


def tensor_of(array: Array, device: torch.device) -> Tensor:
    """Returns whole numbers, as int32, or a bool array as a tensor."""
    tensor = torch.from_numpy(array if array.dtype == bool else array.astype(np.int32))
    return tensor if tensor.device == device else tensor.to(device)  # a move to the same place is nodes of a program
