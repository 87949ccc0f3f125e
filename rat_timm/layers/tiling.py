"""Windowed attention as a few dense products: tiles of queries, each with all the keys that its windows reach."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AxisTiles(NamedTuple):
    """How one axis is cut: T tiles of b queries, each with w keys.

    Attributes:
        queries: Query index, ``[T, b]``. The last tile is moved inwards where tiles do not fit: it repeats queries.
        keys: Key index, ``[T, w]``.
        allowed: Which key lies in which query's window, ``[T, b, w]``, bool.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor


def query_tiles(length: int, size: int, device: torch.device) -> Tensor:
    """Cuts ``length`` queries into tiles of about ``size``: their index, ``[T, b]``."""
    tiles = -(-length // size)
    size = -(-length // tiles)
    start = (torch.arange(tiles, device=device) * size).clamp(max=length - size)
    return start[:, None] + torch.arange(size, device=device)


def key_tiles(start: Tensor, size: int, length: int) -> Tensor:
    """Returns ``[T, w]``: for each tile ``size`` keys (or all) from ``start`` ``[T]``, moved inwards at the border."""
    size = min(size, length)
    return start.clamp(0, length - size)[:, None] + torch.arange(size, device=start.device)


def gather(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """``[B, *grid, heads, d]`` -> ``[tiles, B, heads, places, d]``, by one index ``[T, n]`` per axis."""
    for axis, places in enumerate(index, start=1):
        if places.numel() != x.shape[axis]:  # as many places as the axis has are the axis itself
            x = x.index_select(axis, places.flatten())
    for axis, places in reversed(list(enumerate(index, start=1))):
        x = x.unflatten(axis, tuple(places.shape))  # [B, T1, n1, T2, n2, ..., heads, d]
    axes = len(index)
    tiles, places_ = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
    x = x.permute(*tiles, 0, 2 * axes + 1, *places_, 2 * axes + 2)
    return x.flatten(0, axes - 1).flatten(3, 2 + axes)


def spread(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """``[tiles, B, heads, places, d]`` -> ``[B, T1 * n1, T2 * n2, ..., heads, d]``: undoes the layout of `gather`."""
    axes = len(index)
    x = x.unflatten(0, [places.shape[0] for places in index]).unflatten(-2, [places.shape[1] for places in index])
    pairs = [dim for axis in range(axes) for dim in (axis, axes + 2 + axis)]
    x = x.permute(axes, *pairs, axes + 1, 2 * axes + 2)  # [B, T1, n1, T2, n2, ..., heads, d]
    for axis in range(1, axes + 1):
        x = x.flatten(axis, axis + 1)
    return x


def untile(x: Tensor, index: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """``[tiles, B, heads, places, d]`` -> ``[B, *shape, heads, d]``, taking each query once."""
    x = spread(x, index)
    for axis, (places, length) in enumerate(zip(index, shape, strict=True), start=1):
        tiles, size = places.shape
        if tiles * size != length:
            place = torch.arange(length, device=x.device)
            last = (tiles - 1) * size
            x = x.index_select(axis, torch.where(place < last, place, place + tiles * size - length))
    return x


def scatter_add(x: Tensor, index: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """``[tiles, B, heads, places, d]`` -> ``[B, *shape, heads, d]``, summing overlaps: `gather` transposed."""
    x = spread(x, index)
    for axis, (places, length) in enumerate(zip(index, shape, strict=True), start=1):
        if places.numel() != length:
            out = x.new_zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]))
            x = out.index_add(axis, places.flatten(), x)
    return x


def scatter_max(x: Tensor, index: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """`scatter_add` with the largest instead of the sum."""
    x = spread(x, index)
    for axis, (places, length) in enumerate(zip(index, shape, strict=True), start=1):
        if places.numel() != length:
            out = x.new_full((*x.shape[:axis], length, *x.shape[axis + 1 :]), torch.finfo(x.dtype).min)
            across = places.view(-1, *[1] * (x.ndim - axis - 1)).expand_as(x)
            x = out.scatter_reduce(axis, across, x, "amax")
    return x


def allowed_pairs(tiles: Sequence[AxisTiles]) -> Tensor:
    """Returns which key lies in which query's window, ``[tiles, queries, keys]``, bool."""
    return _product([axis.allowed for axis in tiles])


def first_queries(index: Sequence[Tensor]) -> Tensor:
    """Returns ``[tiles, queries]``, bool: False where a query of an earlier tile is repeated."""
    starts = [torch.arange(len(places), device=places.device)[:, None] * places.shape[1] for places in index]
    return _product([(places >= start)[..., None] for places, start in zip(index, starts, strict=True)])[..., 0]


def _product(parts: Sequence[Tensor]) -> Tensor:
    pairs = parts[0]  # [T, n, m] per axis
    for part in parts[1:]:
        pairs = pairs[:, None, :, None, :, None] & part[None, :, None, :, None, :]
        pairs = pairs.flatten(0, 1).flatten(1, 2).flatten(2, 3)
    return pairs


def gather_mask(mask: Tensor, index: Sequence[Tensor]) -> Tensor:
    """``[B, *grid]`` -> ``[tiles, B, places]``."""
    return gather(mask[..., None, None], index)[:, :, 0, :, 0]
