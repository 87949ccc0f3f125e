"""Neighbourhood attention by PyTorch alone, on every device: tiles through its fused attention (see `..windows`)."""

import operator

import numpy as np
import torch
from torch import Tensor

from ...geometry import plans
from .. import windows
from .backend import Backend, Call


def make_plan(
    grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device, biased: bool = False
) -> windows.Tiles:
    """Cuts a grid into tiles of queries with the keys that their windows reach; see `rat_timm.geometry.plans`."""
    return _tiles(tuple(map(operator.index, grid)), kernel, device, biased)


def _attend(call: Call) -> Tensor:
    tiles = make_plan(call.grid, call.kernel, call.query.device, call.bias is not None)
    return windows.attend_in_tiles(call.query, call.key, call.value, tiles, call.mask, call.dropout_p, call.bias)


@torch.compiler.assume_constant_result
@plans.per_geometry
def _tiles(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device, biased: bool) -> windows.Tiles:
    axes = [_axis_tiles(length, min(k, length)) for length, k in zip(grid, kernel, strict=True)]
    return windows.Tiles.create(axes, device, reach=[k - 1 for k in kernel] if biased else None)


def _axis_tiles(length: int, kernel: int) -> windows.AxisTiles:
    count = max(1, (2 * length + kernel) // (2 * kernel))  # tiles about as long as a window
    first = np.clip(np.arange(length) - kernel // 2, 0, length - kernel)
    return windows.AxisTiles.create(first, first + kernel - 1, -(-length // count))


BACKEND = Backend(_attend, obstacle=lambda call: None, best_on=None)
