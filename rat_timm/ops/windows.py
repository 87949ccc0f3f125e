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

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .tiling import Array, AxisTiles, by_row, distinct, outer_and, outer_entries, ravel

_FEW = 1 << 20  # logits up to which PyTorch's fused attention takes longer on the CPU, forward and backward
_NUMBERS = 1 << 23  # entries of keys that are gathered at a time
_NUMBERS_CPU = 1 << 21  # the same per thread of a CPU: parts that stay near its cache, and are not too many


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
        return cls(*(tensor_of(part, device) for part in (index, *by_row(index, rows))))

    def take(self, x: Tensor) -> Tensor:
        """``[rows, C]`` -> ``[entries, C]``."""
        if self.order is None or not (torch.is_grad_enabled() and x.requires_grad) or is_plain(x):
            return x.index_select(0, self.row)
        return _Take.apply(x, self)


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
    """``[entries, C]`` -> ``[rows, C]``, summing repetitions: `RowIndex.take` transposed."""

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
        sizes = x.shape[0], *x.shape[-2:]
        x = x.flatten(1, -3).transpose(0, 1).flatten(1)  # [N, B * heads * d]
        return self.rows.take(x).view(self.tiles, self.places, *sizes).permute(0, 2, 3, 1, 4)

    def take_in_program(self, x: Tensor) -> Tensor:
        """``[B, *grid, heads, d]`` -> ``[B * tiles, heads, places, d]``: what `take` gives, in few operations."""
        taken = _places_of(x, math.prod(self.shape)).index_select(1, self.rows.row)  # [B, tiles * places, heads * d]
        return taken.reshape(-1, self.places, *x.shape[-2:]).transpose(1, 2)

    def add(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, places, d]`` -> ``[B, *grid, heads, d]``, summing overlaps: `take` transposed."""
        return _unflatten(_Add.apply(_flatten(x), self.rows), self.shape, x)

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
        order, starts = by_row(place.ravel(), math.prod(shape))
        counts = np.diff(starts)[:, None]
        number = np.arange(counts.max())
        entry = order[np.minimum(starts[:-1, None] + number, len(order) - 1)]
        return cls(tensor_of(entry, device), tensor_of(number < counts, device), shape, len(order))

    def take(self, x: Tensor, absent: float) -> Tensor:
        """Lays what tiles hold of a place side by side: ``[tiles, B, heads, places, d]`` -> ``[N, K, B * heads * d]``.

        Args:
            x: What the tiles hold.
            absent: What stands for tiles that do not have a place.
        """
        rows = _flatten(x).index_select(0, self.entry.flatten()).unflatten(0, self.entry.shape)
        return torch.where(self.held.unsqueeze(-1), rows, absent)

    def add(self, x: Tensor) -> Tensor:
        """``[tiles, B, heads, places, d]`` -> ``[B, *grid, heads, d]``: `Gather.add` by PyTorch's own operations."""
        return _unflatten(self.take(x, 0.0).sum(1), self.shape, x)

    def take_in_export(self, x: Tensor, absent: float) -> Tensor:
        """``[B * tiles, heads, places, d]`` -> ``[B, N, K, heads * d]``: what `take` gives, in few operations."""
        rows = _places_of(x.transpose(1, 2), self.entries).index_select(1, self.entry.flatten())
        return torch.where(self.held.unsqueeze(-1), rows.reshape(-1, *self.entry.shape, rows.shape[-1]), absent)


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
        entries: Of a table with a bias per relative position, the entry of each query and key of a kind, ``[kinds,
            queries, keys]``; one past the last where the key is not in the window. None if there is no such bias.
        added: What `attend_in_tiles` adds to logits of a batch, ``[B * tiles, 1, queries, keys]``; in exports alone,
            where several calls share it.
        is_whole: Whether there is one tile, in whose order places are the grid's, and every query sees every key.
    """

    queries: Gather
    keys: Gather
    once: RowIndex
    repeated: Tensor | None
    kinds: Tensor
    kind: Tensor
    counts: tuple[int, ...]
    overlaps: Overlaps | None
    entries: Tensor | None = None
    added: Tensor | None = None
    is_whole: bool = False

    @classmethod
    def create(
        cls,
        axes: Sequence[AxisTiles],
        device: torch.device,
        with_overlaps: bool = False,
        reach: Sequence[int] | None = None,
    ) -> "Tiles":
        """Combines the tiles of all axes.

        Args:
            axes: How each is cut.
            device: Where indices are.
            with_overlaps: Whether to work out where each key stands.
            reach: The most places along each axis from a query to a key that a bias per relative position knows; None
                if there is no such bias.
        """
        steps = None if reach is None else [axis.steps(most) for axis, most in zip(axes, reach, strict=True)]
        patterns, pattern = zip(*map(distinct, steps or [axis.allowed for axis in axes]), strict=True)
        kind = ravel(pattern, [len(each) for each in patterns])
        order, (shape, key_shape) = kind.argsort(kind="stable"), zip(*(axis.lengths for axis in axes), strict=True)
        queries = ravel([axis.queries for axis in axes], shape).reshape(len(kind), -1)[order]
        keys = ravel([axis.keys for axis in axes], key_shape).reshape(len(kind), -1)[order]
        once = np.unique(queries, return_index=True)[1]
        repeated = np.ones(queries.shape, bool)
        repeated.flat[once] = False
        kinds = outer_and([each if reach is None else each >= 0 for each in patterns])
        return cls(
            queries=Gather.create(queries, shape, device),
            keys=Gather.create(keys, key_shape, device),
            once=RowIndex.create(once, queries.size, device),
            repeated=tensor_of(repeated, device) if repeated.any() else None,
            kinds=tensor_of(kinds, device),
            kind=tensor_of(kind[order], device),
            counts=tuple(np.bincount(kind).tolist()),
            overlaps=Overlaps.create(keys, key_shape, device) if with_overlaps else None,
            entries=None if reach is None else tensor_of(outer_entries(patterns, [2 * n + 1 for n in reach]), device),
            is_whole=len(kind) == 1 and shape == key_shape and bool(kinds.all()),
        )

    def untile(self, *parts: Tensor) -> Tensor:
        """``[tiles, B, heads, queries, d]`` -> ``[B, *grid, heads, d]``, taking each query once.

        Args:
            *parts: What `split` parts of the tiles hold, in order.
        """
        rows = _flatten(parts[0]) if len(parts) == 1 else torch.cat([_flatten(part) for part in parts])
        return _unflatten(self.once.take(rows), self.queries.shape, parts[0])

    def untile_in_program(self, x: Tensor) -> Tensor:
        """``[B * tiles, heads, queries, d]`` -> ``[B, *grid, heads, d]``: `Gather.take_in_program` undone."""
        rows = _places_of(x.transpose(1, 2), self.queries.tiles * self.queries.places)
        return rows.index_select(1, self.once.row).reshape(-1, *self.queries.shape, x.shape[1], x.shape[3])

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
            entries=None if self.entries is None else self.entries[kinds],
        )

    def allowed(self) -> Tensor:
        """Returns which key lies in which query's window, ``[tiles, queries, keys]``, bool."""
        return self.of_tiles(self.kinds)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Returns what to add to logits, so that keys out of a query's window have no weight, ``[tiles, 1, q, k]``."""
        forbidden = self.kinds.logical_not()
        return self.of_tiles(torch.zeros_like(forbidden, dtype=dtype).masked_fill(forbidden, -math.inf)).unsqueeze(1)

    def relative_bias(self, table: Tensor) -> Tensor:
        """Returns what to add to the logits of each head: `bias`, and an entry of a table for what is in the window.

        Args:
            table: ``[heads, *steps]``, an entry for every relative position.

        Returns:
            ``[tiles, heads, queries, keys]``.
        """
        assert self.entries is not None
        flat = table.flatten(1)
        flat = torch.cat((flat, flat.new_full((len(flat), 1), -math.inf)), dim=1)
        taken = flat.index_select(1, self.entries.flatten()).unflatten(1, self.entries.shape)  # [heads, kinds, q, k]
        return self.of_tiles(taken.transpose(0, 1))

    def logits(self, query: Tensor, table: Tensor | None) -> Tensor:
        """Returns `bias`, or `relative_bias` if there is a table, ``[tiles, 1 or heads, queries, keys]``."""
        return self.bias(query.dtype) if table is None else self.relative_bias(table)

    def batch_bias(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Returns `bias` for a batch, ``[batch * tiles, 1, queries, keys]``."""
        return self.bias(dtype).expand(batch, -1, -1, -1, -1).flatten(0, 1)

    def share_bias(self, x: Tensor) -> "Tiles":
        """Returns the tiles with what several calls with a batch like ``x`` ``[B, ...]`` add to their logits."""
        # dynamo traces no _replace
        return self if self.is_whole else Tiles(*self[:-2], added=self.batch_bias(x.shape[0], x.dtype))

    def of_tiles(self, x: Tensor) -> Tensor:
        """``[kinds, ...]`` -> ``[tiles, ...]``, without a copy if the tiles are of one kind."""
        if len(self.counts) == 1:
            return x.expand(self.queries.tiles, *x.shape[1:])
        return x.index_select(0, self.kind)


def attend_in_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiles,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    table: Tensor | None = None,
) -> Tensor:
    """Attends from every place of a grid to the keys in its window, ``[B, *grid, heads, d]``.

    Args:
        query: ``[B, *grid, heads, d]``.
        key: Same shape. What is masked may hold anything.
        value: Likewise.
        tiles: How the grid is cut.
        mask: ``[B, *grid]``, bool, True = valid key. A query whose window has none gives zeros.
        dropout_p: Probability of dropping an attention weight.
        table: What is added to the logits, for every relative position that the tiles know, ``[heads, *steps]``.

    Raises:
        ValueError: If there is a table and the tiles know no relative positions, or the other way round.
    """
    if (table is None) != (tiles.entries is None):
        raise ValueError("tiles must know relative positions if, and only if, there is a table of biases for them")
    table = None if table is None else table.to(query.dtype)  # parameters stay float32 under autocast
    if mask is not None:
        valid = mask[..., None, None]
        key, value = torch.where(valid, key, 0.0), torch.where(valid, value, 0.0)
    if tiles.is_whole and table is None:
        return _attend_to_all(query, key, value, mask, dropout_p)
    if torch.compiler.is_compiling() or is_transformed():
        if table is not None:
            return _attend_in_program_by_head(query, key, value, tiles, mask, dropout_p, table)
        return _attend_in_program(query, key, value, tiles, mask, dropout_p)
    size, mixed = _part_sizes(tiles, query)
    samples = max(1, size // tiles.keys.tiles)
    is_small = tiles.keys.tiles <= mixed and len(query) <= samples
    if is_small or has_gradient(query, key, value, *([] if table is None else [table])):
        return tiles.untile(_attend(query, key, value, tiles, tiles.logits(query, table), mask, dropout_p))
    inputs = [[_places_first(part) for part in x.split(samples)] for x in (query, key, value)]
    masks = [None] * len(inputs[0]) if mask is None else mask.split(samples)
    calls = list(zip(*inputs, masks, strict=True))
    outs: list[list[Tensor]] = [[] for _ in calls]
    for part in tiles.split(size, mixed):
        bias = part.logits(query, table)
        for out, (q, k, v, m) in zip(outs, calls, strict=True):
            out.append(_attend(q, k, v, part, bias, m, dropout_p))
    return tiles.untile(*outs[0]) if len(outs) == 1 else torch.cat([tiles.untile(*parts) for parts in outs])


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Attends from every place of a grid to every place: one tile as it lies, without a gather or a bias."""
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, N, d]
    allowed = None if mask is None else mask.flatten(1)[:, None, None]
    return masked_attention(q, k, v, allowed, dropout_p).transpose(1, 2).unflatten(1, query.shape[1:-2])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, bias: Tensor, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Attends from the tiles' queries to the keys in their windows, ``[tiles, B, heads, queries, d]``."""
    q, k, v = tiles.queries.take(query), tiles.keys.take(key), tiles.keys.take(value)
    if mask is not None:
        valid = tiles.keys.take_mask(mask)[:, :, None]  # [tiles, B, 1, keys]
        allowed = (tiles.allowed()[:, None] & valid).flatten(0, 1).unsqueeze(1)  # [tiles * B, 1, queries, keys]
        each = None if tiles.entries is None else bias.unsqueeze(1).expand(-1, q.shape[1], -1, -1, -1).flatten(0, 1)
        out = masked_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), allowed, dropout_p, each)
        return out.unflatten(0, q.shape[:2])
    if tiles.entries is not None:  # the bias of a tile and head serves all samples
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [tiles * heads, B, places, d]
        out = attention(q, k, v, bias.flatten(0, 1).unsqueeze(1), dropout_p)
        return out.unflatten(0, bias.shape[:2]).transpose(1, 2)
    # samples count as heads, since their windows are the same: one bias per tile serves all of them
    out = attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias, dropout_p)
    return out.unflatten(1, q.shape[1:3])


def _part_sizes(tiles: Tiles, query: Tensor) -> tuple[int, int]:
    """Returns how many tiles of a sample to attend to at a time: of one kind, and of several, with a bias each."""
    limit = _NUMBERS_CPU * torch.get_num_threads() if query.device.type == "cpu" else _NUMBERS
    numbers = max(1, tiles.keys.places * query.shape[-2:].numel())
    biases = tiles.kinds[0].numel() * (1 if tiles.entries is None else query.shape[-2])
    return max(1, limit // numbers), max(1, limit // max(numbers, biases))


def _places_first(x: Tensor) -> Tensor:
    """Lays ``[B, *grid, heads, d]`` out in memory as gathers read it, ``[*grid, B, heads, d]``."""
    return x.movedim(0, -3).contiguous().movedim(-3, 0)


def _attend_in_program(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Attends in as few operations as there can be: a program's time to compile or convert grows with them."""
    q = tiles.queries.take_in_program(query)
    k, v = tiles.keys.take_in_program(key), tiles.keys.take_in_program(value)
    if mask is None:
        bias = tiles.added
        if bias is None or bias.dtype != q.dtype:
            bias = tiles.batch_bias(query.shape[0], q.dtype)
        return tiles.untile_in_program(attention(q, k, v, bias, dropout_p))
    valid = tiles.keys.take_in_program(mask[..., None, None]).transpose(2, 3)  # [B * tiles, 1, 1, keys]
    allowed = tiles.allowed().expand(query.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1) & valid
    return tiles.untile_in_program(masked_attention(q, k, v, allowed, dropout_p))


def _attend_in_program_by_head(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, mask: Tensor | None, dropout_p: float, table: Tensor
) -> Tensor:
    """Does what `_attend_in_program` does, with a bias per head and relative position."""
    q = tiles.queries.take_in_program(query)  # [B * tiles, heads, queries, d]
    k, v = tiles.keys.take_in_program(key), tiles.keys.take_in_program(value)
    bias = tiles.relative_bias(table)
    count, heads, scale = tiles.queries.tiles, table.shape[0], query.shape[-1] ** -0.5
    if mask is None and not torch.compiler.is_exporting():
        q, k, v = (x.unflatten(0, (-1, count)).flatten(1, 2) for x in (q, k, v))  # [B, tiles * heads, places, d]
        bias = bias.flatten(0, 1).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
        return tiles.untile_in_program(out.unflatten(1, (count, heads)).flatten(0, 1))
    bias = bias.expand(query.shape[0], -1, -1, -1, -1).flatten(0, 1)
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    else:
        valid = tiles.keys.take_in_program(mask[..., None, None]).transpose(2, 3)  # [B * tiles, 1, 1, keys]
        allowed = tiles.allowed().expand(query.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1) & valid
        out = masked_attention(q, k, v, allowed, dropout_p, bias)
    # its layout in memory depends on whether the bias has a gradient, which programs forget
    return tiles.untile_in_program(out.clone(memory_format=torch.contiguous_format))


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: ``[B, heads, M, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``.
        bias: What is added to the logits, broadcastable to ``[B, heads, M, N]``.
        dropout_p: Probability of dropping an attention weight.
    """
    # with no heads, into which an empty batch may be folded, PyTorch 2.11 ends the process: it divides by zero
    is_explicit = query.numel() == 0 or (
        dropout_p == 0.0 and query.requires_grad and _explicit_is_best(query, key, bias)
    )
    scale = query.shape[-1] ** -0.5  # the default, which ONNX would work out of sizes
    if not is_explicit:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    logits = (query * scale) @ key.mT
    logits = logits if bias is None else logits + bias
    return logits.softmax(dim=-1) @ value


def _explicit_is_best(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """Tells whether training is faster with weights that are made: on the CPU, in a precision products keep.

    So it is if they are few, or PyTorch would make them too, since the bias learns.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    exact = query.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    learns = bias is not None and bias.requires_grad
    return exact and (learns or query.shape[:3].numel() * key.shape[2] <= _FEW)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention; a query without an allowed key gives zeros.

    Args:
        query: ``[B, heads, M, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``; finite also where it is not allowed.
        allowed: Bool, broadcastable to ``[B, heads, M, N]``; None allows all.
        dropout_p: Probability of dropping an attention weight.
        bias: What is added to the logits, broadcastable to ``[B, heads, M, N]``; no row is minus infinity throughout.
    """
    if allowed is None:
        return attention(query, key, value, bias, dropout_p)
    reached = allowed.any(dim=-1, keepdim=True)  # [B, heads, M, 1]
    seen = allowed | ~reached
    added = seen if bias is None else torch.where(seen, bias, -math.inf)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, dropout_p=dropout_p)
    return torch.where(reached, out, 0.0)


def has_gradient(*tensors: Tensor) -> bool:
    """Tells whether a result of these tensors will have a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_plain(x: Tensor) -> bool:
    """Tells whether PyTorch's own operations have to do: a compiler fuses them, and not every device has bags."""
    return x.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling() or is_transformed()


def is_transformed() -> bool:
    """Tells whether a tracer or `torch.func` takes apart what runs here."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


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


def _bundles(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Bundles kinds, of which each has so many tiles, into slices of no more than ``most`` tiles, or of one kind."""
    first = tiles = 0
    for kind, count in enumerate(counts):
        if kind > first and tiles + count > most:
            yield slice(first, kind)
            first, tiles = kind, 0
        tiles += count
    yield slice(first, len(counts))


def tensor_of(array: Array, device: torch.device) -> Tensor:
    """Returns whole numbers, as int32, or a bool array as a tensor."""
    tensor = torch.from_numpy(array if array.dtype == bool else array.astype(np.int32))
    return tensor if tensor.device == device else tensor.to(device)  # a move to the same place is nodes of a program
