"""Maps at other places: what a model made on its grid, at the places of any grid that a user asks for."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .grid import Grid, Tokens, exact_dtype, fill

_ROUNDING = 1e-6  # of a place's width, by which a place may lie outside the field of view


def sample_at(tokens: Tokens, grid: Grid, reach: float = 0.5) -> Tokens:
    """Samples a map at the places of another grid, linearly between centres, in physical coordinates.

    So labels come back to the pixels of an image that a physical stem has resampled, and maps of several levels to one
    grid; no map is averaged: for a much coarser grid use `rat_timm.geometry.resample.resample`.

    Args:
        tokens: A map on its grid, of 1, 2 or 3 axes; what is masked has no weight.
        grid: Where to sample it; its spacing and origin have one row, or one per sample.
        reach: How far beyond the map's outermost centres their values hold, in distances of its places. Default: to
            the end of the map's field of view. With 1 also where the map of an image ends before the image does, as
            that of a strided convolution, whose outermost centre lies on the first pixel of several, may.

    Returns:
        ``[B, *grid.shape, C]`` on ``grid``. A place is valid if it lies within ``reach``, and a valid place of the map
        has a share in it; others are zero.

    Raises:
        ValueError: If the grids have other numbers of axes, or rows that do not go with the map's samples.
    """
    axes, batch = len(tokens.grid.shape), len(tokens.x)
    if len(grid.shape) != axes or len(grid.spacing) not in (1, batch):
        raise ValueError(
            f"grid must have {axes} axes and one row or one per sample ({batch}), got shape {grid.shape} and "
            f"{len(grid.spacing)} rows"
        )
    index = _index_in(tokens.grid, grid)
    inside = _inside(index, tokens.grid.shape, reach + _ROUNDING).expand(batch, *grid.shape)
    dtype = exact_dtype(tokens.x.dtype)
    x = _sampled(tokens.filled().to(dtype), index)
    valid = inside
    if tokens.mask is not None:
        weight = _sampled(tokens.mask.unsqueeze(-1).to(dtype), index)
        valid = inside & (weight[..., 0] > 0)
        x = x / torch.where(weight > 0, weight, 1.0)  # no division by zero, whose gradient is not a number
    return Tokens(fill(x, valid).to(tokens.x.dtype), grid, valid)


def _index_in(source: Grid, grid: Grid) -> list[Tensor]:
    """Returns the places of ``grid`` as indices of ``source``, fractions included, ``[1 or B, n]`` for each axis."""
    indices = []
    for axis, n in enumerate(grid.shape):
        origin, spacing = (values[:, axis, None] for values in (source.origin, source.spacing))
        ticks = torch.arange(n, device=grid.origin.device, dtype=grid.origin.dtype)
        index = (grid.origin[:, axis, None] + ticks * grid.spacing[:, axis, None] - origin) / spacing
        whole = index.round()
        indices.append(torch.where((index - whole).abs() < _ROUNDING, whole, index))
    return indices


def _inside(index: Sequence[Tensor], shape: Sequence[int], reach: float) -> Tensor:
    """Returns which places lie less than ``reach`` beyond the outermost centres, ``[1 or B, *shape]``."""
    axes = len(shape)
    within = []
    for axis, (at, n) in enumerate(zip(index, shape, strict=True)):
        here = (at > -reach) & (at < n - 1 + reach)
        within.append(here.view(len(at), *[-1 if other == axis else 1 for other in range(axes)]))
    return functools.reduce(torch.logical_and, within)


def _sampled(x: Tensor, index: Sequence[Tensor]) -> Tensor:
    """``[B, *grid, C]`` at indices per axis, each ``[1 or B, n]``, axis by axis: grids are products of their axes."""
    for axis, at in enumerate(index, start=1):
        x = _interpolated(x, axis, at)
    return x


def _interpolated(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Interpolates along one axis at indices ``[1 or B, n]``; beyond the outermost centres their values hold."""
    last = x.shape[axis] - 1
    index = index.clamp(0, last)
    lower = index.floor()
    shape = [len(index), *[1] * (axis - 1), -1, *[1] * (x.ndim - 1 - axis)]
    share, lower = (index - lower).to(x.dtype).view(shape), lower.long()
    return torch.lerp(_taken(x, axis, lower), _taken(x, axis, (lower + 1).clamp(max=last)), share)


def _taken(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Takes places of one axis, ``[1 or B, n]``, out of ``[B, *grid, C]``."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    # as rows of a matrix: along an inner axis index_select takes up to ten times as long on the CPU
    first = torch.arange(math.prod(before), device=x.device).view(len(x), -1, 1) * x.shape[axis]
    rows = (first + index.unsqueeze(1)).flatten()
    return x.reshape(-1, math.prod(after)).index_select(0, rows).view(*before, index.shape[1], *after)
