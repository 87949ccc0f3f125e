"""Neighbourhood attention: every query attends to a window of exactly prod(kernel_size) keys around it.

NATTEN's definition (arXiv 2204.07143) and layout, in 1D, 2D and 3D.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..grid import integers
from . import tiling
from .masking import attention, check_mask, masked_attention

_NUMBERS = 1 << 23  # entries of keys that are gathered at a time


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attends from every place to the window of places around it, with scale ``head_dim ** -0.5``.

    At a border the window is moved inwards, so that every query sees the same number of keys; a kernel larger than the
    grid is clamped to it. Runs NATTEN's kernels where they are built for the tensors' GPU, and PyTorch elsewhere.

    Args:
        query: ``[B, *grid, heads, head_dim]``.
        key: Same shape.
        value: Same shape.
        kernel_size: Window, one number or one per axis.
        mask: ``[B, *grid]``, bool, True = valid key. Masked keys and values may hold anything, NaN included.
        dropout_p: Probability of dropping an attention weight.

    Returns:
        ``[B, *grid, heads, head_dim]``; zero for a query whose window has no valid key.

    Raises:
        ValueError: If shapes, the kernel or the mask's dtype do not fit.
    """
    kernel = _check(query, key, value, kernel_size, mask)
    if mask is None and dropout_p == 0.0 and _natten_can_run(query, kernel):
        return _natten_attention(query, key, value, kernel)
    if mask is not None:
        valid = mask[..., None, None]
        key, value = torch.where(valid, key, 0.0), torch.where(valid, value, 0.0)
    return _tiled_attention(query, key, value, kernel, mask, dropout_p)


def _tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, ...], mask: Tensor | None, dropout_p: float
) -> Tensor:
    grid, (batch, heads) = tuple(query.shape[1:-2]), (query.shape[0], query.shape[-2])
    tiles = _tiles(grid, kernel, batch, heads, query.device)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    parts = tiles.split(_part_size(tiles, query))
    outs = [_attend(query, key, value, part, mask, dropout_p) for part in parts]
    return tiles.untile(outs[0] if len(outs) == 1 else torch.cat(outs))


def _part_size(tiles: tiling.Tiles, query: Tensor) -> int:
    """Returns how many tiles to attend to at a time: all where there may be gradients, which have the grid's size."""
    count, batch, heads, keys = tiles.keys.sizes
    if torch.is_grad_enabled() or tiling.is_traced():
        return count
    return max(1, _NUMBERS // max(1, batch * heads * keys * query.shape[-1]))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, tiles: tiling.Tiles, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Attends from the tiles' queries to the keys in their windows, ``[tiles, B, heads, queries, d]``."""
    q, k, v = tiles.queries.take(query), tiles.keys.take(key), tiles.keys.take(value)
    if mask is not None:
        valid = tiles.keys.take_mask(mask)[:, :, None]  # [tiles, B, 1, keys]
        allowed = (tiles.allowed()[:, None] & valid).flatten(0, 1).unsqueeze(1)  # [tiles * B, 1, queries, keys]
        out = masked_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), allowed, dropout_p)
        return out.view_as(q)
    # samples count as heads, since their windows are the same: one bias per tile serves all of them
    bias = torch.zeros_like(tiles.kinds, dtype=q.dtype).masked_fill(~tiles.kinds, -math.inf)
    bias = bias.index_select(0, tiles.kind).unsqueeze(1)  # [tiles, 1, queries, keys]
    return attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias, dropout_p).view_as(q)


@tiling.per_geometry
def _tiles(
    grid: tuple[int, ...], kernel: tuple[int, ...], batch: int, heads: int, device: torch.device
) -> tiling.Tiles:
    axes = [_axis_tiles(length, min(k, length), device) for length, k in zip(grid, kernel, strict=True)]
    return tiling.Tiles.create(axes, batch, heads)


def _axis_tiles(length: int, kernel: int, device: torch.device) -> tiling.AxisTiles:
    count = max(1, round(length / kernel))  # tiles about as long as a window
    size = -(-length // count)
    queries = tiling.query_tiles(length, size, device)
    halo = kernel // 2 if len(queries) == 2 else kernel - 1  # windows of a tile at the border reach inwards only
    start = (queries - kernel // 2).clamp(0, length - kernel)
    keys = tiling.key_tiles(start[:, 0], size + halo, length)
    place = keys[:, None, :] - start[:, :, None]  # [T, b, w]
    return tiling.AxisTiles(queries, keys, (place >= 0) & (place < kernel), length, length)


def _check(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], mask: Tensor | None
) -> tuple[int, ...]:
    if query.ndim < 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must have one shape [B, *grid, heads, head_dim], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    axes = query.ndim - 3
    kernel = integers(kernel_size, "kernel_size", axes)
    check_mask(mask, query.shape[:-2])
    return kernel


@functools.cache
def _natten() -> ModuleType | None:
    try:
        import natten
    except ImportError:
        return None
    if not natten.HAS_LIBNATTEN:
        warnings.warn(
            "natten is installed without its CUDA kernels (libnatten); neighbourhood attention runs on PyTorch",
            stacklevel=2,
        )
        return None
    return natten


def _natten_can_run(query: Tensor, kernel: Sequence[int]) -> bool:
    if torch.compiler.is_compiling():
        return False  # the compiler fuses PyTorch's operations; NATTEN's would break the graph
    fits = query.is_cuda and query.dtype != torch.float64 and query.ndim <= 6 and query.shape[-1] % 8 == 0
    return fits and min(kernel) > 1 and min(query.shape[1:-2]) > 1 and _natten() is not None


def _natten_attention(query: Tensor, key: Tensor, value: Tensor, kernel: Sequence[int]) -> Tensor:
    import natten

    run = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(kernel)]
    size = tuple(min(k, length) for k, length in zip(kernel, query.shape[1:-2], strict=True))
    return run(query, key, value, kernel_size=size)
