"""Maps at other places: what a model made on its grid, at the places of any grid that a user asks for."""

import torch
from torch import Tensor
from torch.nn import functional as F

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
    index = _index_in(tokens.grid, grid)  # [1 or B, *shape, axes]
    size = index.new_tensor(tokens.grid.shape)
    beyond = reach + _ROUNDING
    inside = ((index > -beyond) & (index < size - 1 + beyond)).all(dim=-1).expand(batch, *grid.shape)
    at = ((2 * index + 1) / size - 1).flip(-1).expand(batch, *grid.shape, axes)  # grid_sample's: x first, from -1 to 1
    dtype = exact_dtype(tokens.x.dtype)
    x = _sampled(tokens.filled().to(dtype), at.to(dtype))
    valid = inside
    if tokens.mask is not None:
        weight = _sampled(tokens.mask.unsqueeze(-1).to(dtype), at.to(dtype))
        valid = inside & (weight[..., 0] > 0)
        x = x / torch.where(weight > 0, weight, 1.0)  # no division by zero, whose gradient is not a number
    return Tokens(fill(x, valid).to(tokens.x.dtype), grid, valid)


def _index_in(source: Grid, grid: Grid) -> Tensor:
    """Returns the places of ``grid`` as indices of ``source``, fractions included, ``[1 or B, *shape, axes]``."""
    rows = [1] * len(grid.shape)
    origin, spacing = (values.view(-1, *rows, len(rows)) for values in (source.origin, source.spacing))
    return (grid.coordinates() - origin) / spacing


def _sampled(x: Tensor, at: Tensor) -> Tensor:
    """``[B, *grid, C]`` at normalised coordinates ``[B, *shape, axes]``."""
    if at.shape[-1] == 1:  # PyTorch samples planes and volumes
        at = torch.stack((at[..., 0], torch.zeros_like(at[..., 0])), dim=-1)
        return _sampled(x.unsqueeze(1), at.unsqueeze(1)).squeeze(1)
    maps = F.grid_sample(x.movedim(-1, 1), at, mode="bilinear", padding_mode="border", align_corners=False)
    return maps.movedim(1, -1)
