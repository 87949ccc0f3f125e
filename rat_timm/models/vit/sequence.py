"""The tokens of a plain transformer: prefix tokens and patches in one sequence, where some patches are not valid."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.grid import fill
from ...geometry.types import MapOrMaps
from ...layers.head import average

POOLS = ("avg", "max", "avgmax")


class VitSequence(Protocol):
    """What enters the blocks of a plain transformer, and how their tokens are taken apart again."""

    @property
    def x(self) -> Tensor:
        """Prefix tokens and patches, ``[B, P + N, C]``."""

    @property
    def valid(self) -> Tensor | None:
        """Which patches are valid, ``[B, N]``; None if all are."""

    def block_args(self, index: int) -> dict[str, Any]:
        """Returns what the block at ``index`` is told of positions, as keywords."""

    def sequences(self, x: Tensor) -> MapOrMaps:
        """Returns tokens ``[B, P + N, C]`` as a user gets them: per level, zero where invalid, with their masks."""

    def maps(self, x: Tensor, output_fmt: str) -> MapOrMaps:
        """Returns the patches of tokens ``[B, P + N, C]`` as maps ("NCHW") or sequences ("NLC"), zero where invalid."""

    def places(self, count: int) -> dict[str, Any]:
        """Returns where the patches of ``count`` maps are, as entries of the dict that ``output_dict`` asks for."""


def pad_prefix(valid: Tensor, prefix: int) -> Tensor:
    """Returns which tokens are valid, ``[B, prefix + N]``: prefix tokens, and those of the patches ``[B, N]``."""
    return F.pad(valid, (prefix, 0), value=True)


def attention_mask(valid: Tensor, prefix: int) -> Tensor:
    """Returns which of ``prefix`` tokens and patches may be looked at, ``[B, 1, 1, prefix + N]``.

    Args:
        valid: ``[B, N]``, bool.
        prefix: Number of tokens before the patches, which are always valid.

    Returns:
        All True for a sample without any valid token, whose attention would be 0 / 0 otherwise.
    """
    allowed = pad_prefix(valid, prefix)
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
