"""Biases of relative positions where all tokens of several grids attend to all, in one sequence."""

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..geometry.plans import per_geometry
from .windows import tensor_of


def pair_entries(grids: Sequence[Sequence[int]], prefix: int, kernel: Sequence[int], device: torch.device) -> Tensor:
    """Returns the entry of a table of relative positions that each pair of tokens has.

    Tokens of one grid that are farther apart than a neighbourhood reaches have the entry at its edge, tokens of two
    grids and prefix tokens the one past the last, which is no bias.

    Args:
        grids: Shapes of the grids, whose tokens are lined up.
        prefix: Number of tokens in front of them that have no place.
        kernel: The neighbourhood per axis, whose relative positions the table has, ``2 * kernel - 1`` per axis.
        device: Where the index is.

    Returns:
        ``[N, N]``, queries and keys.
    """
    shapes = tuple([tuple(map(operator.index, grid)) for grid in grids])
    return _entries(shapes, prefix, tuple(kernel), device)


def pair_bias(table: Tensor, entries: Tensor) -> Tensor:
    """Looks pairs up in a table ``[heads, *relative positions]``: ``[1, heads, N, N]``."""
    flat = table.flatten(1)
    flat = torch.cat((flat, torch.zeros_like(flat[:, :1])), dim=1)
    return flat.index_select(1, entries.flatten()).unflatten(1, entries.shape).unsqueeze(0)


@torch.compiler.assume_constant_result
@per_geometry
def _entries(grids: tuple[tuple[int, ...], ...], prefix: int, kernel: tuple[int, ...], device: torch.device) -> Tensor:
    sizes = [2 * k - 1 for k in kernel]
    ends = prefix + np.cumsum([np.prod(grid) for grid in grids])
    entries = np.full((ends[-1], ends[-1]), np.prod(sizes))
    for grid, start, end in zip(grids, (prefix, *ends), ends, strict=False):
        places = np.indices(grid).reshape(len(grid), -1)
        steps = [np.clip(p - p[:, None], 1 - k, k - 1) + k - 1 for p, k in zip(places, kernel, strict=True)]
        entries[start:end, start:end] = np.ravel_multi_index(steps, sizes)
    return tensor_of(entries, device)
