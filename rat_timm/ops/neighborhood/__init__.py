"""Neighbourhood attention: every query attends to a window of exactly prod(kernel_size) keys around it.

NATTEN's definition (arXiv 2204.07143) and layout, in 1D, 2D and 3D.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...geometry import plans
from ...geometry.grid import integers
from .. import windows
from ..masking import attention, check_mask, masked_attention, need_grad
from .backend import VARIABLE, attention_backend

_SIZES = 256  # programs that FlexAttention is compiled to, one per size; beyond that it would hold all pairs
_NUMBERS = 1 << 23  # entries of keys that are gathered at a time
_NUMBERS_CPU = 1 << 21  # the same per thread of a CPU: parts that stay near its cache, and are not too many


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
    grid is clamped to it. What it runs on is chosen by `rat_timm.set_attention_backend`.

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
        ValueError: If shapes, the kernel or the mask's dtype do not fit, or the chosen backend cannot run.
    """
    kernel = _check(query, key, value, kernel_size, mask)
    call = _Call(query, kernel, mask, dropout_p, need_grad(query, key, value))
    backend = attention_backend()
    if backend == "auto":
        backend = "natten" if _natten_is_best(call) else "torch"
    elif (obstacle := _OBSTACLES[backend](call)) is not None:
        raise ValueError(
            f"attention backend {backend!r} cannot run here: {obstacle}; "
            f"choose another by rat_timm.set_attention_backend or the environment variable {VARIABLE}"
        )
    if mask is not None:
        valid = mask[..., None, None]
        key, value = torch.where(valid, key, 0.0), torch.where(valid, value, 0.0)
    return _BACKENDS[backend](query, key, value, kernel, mask, dropout_p)


class _Call(NamedTuple):
    query: Tensor
    kernel: tuple[int, ...]
    mask: Tensor | None
    dropout_p: float
    needs_grad: bool


def _tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, ...], mask: Tensor | None, dropout_p: float
) -> Tensor:
    tiles = _tiles(tuple(map(operator.index, query.shape[1:-2])), kernel, query.device)
    if need_grad(query, key, value) or plans.is_traced():
        return tiles.untile(_attend(query, key, value, tiles, _bias(tiles, query.dtype), mask, dropout_p))
    size, mixed = _part_sizes(tiles, query)
    samples = max(1, size // tiles.keys.tiles)
    inputs = [[_places_first(part) for part in x.split(samples)] for x in (query, key, value)]
    masks = [None] * len(inputs[0]) if mask is None else mask.split(samples)
    calls = list(zip(*inputs, masks, strict=True))
    outs: list[list[Tensor]] = [[] for _ in calls]
    for part in tiles.split(size, mixed):
        bias = _bias(part, query.dtype)
        for out, (q, k, v, m) in zip(outs, calls, strict=True):
            out.append(_attend(q, k, v, part, bias, m, dropout_p))
    return torch.cat([tiles.untile(*parts) for parts in outs])


def _part_sizes(tiles: windows.Tiles, query: Tensor) -> tuple[int, int]:
    """Returns how many tiles of a sample to attend to at a time: of one kind, and of several, with a bias each."""
    limit = _NUMBERS_CPU * torch.get_num_threads() if query.device.type == "cpu" else _NUMBERS
    numbers = max(1, tiles.keys.places * query.shape[-2:].numel())
    return max(1, limit // numbers), max(1, limit // max(numbers, tiles.kinds[0].numel()))


def _places_first(x: Tensor) -> Tensor:
    """Lays ``[B, *grid, heads, d]`` out in memory as gathers read it, ``[*grid, B, heads, d]``."""
    return x.movedim(0, -3).contiguous().movedim(-3, 0)


def _bias(tiles: windows.Tiles, dtype: torch.dtype) -> Tensor:
    """Returns what to add to logits, ``[tiles, 1, queries, keys]``."""
    return tiles.of_tiles(torch.zeros_like(tiles.kinds, dtype=dtype).masked_fill(~tiles.kinds, -math.inf)).unsqueeze(1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: windows.Tiles,
    bias: Tensor,
    mask: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Attends from the tiles' queries to the keys in their windows, ``[tiles, B, heads, queries, d]``."""
    q, k, v = tiles.queries.take(query), tiles.keys.take(key), tiles.keys.take(value)
    both = q.shape[:2]
    if mask is not None:
        valid = tiles.keys.take_mask(mask)[:, :, None]  # [tiles, B, 1, keys]
        allowed = (tiles.allowed()[:, None] & valid).flatten(0, 1).unsqueeze(1)  # [tiles * B, 1, queries, keys]
        out = masked_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), allowed, dropout_p)
        return out.unflatten(0, both)
    if plans.is_traced():  # the number of heads is a constant of a program, that of samples is not
        bias = bias.unsqueeze(1).expand(-1, q.shape[1], -1, -1, -1).flatten(0, 1)
        return attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias, dropout_p).unflatten(0, both)
    # samples count as heads, since their windows are the same: one bias per tile serves all of them
    out = attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias, dropout_p)
    return out.unflatten(1, q.shape[1:3])


@torch.compiler.assume_constant_result
@plans.per_geometry
def _tiles(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device) -> windows.Tiles:
    axes = [_axis_tiles(length, min(k, length)) for length, k in zip(grid, kernel, strict=True)]
    return windows.Tiles.create(axes, device)


def _axis_tiles(length: int, kernel: int) -> windows.AxisTiles:
    count = max(1, (2 * length + kernel) // (2 * kernel))  # tiles about as long as a window
    queries = windows.query_tiles(length, -(-length // count))
    halo = kernel // 2 if len(queries) == 2 else kernel - 1  # windows at the border reach inwards only
    window = np.clip(queries - kernel // 2, 0, length - kernel)  # where each query's begins, [T, b]
    keys = windows.stretches(window[:, 0], queries.shape[1] + halo, length)
    place = keys[:, None, :] - window[:, :, None]  # [T, b, w]
    return windows.AxisTiles(queries, keys, (place >= 0) & (place < kernel))


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


def _natten_is_best(call: _Call) -> bool:
    return call.query.is_cuda and _natten_obstacle(call) is None


@functools.cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _natten_obstacle(call: _Call) -> str | None:
    """Says why NATTEN cannot run a call."""
    query, kernel, mask, dropout_p, _ = call
    grid, width = tuple(query.shape[1:-2]), query.shape[-1]
    reasons = [
        (not _installed("natten"), "natten is not installed: pip install 'rat-timm[natten]'"),
        (mask is not None, "it has no masks"),
        (dropout_p > 0.0, "it has no dropout"),
        (torch.compiler.is_compiling(), "torch.compile cannot look into it"),
        (len(kernel) > 3, f"it takes up to 3 axes, not {len(kernel)}"),
        (min(*kernel, *grid) < 2, f"it needs windows and axes longer than 1, not {kernel} on {grid}"),
        (query.is_cuda and query.dtype == torch.float64, "its kernels have no float64"),
        (query.is_cuda and width % 8 > 0, f"its kernels need head_dim divisible by 8, not {width}"),
    ]
    found = next((reason for holds, reason in reasons if holds), None)
    if found is None and query.is_cuda and not _has_kernels():
        return "natten is installed without its CUDA kernels (libnatten)"
    return found


@functools.cache
def _has_kernels() -> bool:
    import natten

    if not natten.HAS_LIBNATTEN:
        warnings.warn(
            "natten is installed without its CUDA kernels (libnatten); neighbourhood attention does not use it",
            stacklevel=2,
        )
    return natten.HAS_LIBNATTEN


def _natten_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, ...], mask: Tensor | None, dropout_p: float
) -> Tensor:
    import natten

    run = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(kernel)]
    size = tuple(min(k, length) for k, length in zip(kernel, query.shape[1:-2], strict=True))
    return run(query, key, value, kernel_size=size)


def _flex_obstacle(call: _Call) -> str | None:
    """Says why FlexAttention cannot run a call."""
    query = call.query
    reasons = [
        (call.dropout_p > 0.0, "it has no dropout"),
        (query.device.type not in ("cpu", "cuda"), f"it does not run on {query.device.type}"),
        (not query.is_cuda and call.needs_grad, "it has no gradient on the CPU"),
        (query.is_cuda and query.dtype == torch.float64, "its kernels have no float64"),
        (query.is_cuda and not _installed("triton"), "triton is not installed"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, ...], mask: Tensor | None, dropout_p: float
) -> Tensor:
    grid = tuple(query.shape[1:-2])
    near = _near(grid, kernel)
    if mask is None:
        block_mask = _block_mask(grid, kernel, query.device)
    else:
        valid, count = mask.flatten(1), math.prod(grid)
        block_mask = create_block_mask(
            lambda b, h, i, j: near(b, h, i, j) & valid[b, j], len(mask), None, count, count, device=str(query.device)
        )
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, N, d]
    if torch.compiler.is_compiling():
        out: Any = flex_attention(q, k, v, block_mask=block_mask)
    else:
        with torch._dynamo.config.patch(recompile_limit=_SIZES):
            out = _compiled_flex_attention()(q, k, v, block_mask=block_mask)
    return out.transpose(1, 2).reshape(query.shape)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@plans.per_geometry
def _block_mask(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device) -> BlockMask:
    count = math.prod(grid)
    return create_block_mask(_near(grid, kernel), None, None, count, count, device=str(device))


def _near(grid: tuple[int, ...], kernel: tuple[int, ...]) -> Callable[..., Tensor]:
    """Returns the function of sample, head, query and key that tells whether the key is in the query's window."""
    sizes = [min(k, length) for k, length in zip(kernel, grid, strict=True)]
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = []
        for length, size, stride in zip(grid, sizes, strides, strict=True):
            place = j // stride % length - (i // stride % length - size // 2).clamp(0, length - size)
            inside.append((place >= 0) & (place < size))
        return functools.reduce(torch.logical_and, inside)

    return near


_OBSTACLES: dict[str, Callable[[_Call], str | None]] = {
    "torch": lambda call: None,
    "natten": _natten_obstacle,
    "flex": _flex_obstacle,
}
_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "torch": _tiled_attention,
    "natten": _natten_attention,
    "flex": _flex_attention,
}
