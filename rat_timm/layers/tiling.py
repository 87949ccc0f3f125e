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

from .masking import exp_beside_one, nothing

_KEPT = 24  # plans kept, for as many sizes of grids, windows and batches

P = ParamSpec("P")
R = TypeVar("R")


class Runs(NamedTuple):
    """Stretches of one axis, all as long: T of n places.

    Attributes:
        starts: First place of each.
        size: Number of places, n.
        length: The axis' number of places.
    """

    starts: tuple[int, ...]
    size: int
    length: int

    @classmethod
    def create(cls, starts: Sequence[int], size: int, length: int) -> "Runs":
        """Moves stretches inwards at the border; they are as long as the axis at most."""
        size = min(size, length)
        return cls(tuple(min(max(start, 0), length - size) for start in starts), size, length)

    def indices(self, device: torch.device) -> Tensor:
        """Returns the places, ``[T, n]``."""
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.size, device=device)

    def holders(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns where each of the axis' places stands among ``T x n``, ``[length, K]``, and whether it does there."""
        held: list[list[int]] = [[] for _ in range(self.length)]
        for run, start in enumerate(self.starts):
            for place in range(self.size):
                held[start + place].append(run * self.size + place)
        most = max(map(len, held))
        padded = torch.tensor([(places + [-1] * most)[:most] for places in held], device=device)
        return padded.clamp(min=0), padded >= 0


class AxisTiles(NamedTuple):
    """How one axis is cut: T tiles of b queries, each with w keys.

    Attributes:
        query_runs: The tiles' queries. The last tile is moved inwards where tiles do not fit: it repeats queries.
        key_runs: The tiles' keys.
        allowed: Which key lies in which query's window, ``[T, b, w]``, bool.
    """

    query_runs: Runs
    key_runs: Runs
    allowed: Tensor

    @property
    def queries(self) -> Tensor:
        """Query index, ``[T, b]``."""
        return self.query_runs.indices(self.allowed.device)

    @property
    def keys(self) -> Tensor:
        """Key index, ``[T, w]``."""
        return self.key_runs.indices(self.allowed.device)

    def once(self) -> tuple[Tensor, Tensor]:
        """Returns the first tile of each query and its place there, each ``[1, queries]``."""
        starts, size, length = self.query_runs
        place = torch.arange(length, device=self.allowed.device)
        last = (len(starts) - 1) * size
        place = torch.where(place < last, place, place + last + size - length)
        tile = place.div(size, rounding_mode="floor")
        return tile[None], (place - tile * size)[None]

    def repeated(self) -> Tensor:
        """Returns whether a query stands in an earlier tile too, ``[T, b]``."""
        first_new = torch.arange(len(self.query_runs.starts), device=self.allowed.device) * self.query_runs.size
        return self.queries < first_new[:, None]

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
        taken = rows.index_select(0, self.rows) if is_plain(x) else _Take.apply(rows, self)
        return taken.view(*self.sizes, x.shape[-1])

    def add(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """``[tiles, B, heads, places, d]`` -> ``[B, *shape, heads, d]``, summing overlaps: `take` transposed."""
        return _Add.apply(_rows(x), self).view(self.sizes[1], *shape, self.sizes[2], x.shape[-1])

    @functools.cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """Which places stand at each row: their index, sorted by row, and where each row's begin."""
        with torch.inference_mode(False):
            sizes = torch.bincount(self.rows, minlength=self.count)
            starts = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
            return self.rows.argsort(stable=True), starts

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


class Overlaps(NamedTuple):
    """Where each key stands in the tiles, axis by axis, so that a sum over its tiles needs no scatter.

    Attributes:
        counts: Number of tiles per axis.
        sizes: Number of keys in a tile per axis.
        places: Per axis, where a key stands among ``tiles x keys``, ``[keys, K]``.
        held: Whether it does: some keys stand in fewer tiles than others.
    """

    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    places: tuple[Tensor, ...]
    held: tuple[Tensor, ...]

    def reduce(self, x: Tensor, combine: Callable[[Tensor, int], Tensor], absent: float) -> Tensor:
        """Combines overlaps of ``[tiles, B, heads, places, d]`` into ``[B, *grid, heads, d]``.

        Args:
            x: What the tiles hold.
            combine: Reduces the dimension that it is given, in which one key's values stand.
            absent: What changes no result of it.
        """
        axes = len(self.counts)
        x = x.unflatten(-2, self.sizes).unflatten(0, self.counts)  # [*counts, B, heads, *sizes, d]
        pairs = [part for axis in range(axes) for part in (axis, axes + 2 + axis)]
        x = x.permute(axes, *pairs, axes + 1, -1)  # [B, count, size, count, size, ..., heads, d]
        for axis, (places, held) in enumerate(zip(self.places, self.held, strict=True), start=1):
            x = x.flatten(axis, axis + 1).index_select(axis, places.flatten()).unflatten(axis, places.shape)
            x = torch.where(held.view(*held.shape, *[1] * (x.ndim - axis - 2)), x, absent)
            x = combine(x, axis + 1)
        return x


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
        key_runs: The tiles' keys, per axis; those of all tiles, in a part of them too.
    """

    queries: Places
    keys: Places
    once: Places
    repeated: Tensor | None
    kinds: Tensor
    kind: Tensor
    shape: tuple[int, ...]
    key_runs: tuple[Runs, ...]

    @classmethod
    def create(cls, axes: Sequence[AxisTiles], batch: int, heads: int) -> "Tiles":
        """Combines the tiles of all axes, for tensors of ``batch`` samples and ``heads`` heads."""
        starts, sizes, shape = zip(*(axis.query_runs for axis in axes), strict=True)
        counts, key_shape = [len(each) for each in starts], [axis.key_runs.length for axis in axes]
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
            shape=shape,
            key_runs=tuple(axis.key_runs for axis in axes),
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

    def add_keys(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, keys, d]`` -> ``[B, *grid, heads, d]``, summing overlaps."""
        if is_plain(x):
            return overlaps(self.key_runs, x.device).reduce(x, torch.sum, 0.0)
        return self.keys.add(x, [run.length for run in self.key_runs])

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Adds up overlaps of ``[tiles, B, heads, keys]``, given and returned as logarithms, in all their tiles."""
        total = overlaps(self.key_runs, x.device).reduce(x.unsqueeze(-1), _log_sum_exp, nothing(x.dtype))
        return self.keys.take(total).squeeze(-1)

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


@per_geometry
def overlaps(runs: tuple[Runs, ...], device: torch.device) -> Overlaps:
    """Finds keys in the runs of each axis."""
    places, held = zip(*(run.holders(device) for run in runs), strict=True)
    return Overlaps(tuple(len(run.starts) for run in runs), tuple(run.size for run in runs), places, held)


def is_traced() -> bool:
    """Tells whether tensors made here and now stand for others: those of a compiler, a fake mode, `torch.func`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(torch.empty(0)) is not Tensor:
        return True
    return torch._C._are_functorch_transforms_active()


def is_plain(x: Tensor) -> bool:
    """Tells whether PyTorch's own operations have to do: a compiler fuses them, and not every device has bags."""
    return is_traced() or x.device.type not in ("cpu", "cuda")


def query_tiles(length: int, size: int) -> Runs:
    """Cuts ``length`` queries into tiles of ``size``."""
    return Runs.create(range(0, length, size), size, length)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    peak = x.detach().amax(dim, keepdim=True)  # on which no result depends
    return (peak + exp_beside_one(x - peak).sum(dim, keepdim=True).log()).squeeze(dim)


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
