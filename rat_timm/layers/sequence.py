"""The tokens of a plain transformer: one sequence of prefix tokens and the patches of all levels."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry.grid import Tokens, fill
from ..ops.masking import join_masks
from .head import average

POOLS = ("avg", "max", "avgmax")


class TokenSequence(NamedTuple):
    """Prefix tokens and the patches of all levels in one sequence, and what the blocks need to know of them.

    Attributes:
        x: Prefix tokens and patches, ``[B, P + N, C]``.
        rope: Of the patches, as timm's attention takes it, one for all blocks or one per block.
        levels: The levels' patches without features: their grids and masks.
        single: Whether the user gave one image and not a list.
    """

    x: Tensor
    rope: Tensor
    levels: list[Tokens]
    single: bool

    @property
    def valid(self) -> Tensor | None:
        """Which patches are valid, ``[B, N]``; None if all are."""
        return join_masks([level.mask for level in self.levels], [level.x.shape[:-1] for level in self.levels])

    def attention_mask(self, prefix: int) -> Tensor | None:
        """Returns which tokens may be looked at, ``[B, 1, 1, P + N]``; None if all may."""
        valid = self.valid
        return None if valid is None else attention_mask(valid, prefix)

    def split(self, x: Tensor, prefix: int) -> list[Tensor]:
        """Splits patches from the sequence ``x`` into ``[B, *grid, C]`` per level, zero where invalid."""
        sizes = [level.x.shape[1:-1].numel() for level in self.levels]
        parts = x[:, prefix:].split(sizes, dim=1)
        return [
            fill(part.unflatten(1, level.grid.shape), level.mask)
            for part, level in zip(parts, self.levels, strict=True)
        ]


def attention_mask(valid: Tensor, prefix: int) -> Tensor:
    """Returns which of ``prefix`` tokens and patches may be looked at, ``[B, 1, 1, prefix + N]``.

    Args:
        valid: ``[B, N]``, bool.
        prefix: Number of tokens before the patches, which are always valid.

    Returns:
        All True for a sample without any valid token, whose attention would be 0 / 0 otherwise.
    """
    allowed = F.pad(valid, (prefix, 0), value=True)
    return (allowed | ~allowed.any(dim=1, keepdim=True))[:, None, None]


def pool_valid(patches: Tensor, valid: Tensor, pool_type: str) -> Tensor:
    """Pools ``patches`` ``[B, N, C]``, zero where they are not ``valid`` ``[B, N]``; zeros for a sample without any.

    Args:
        patches: Features.
        valid: Bool, True = valid.
        pool_type: One of `POOLS`.
    """
    pooled = []
    if "avg" in pool_type:
        pooled.append(average([patches], [valid]))
    if "max" in pool_type:
        largest = patches.masked_fill(~valid.unsqueeze(-1), torch.finfo(patches.dtype).min).amax(dim=1)
        pooled.append(fill(largest, valid.any(dim=1)))
    return torch.stack(pooled).mean(dim=0)
