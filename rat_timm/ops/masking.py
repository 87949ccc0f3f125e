"""Validity masks, True = valid: checked, pooled onto coarser grids, joined."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def check_mask(mask: object, shape: Sequence[int], name: str = "mask") -> None:
    """Raises ``ValueError`` unless ``mask`` is None or a bool tensor of ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a bool tensor {list(shape)}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")


def pool_mask(mask: Tensor, stride: Sequence[int]) -> Tensor:
    """Returns the mask of the coarse grid: a cell is valid if any place under it is.

    Args:
        mask: ``[B, *grid]``, bool, True = valid.
        stride: Cell size per axis; the last cell of an axis may be cut off.
    """
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(stride)]
    size = tuple(stride)
    return pool(mask.float().unsqueeze(1), kernel_size=size, stride=size, ceil_mode=True).squeeze(1) > 0


def join_masks(masks: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> Tensor | None:
    """Joins the levels' masks into ``[B, N]``; None if no level has one."""
    if all(mask is None for mask in masks):
        return None
    device = next(mask.device for mask in masks if mask is not None)
    flat = [
        torch.ones(tuple(shape), dtype=torch.bool, device=device).flatten(1) if mask is None else mask.flatten(1)
        for mask, shape in zip(masks, shapes, strict=True)
    ]
    return torch.cat(flat, dim=1)
