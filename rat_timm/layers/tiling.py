"""Windowed attention as a few dense products: tiles of queries, each with all the keys that its windows reach.

What depends on sizes alone, and not on data, is made once per geometry and kept.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .masking import exp_beside_one

_KEPT = 24  # plans kept, for as many sizes of grids, windows and batches

P = ParamSpec("P")
R = TypeVar("R")


class AxisTiles(NamedTuple):
    """How one axis is cut: T tiles of b queries, each with w keys.

    Attributes:
        queries: Query index, ``[T, b]``. The last tile is moved inwards where tiles do not fit: it repeats queries.
        keys: Key index, ``[T, w]``.
        allowed: Which key lies in which query's window, ``[T, b, w]``, bool.
        query_length: Number of queries on the axis.
        key_length: Number of keys on the axis.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor
    query_length: int
    key_length: int

    def once(self) -> tuple[Tensor, Tensor]:
        """Returns the first tile of each query and its place there, each ``[1, query_length]``."""
        count, size = self.queries.shape
        place = torch.arange(self.query_length, device=self.queries.device)
        last = (count - 1) * size
        place = torch.where(place < last, place, place + last + size - self.query_length)
        tile = place.div(size, rounding_mode="floor")
        return tile[None], (place - tile * size)[None]

    def repeated(self) -> Tensor:
        """Returns whether a query stands in an earlier tile too, ``[T, b]``."""
        count, size = self.queries.shape
        return self.queries < (torch.arange(count, device=self.queries.device) * size)[:, None]

    def kinds(self) -> tuple[Tensor, Tensor]:
        """Returns the distinct patterns of ``allowed``, ``[kinds, b, w]``, and which of them a tile has, ``[T, 1]``."""
        if is_traced() or self.allowed.is_meta:  # how many there are depends on data
            return self.allowed, torch.arange(len(self.allowed), device=self.allowed.device)[:, None]
        kinds, kind = torch.unique(self.allowed, dim=0, return_inverse=True)
        return kinds, kind[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where the tiles' places stand in tensors ``[B, *grid, heads, d]``.

    Attributes:
        rows: Index of rows of d numbers, flat over ``[tiles, B, heads, places]``.
        sizes: The number of tiles, samples, heads and places.
        count: The number of rows that the index is for.
    """

    rows: Tensor
    sizes: tuple[int, int, int, int]
    count: int

    def take(self, x: Tensor) -> Tensor:
        """``[B, *grid, heads, d]`` -> ``[tiles, B, heads, places, d]``."""
        rows = _rows(x)
        taken = rows.index_select(0, self.rows) if self._plain(x) else _Take.apply(rows, self)
        return taken.view(*self.sizes, x.shape[-1])

    def add(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """``[tiles, B, heads, places, d]`` -> ``[B, *shape, heads, d]``, summing overlaps: `take` transposed."""
        rows = _rows(x)
        if self._plain(x):
            total = x.new_zeros((self.count, x.shape[-1])).index_add(0, self.rows, rows)
        else:
            total = _Add.apply(rows, self)
        return total.view(self.sizes[1], *shape, self.sizes[2], x.shape[-1])

    def _plain(self, x: Tensor) -> bool:
        """Tells whether PyTorch's own scatter has to do: a compiler fuses it, and not every device has bags."""
        return is_traced() or x.device.type not in ("cpu", "cuda")

    @functools.cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """Which places stand at each row: their index, sorted by row, and where each row's begin."""
        with torch.inference_mode(False):
            sizes = torch.bincount(self.rows, minlength=self.count)
            starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
            return self.rows.argsort(stable=True), starts

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Adds up overlaps of ``[tiles, B, heads, places]``, given and returned as logarithms, in all their tiles."""
        flat = x.flatten()
        lowest = x.new_full((self.count,), torch.finfo(x.dtype).min)
        peak = lowest.scatter_reduce(0, self.rows, flat.detach(), "amax")
        parts = exp_beside_one(flat - peak.index_select(0, self.rows))
        total = torch.zeros_like(peak).index_add(0, self.rows, parts)
        return (peak + total.log()).index_select(0, self.rows).view_as(x)

    def split(self, size: int) -> "list[Places]":
        """Returns the places of ``size`` tiles at a time."""
        parts = self.rows.split(size * math.prod(self.sizes[1:]))
        tiles = [rows.numel() // math.prod(self.sizes[1:]) for rows in parts]
        return [Places(rows, (n, *self.sizes[1:]), self.count) for rows, n in zip(parts, tiles, strict=True)]

    def of_one_head(self) -> "Places":
        """Returns the same places in tensors of one head."""
        tiles, batch, heads, places = self.sizes
        rows = self.rows.view(self.sizes)[:, :, 0].flatten().div(heads, rounding_mode="floor")
        return Places(rows, (tiles, batch, 1, places), self.count // heads)

    def take_mask(self, mask: Tensor) -> Tensor:
        """``[B, *grid]`` -> ``[tiles, B, places]``."""
        return self.of_one_head().take(mask[..., None, None])[:, :, 0, :, 0]


torch.utils._pytree.register_dataclass(Places, field_names=["rows", "sizes", "count"])


class _OfPlaces(torch.autograd.Function):
    """A linear function of rows ``[rows, d]`` that `Places` describe."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Places], output: Tensor) -> None:
        ctx.places = inputs[1]


class _Take(_OfPlaces):
    """`Places.take` of rows, whose gradient is summed in one pass and not row by row."""

    @staticmethod
    def forward(x: Tensor, places: Places) -> Tensor:
        return x.index_select(0, places.rows)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, places: None) -> Tensor:
        return _Take.forward(x, ctx.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Add.apply(grad, ctx.places), None


class _Add(_OfPlaces):
    """`Places.add` of rows."""

    @staticmethod
    def forward(x: Tensor, places: Places) -> Tensor:
        order, starts = places.bags
        return F.embedding_bag(order, x, starts, mode="sum", include_last_offset=True)

    @staticmethod
    def jvp(ctx: Any, x: Tensor, places: None) -> Tensor:
        return _Add.forward(x, ctx.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Take.apply(grad, ctx.places), None


class Tiles(NamedTuple):
    """How queries and keys on their grids are cut into tiles.

    Attributes:
        queries: Where the tiles' queries stand.
        keys: Where the tiles' keys stand.
        once: Where each query stands in its first tile: rows of ``[tiles, B, heads, places, d]``, for one tile with the
            grid's places.
        repeated: Whether a query stands in an earlier tile too, ``[tiles, queries]``; None if none does.
        kinds: The distinct patterns of which key lies in which query's window, ``[kinds, queries, keys]``, bool.
        kind: Which of them a tile has, ``[tiles]``.
        shape: The queries' grid.
    """

    queries: Places
    keys: Places
    once: Places
    repeated: Tensor | None
    kinds: Tensor
    kind: Tensor
    shape: tuple[int, ...]

    @classmethod
    def create(cls, axes: Sequence[AxisTiles], batch: int, heads: int) -> "Tiles":
        """Combines the tiles of all axes, for tensors of ``batch`` samples and ``heads`` heads."""
        shape, key_shape = [axis.query_length for axis in axes], [axis.key_length for axis in axes]
        counts, sizes = zip(*(axis.queries.shape for axis in axes), strict=True)
        tiles, places = zip(*(axis.once() for axis in axes), strict=True)
        tile, place = _ravel(tiles, counts), _ravel(places, sizes)
        kinds, kind = zip(*(axis.kinds() for axis in axes), strict=True)
        moved = any(count * size != length for count, size, length in zip(counts, sizes, shape, strict=True))
        return cls(
            queries=_places(_ravel([axis.queries for axis in axes], shape), math.prod(shape), batch, heads),
            keys=_places(_ravel([axis.keys for axis in axes], key_shape), math.prod(key_shape), batch, heads),
            once=_once(tile[0], place[0], math.prod(counts), math.prod(sizes), batch, heads),
            repeated=_combine(operator.or_, [axis.repeated()[..., None] for axis in axes])[..., 0] if moved else None,
            kinds=_combine(operator.and_, kinds),
            kind=_ravel(kind, [len(k) for k in kinds])[:, 0],
            shape=tuple(shape),
        )

    def untile(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, queries, d]`` -> ``[B, *shape, heads, d]``, taking each query once."""
        _, batch, heads, _ = self.queries.sizes
        return self.once.take(x).view(batch, *self.shape, heads, x.shape[-1])

    def of_one_head(self) -> "Tiles":
        """Returns the same tiles for tensors of one head."""
        tiles, batch, heads, size = self.queries.sizes
        count = math.prod(self.shape)
        rows = self.once.rows.view(batch, count, heads)[:, :, 0].flatten()
        first = rows.div(size * heads, rounding_mode="floor") * size + rows % size
        once = Places(first, (1, batch, count, 1), tiles * batch * size)
        return self._replace(queries=self.queries.of_one_head(), keys=self.keys.of_one_head(), once=once)

    def split(self, size: int) -> "list[Tiles]":
        """Returns the tiles in parts of ``size`` tiles."""
        if size >= len(self.kind):
            return [self]
        kind = self.kind.split(size)
        repeated = [None] * len(kind) if self.repeated is None else self.repeated.split(size)
        parts = zip(self.queries.split(size), self.keys.split(size), repeated, kind, strict=True)
        return [self._replace(queries=q, keys=k, repeated=r, kind=n) for q, k, r, n in parts]

    def allowed(self) -> Tensor:
        """Returns which key lies in which query's window, ``[tiles, queries, keys]``, bool."""
        return self.kinds.index_select(0, self.kind)


def per_geometry(build: Callable[P, R]) -> Callable[P, R]:
    """Keeps what a function of numbers, tuples and a device makes, but for tensors that belong to a tracer."""
    kept = functools.lru_cache(_KEPT)(build)

    @functools.wraps(build)
    def find(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_traced():
            return build(*args, **kwargs)
        with torch.inference_mode(False):  # what is kept serves training too
            return kept(*args, **kwargs)  # type: ignore[arg-type]

    return find


def is_traced() -> bool:
    """Tells whether tensors made here and now stand for others: those of a compiler, a fake mode, `torch.func`."""
    if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
        return True
    return torch._C._are_functorch_transforms_active()


def query_tiles(length: int, size: int, device: torch.device) -> Tensor:
    """Cuts ``length`` queries into tiles of ``size``: their index, ``[T, b]``."""
    start = (torch.arange(-(-length // size), device=device) * size).clamp(max=length - size)
    return start[:, None] + torch.arange(size, device=device)


def key_tiles(start: Tensor, size: int, length: int) -> Tensor:
    """Returns ``[T, w]``: for each tile ``size`` keys (or all) from ``start`` ``[T]``, moved inwards at the border."""
    size = min(size, length)
    return start.clamp(0, length - size)[:, None] + torch.arange(size, device=start.device)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _ravel(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Combines an index ``[T, n]`` per axis of a grid into one of the flat grid, ``[tiles, places]``."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    scaled = [(part * stride)[..., None] for part, stride in zip(parts, strides, strict=True)]
    return _combine(operator.add, scaled)[..., 0]


def _combine(operation: Callable[[Any, Any], Any], parts: Sequence[Tensor]) -> Tensor:
    """Combines every entry of ``[T, n, m]`` per axis with those of the other axes: ``[tiles, places, others]``."""
    pairs = parts[0]
    for part in parts[1:]:
        pairs = operation(pairs[:, None, :, None, :, None], part[None, :, None, :, None, :])
        pairs = pairs.flatten(0, 1).flatten(1, 2).flatten(2, 3)
    return pairs


def _places(index: Tensor, count: int, batch: int, heads: int) -> Places:
    """Takes places ``[tiles, places]`` of a grid of ``count`` to those of ``[B, *grid, heads]``."""
    sample, head = (torch.arange(n, device=index.device) for n in (batch, heads))
    rows = (sample[:, None, None] * count + index[:, None, None, :]) * heads + head[:, None]
    return Places(rows.flatten(), (index.shape[0], batch, heads, index.shape[1]), batch * count * heads)


def _once(tile: Tensor, place: Tensor, tiles: int, size: int, batch: int, heads: int) -> Places:
    """Takes tile and place ``[N]`` of each query to rows of ``[tiles, B, heads, size]``, for ``[B, N, heads]``."""
    sample, head = (torch.arange(n, device=tile.device) for n in (batch, heads))
    rows = ((tile[:, None] * batch + sample[:, None, None]) * heads + head) * size + place[:, None]
    return Places(rows.flatten(), (1, batch, len(tile), heads), tiles * batch * heads * size)
