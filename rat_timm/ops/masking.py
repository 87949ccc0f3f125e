"""Validity masks, True = valid: checked, pooled onto coarser grids, joined."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


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
    size = tuple(stride)
    return MAX_POOLS[len(size)](mask.float().unsqueeze(1), kernel_size=size, stride=size, ceil_mode=True).squeeze(1) > 0


def take_largest(
    x: Tensor, mask: Tensor | None, extent: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Takes the largest value of the valid places in a window, channel by channel.

    Args:
        x: ``[B, C, *grid]``.
        mask: ``[B, *grid]``, True = valid, or None.
        extent: Places that the window spans per axis; it reaches over a cell of the stride.
        stride: How far it moves.
        padding: How far it begins before the first place.

    Returns:
        ``[B, C, *ceil(grid / stride)]``, zero where no place of the cell is valid, and its mask.
    """
    pool = MAX_POOLS[len(stride)]
    if mask is None:
        return pool(x, extent, stride, padding), None
    largest = pool(x.masked_fill(~mask.unsqueeze(1), -torch.inf), extent, stride, padding)
    mask = pool_mask(mask, stride)
    return torch.where(mask.unsqueeze(1), largest, 0.0), mask


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
