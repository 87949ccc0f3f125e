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
from .masking import check_mask, masked_attention

_WHOLE_AXIS = 2  # an axis of up to this many kernels is one tile: its keys are shared anyway


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
    query: Tensor, key: Tensor, value: Tensor, kernel: Sequence[int], mask: Tensor | None, dropout_p: float
) -> Tensor:
    grid, (batch, heads, width) = query.shape[1:-2], (query.shape[0], *query.shape[-2:])
    tiles = [_axis_tiles(length, k, query.device) for length, k in zip(grid, kernel, strict=True)]
    queries, keys = [axis.queries for axis in tiles], [axis.keys for axis in tiles]
    allowed = tiling.allowed_pairs(tiles)[:, None]  # [tiles, 1, places, keys]
    # samples count as heads where their windows are the same, so that one mask per tile serves all of them
    merged = 1
    if mask is not None:
        merged = 0
        allowed = (allowed & tiling.gather_mask(mask, keys)[:, :, None]).flatten(0, 1).unsqueeze(1)
    q, k, v = (
        tiling.gather(x, places).flatten(merged, merged + 1)
        for x, places in ((query, queries), (key, keys), (value, keys))
    )
    out = masked_attention(q, k, v, allowed, dropout_p)
    out = out.reshape(math.prod([len(places) for places in queries]), batch, heads, q.shape[-2], width)
    return tiling.untile(out, queries, grid)


def _axis_tiles(length: int, kernel: int, device: torch.device) -> tiling.AxisTiles:
    kernel = min(kernel, length)
    size = length if length <= _WHOLE_AXIS * kernel else kernel + 1
    queries = tiling.query_tiles(length, size, device)
    keys = tiling.key_tiles(queries[:, 0] - kernel // 2, queries.shape[1] + kernel - 1, length)
    start = (queries - kernel // 2).clamp(0, length - kernel)
    place = keys[:, None, :] - start[:, :, None]  # [T, b, w]
    return tiling.AxisTiles(queries, keys, (place >= 0) & (place < kernel))


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
