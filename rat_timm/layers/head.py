"""The head: pooling over all valid tokens of all levels, then a classifier."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..geometry.grid import channels_first, fill
from ..geometry.types import MapOrMaps
from ..ops.masking import check_mask
from .tracing import as_one_node

POOLS = ("avg", "token", "")
_MASK = "_rat_timm_mask"  # an attribute of tensors


class Head(nn.Module):
    """Pools features and classifies them.

    Args:
        in_features: Width.
        num_classes: Number of classes; 0 leaves the features as they are.
        pool_type: "avg" over the valid tokens of all levels, "token" for the first prefix token, "" for none.
        drop_rate: Dropout before the classifier.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If the pooling is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device, dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a new classifier; ``pool_type`` None keeps the pooling."""
        if pool_type is not None:
            if pool_type not in POOLS:
                raise ValueError(f"global_pool must be one of {POOLS}, got {pool_type!r}")
            self.pool_type = pool_type
        linear = nn.Linear(self.in_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else None
        self.fc = nn.Identity() if linear is None else linear
        if linear is not None:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.train(self.training)

    def forward(
        self,
        x: MapOrMaps,
        masks: Sequence[Tensor | None] | None = None,
        prefix: Tensor | None = None,
        pre_logits: bool = False,
    ) -> MapOrMaps:
        """Classifies.

        Args:
            x: Map ``[B, C, *grid]``, or one per level.
            masks: ``[B, *grid]``, True = valid, or None, for each level.
            prefix: ``[B, P, C]``, for "token".
            pre_logits: Whether to stop before the classifier.

        Returns:
            ``[B, classes]``; without pooling ``[B, classes, *grid]``, or one per level for a list.

        Raises:
            ValueError: If a mask does not fit its map, or a token is to be pooled and there is none.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, masks, prefix, pre_logits)
        maps = [x] if isinstance(x, Tensor) else x
        features = [level.movedim(1, -1) for level in maps]
        masks = masks or [None] * len(maps)
        if any(mask is not None for mask in masks):
            _check_masks(features, masks)
        if self.pool_type == "":
            classified = [self._classify(level, pre_logits) for level in features]
            out = [channels_first(fill(level, mask)) for level, mask in zip(classified, masks, strict=True)]
            return out[0] if isinstance(x, Tensor) else out
        if self.pool_type == "token":
            if prefix is None:
                raise ValueError("global_pool 'token' needs prefix tokens (reg_tokens), and forward_head their values")
            return self._classify(prefix[:, 0], pre_logits)
        return self._classify(average(features, masks), pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.drop(x)
        return x if pre_logits else self.fc(x)

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"pool_type={self.pool_type!r}"


def _check_masks(features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    if len(masks) != len(features):
        raise ValueError(f"mask must have one entry per map ({len(features)}), got {len(masks)}")
    for level, (x, mask) in enumerate(zip(features, masks, strict=True)):
        check_mask(mask, x.shape[:-1], f"mask of level {level}" if len(features) > 1 else "mask")


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
    if len(features) == 1 and masks[0] is None:
        return features[0].flatten(1, -2).mean(dim=1)
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    filled = [fill(x, mask) for x, mask in zip(features, masks, strict=True)]
    total = functools.reduce(torch.add, [x.flatten(1, -2).sum(dim=1, dtype=dtype) for x in filled])
    count = functools.reduce(torch.add, [_count(x, mask) for x, mask in zip(features, masks, strict=True)])
    return (total / count.clamp(min=1).unsqueeze(-1)).to(features[0].dtype)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((1,), math.prod(x.shape[1:-1]), device=x.device)
    return mask.flatten(1).sum(dim=1)  # [B]
