"""Slabs of a large grid, so that in inference what a token does alone needs no temporaries as large as the image.

Norms, projections, rotations and MLPs see one token at a time. On a grid of a million tokens each of their results is
hundreds of megabytes of fresh memory, which costs more time than the arithmetic; in slabs, temporaries stay in the
cache and results are written where they are wanted.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..geometry.grid import Positions
from ..ops.windows import is_transformed

_NUMBERS_CPU = 1 << 20  # of a temporary in a slab, per thread of a CPU
_NUMBERS = 1 << 26  # the same on other devices, where each launch costs time


class Slab(NamedTuple):
    """Some samples, or some rows of the first axis of one sample.

    Attributes:
        samples: Of the batch.
        rows: Of the first axis of the grid.
    """

    samples: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """Returns its part of ``[B, rows, ...]``."""
        return x[self.samples, self.rows]

    def positions(self, positions: Positions) -> Positions:
        """Returns where its tokens are."""
        return Positions(*(tuple(self._part(x) for x in part) for part in positions))

    def _part(self, x: Tensor) -> Tensor:
        x = x[self.samples] if x.shape[0] > 1 else x
        return x[:, self.rows] if x.shape[1] > 1 else x


def slabs(x: Tensor, width: int, module: nn.Module) -> list[Slab]:
    """Cuts a batch of grids; into one slab where it is small, or has to stay whole.

    It stays whole in training and in programs, and where hooks watch a part of the module, which expect all tokens at
    once.

    Args:
        x: ``[B, *grid, C]``.
        width: Numbers per token of the largest temporary.
        module: Runs on the slabs.
    """
    whole = [Slab(slice(None), slice(None))]
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return whole
    samples, rows = x.shape[:2]
    per_row = x.shape[2:-1].numel() * width
    limit = _NUMBERS_CPU * torch.get_num_threads() if x.device.type == "cpu" else _NUMBERS
    if samples * rows * per_row <= limit or _is_watched(module):
        return whole
    if rows * per_row <= limit:
        return [Slab(part, slice(None)) for part in _cut(samples, limit // (rows * per_row))]
    cuts = list(_cut(rows, max(1, limit // per_row)))
    return [Slab(slice(sample, sample + 1), part) for sample in range(samples) for part in cuts]


def _cut(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
