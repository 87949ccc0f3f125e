"""Pooling over all valid tokens of all levels, and features that carry their mask."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from ..geometry.grid import fill

_MASK = "_rat_timm_mask"  # an attribute of tensors


def with_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns features that carry their mask, for who hands them on to ``forward_head`` and nothing else.

    transformers does: what it pools would otherwise count masked places as zeros.
    """
    if mask is not None:
        setattr(x, _MASK, mask)
    return x


def carried_mask(x: Tensor) -> Tensor | None:
    """Returns the mask that features carry, True = valid; see `with_mask`."""
    return None if isinstance(x, Proxy) else getattr(x, _MASK, None)  # a proxy has any attribute


def average(features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Returns the mean over the valid places of all levels, ``[B, C]``; zeros for a sample without any.

    Args:
        features: One ``[B, *grid, C]`` per level.
        masks: One ``[B, *grid]`` or None per level, True = valid.
    """
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    filled = [fill(x, mask) for x, mask in zip(features, masks, strict=True)]
    total = functools.reduce(torch.add, [x.flatten(1, -2).sum(dim=1, dtype=dtype) for x in filled])
    count = functools.reduce(torch.add, [_count(x, mask) for x, mask in zip(features, masks, strict=True)])
    return (total / count.clamp(min=1).unsqueeze(-1)).to(features[0].dtype)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((1,), math.prod(x.shape[1:-1]), device=x.device)
    return mask.flatten(1).sum(dim=1)  # [B]
