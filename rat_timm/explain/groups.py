"""Which tokens went to which group: the assignments of spatial grouping attention, at the image's pixels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..geometry.grid import Grid, Tokens
from ..geometry.types import MaskLike, SpacingLike
from ..models import ResolutionAwareTransformer
from ..ops.assignment import compose
from .images import at_pixels, backbone_of, read

_AT_ONCE = 64  # groups that are sampled at the pixels at once: all of them may not fit into memory


class Groups(NamedTuple):
    """To which group the tokens of a finer stage went.

    Attributes:
        labels: The group with the largest share in each pixel, counted along the coarse grid, ``[B, *size]``; -1 where
            masked.
        share: That share, from 0 to 1, ``[B, *size]``; 0 where masked.
        shares: Each token's share in each group, ``[B, *fine, G]``; sums to 1, to 0 for a masked token.
        fine: Where the tokens are.
        coarse: Where the groups are.
    """

    labels: Tensor
    share: Tensor
    shares: Tensor
    fine: Grid
    coarse: Grid


@torch.no_grad()
def group_tokens(
    model: nn.Module,
    x: Tensor,
    *,
    fine: int | None = None,
    coarse: int = -1,
    spacing: SpacingLike = None,
    mask: MaskLike = None,
) -> Groups:
    """Tells which group each pixel belongs to: a segmentation that no decoder makes (arXiv 2505.16993).

    Args:
        model: A hierarchical RAT whose stages group tokens, or a segmenter with one; in evaluation mode.
        x: Images ``[B, C, *size]``.
        fine: The stage whose tokens are told apart. Default: the finest from which groupings lead to ``coarse``, which
            may be the stem's.
        coarse: The stage whose tokens are the groups.
        spacing: Physical pixel size, in any form that the models take; the same for all samples.
        mask: ``[B, *size]``, True = valid.

    Raises:
        ValueError: If an argument does not fit, or no groupings lead from ``fine`` to ``coarse``.
    """
    backbone: Any = backbone_of(model)
    if not isinstance(backbone, ResolutionAwareTransformer):
        raise ValueError(f"model must group tokens, which a {type(backbone).__name__} does not")
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x must be images [B, C, *size], got a {type(x).__name__}: give a pyramid's levels one by one"
        )
    groupings = [i for i, stage in enumerate(backbone.stages) if hasattr(stage.downsample, "sga")]
    chain = _chain(groupings, len(backbone.stages), fine, coarse)
    (image,) = read(backbone, x, spacing, mask).levels
    out: Any = backbone.forward_intermediates(
        x, output_dict=True, return_assignments=True, intermediates_only=True, spacing=spacing, mask=mask
    )
    shares = compose([out["assignments"][groupings.index(stage)] for stage in chain])
    first = out["grids"][chain[0]]
    grouping: Any = backbone.stages[chain[0]].downsample
    grid = Grid(tuple(shares.shape[1:-1]), first.spacing / first.spacing.new_tensor(grouping.sga.stride), first.origin)
    labels, share = _largest(shares, grid, image)
    return Groups(labels, share, shares, grid, out["grids"][chain[-1]])


def _chain(groupings: Sequence[int], count: int, fine: int | None, coarse: int) -> list[int]:
    """Returns the stages whose groupings lead from ``fine`` to ``coarse``."""
    last = coarse + count if coarse < 0 else coarse
    if last not in groupings:
        raise ValueError(f"coarse must be a stage whose tokens are groups, {list(groupings)}, got {coarse}")
    first = last
    while first - 1 in groupings:
        first -= 1
    if fine is None:
        return list(range(first, last + 1))
    if not max(0, first - 1) <= fine < last:
        raise ValueError(f"fine must be a stage from {max(0, first - 1)} to {last - 1}, got {fine}")
    return list(range(fine + 1, last + 1))


def _largest(shares: Tensor, grid: Grid, image: Tokens) -> tuple[Tensor, Tensor]:
    """Returns the group with the largest share in each pixel, and that share."""
    mask = shares.sum(dim=-1) > 0.5  # it is 1, or 0 for a masked token
    labels = torch.full((len(shares), *image.grid.shape), -1, device=shares.device)
    best = shares.new_zeros(labels.shape)
    for start in range(0, shares.shape[-1], _AT_ONCE):
        part = shares[..., start : start + _AT_ONCE]
        share, label = at_pixels(part, grid, mask, image).max(dim=-1)
        labels, best = torch.where(share > best, label + start, labels), torch.maximum(share, best)
    return labels, best
