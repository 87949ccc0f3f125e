"""Neighbourhood attention by PyTorch alone, on every device: tiles through its fused attention (see `..windows`)."""

import math
import operator

import numpy as np
import torch
from torch import Tensor

from ...geometry import plans
from .. import windows
from ..masking import attention, has_gradient, masked_attention
from .backend import Backend, Call

_NUMBERS = 1 << 23  # entries of keys that are gathered at a time
_NUMBERS_CPU = 1 << 21  # the same per thread of a CPU: parts that stay near its cache, and are not too many


def make_plan(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device) -> windows.Tiles:
    """Cuts a grid into tiles of queries with the keys that their windows reach; see `rat_timm.geometry.plans`."""
    return _tiles(tuple(map(operator.index, grid)), kernel, device)


def _attend(call: Call) -> Tensor:
    query, key, value, kernel, mask, dropout_p, plan = call
    tiles = make_plan(call.grid, kernel, query.device) if plan is None else plan
    if plans.is_traced():
        return _attend_in_program(call, tiles)
    if has_gradient(query, key, value):
        return tiles.untile(_attend_in_tiles(query, key, value, tiles, _bias(tiles, query.dtype), mask, dropout_p))
    size, mixed = _part_sizes(tiles, query)
    samples = max(1, size // tiles.keys.tiles)
    inputs = [[_places_first(part) for part in x.split(samples)] for x in (query, key, value)]
    masks = [None] * len(inputs[0]) if mask is None else mask.split(samples)
    calls = list(zip(*inputs, masks, strict=True))
    outs: list[list[Tensor]] = [[] for _ in calls]
    for part in tiles.split(size, mixed):
        bias = _bias(part, query.dtype)
        for out, (q, k, v, m) in zip(outs, calls, strict=True):
            out.append(_attend_in_tiles(q, k, v, part, bias, m, dropout_p))
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
    forbidden = tiles.kinds.logical_not()
    return tiles.of_tiles(torch.zeros_like(forbidden, dtype=dtype).masked_fill(forbidden, -math.inf)).unsqueeze(1)


def share_bias(tiles: windows.Tiles, x: Tensor) -> windows.Tiles:
    """Adds to tiles what is added to the logits of a batch ``x`` ``[B, ...]``."""
    return windows.Tiles(*tiles[:-1], bias=_batch_bias(tiles, x))  # dynamo (strict exports) traces no _replace


def _batch_bias(tiles: windows.Tiles, x: Tensor) -> Tensor:
    return _bias(tiles, x.dtype).expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)


def _attend_in_tiles(
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
    # samples count as heads, since their windows are the same: one bias per tile serves all of them
    out = attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), bias, dropout_p)
    return out.unflatten(1, q.shape[1:3])


def _attend_in_program(call: Call, tiles: windows.Tiles) -> Tensor:
    """Attends in as few operations as there can be: a program's time to compile or convert grows with them."""
    q, k, v = (
        g.take_in_program(x) for g, x in ((tiles.queries, call.query), (tiles.keys, call.key), (tiles.keys, call.value))
    )
    if call.mask is None:
        bias = tiles.bias
        if bias is None or bias.dtype != q.dtype:
            bias = _batch_bias(tiles, call.query)
        return tiles.untile_in_program(attention(q, k, v, bias, call.dropout_p))
    valid = tiles.keys.take_in_program(call.mask[..., None, None]).transpose(2, 3)  # [B * tiles, 1, 1, keys]
    allowed = tiles.allowed().expand(call.query.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1) & valid
    return tiles.untile_in_program(masked_attention(q, k, v, allowed, call.dropout_p))


@torch.compiler.assume_constant_result
@plans.per_geometry
def _tiles(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device) -> windows.Tiles:
    axes = [_axis_tiles(length, min(k, length)) for length, k in zip(grid, kernel, strict=True)]
    return windows.Tiles.create(axes, device)


def _axis_tiles(length: int, kernel: int) -> windows.AxisTiles:
    count = max(1, (2 * length + kernel) // (2 * kernel))  # tiles about as long as a window
    first = np.clip(np.arange(length) - kernel // 2, 0, length - kernel)
    return windows.AxisTiles.create(first, first + kernel - 1, -(-length // count))


BACKEND = Backend(_attend, obstacle=lambda call: None, is_best=lambda call: True)
