"""Where the tokens of every stage are: worked out of the images' grids once, before the first layer runs."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry.grid import Grid, Positions, Pyramid, field_center
from ...geometry.plans import keep
from ...layers.stem import share_stride
from ...ops.masking import pool_mask
from .config import RatConfig, StageConfig


class StagePlaces(NamedTuple):
    """Where one stage's tokens are, level by level.

    Attributes:
        grids: The tokens' grids.
        stride: That of the grouping, per axis; None without one.
        tokens: Positions for the blocks, in the stage's unit; of a global stage, those of all tokens of all levels in
            one sequence, prefix tokens first.
        fine: Positions of the tokens that are grouped, in the grouping's unit; empty without a grouping.
        groups: Positions of the groups, likewise.
    """

    grids: tuple[Grid, ...]
    stride: tuple[int, ...] | None
    tokens: tuple[Positions, ...]
    fine: tuple[Positions, ...]
    groups: tuple[Positions, ...]


class StageInput(NamedTuple):
    """What a stage has to know of its tokens beside their features.

    Attributes:
        places: Where they are.
        fine_masks: ``[B, *grid]``, True = valid, or None, for each level's tokens as they come in.
        masks: The same for the tokens that go out.
    """

    places: StagePlaces
    fine_masks: Sequence[Tensor | None]
    masks: Sequence[Tensor | None]


def stage_inputs(cfg: RatConfig, images: Pyramid) -> list[StageInput]:
    """Follows images through the stem and all stages.

    What is worked out of numbers is kept for the next images of the kind.
    """
    grids = [tokens.grid for tokens in images.levels]
    follow = functools.partial(_follow, cfg, grids)
    masks = [tokens.mask for tokens in images.levels]
    if any(None in grid.numbers for grid in grids):
        return _with_masks(follow(), masks, cfg)
    key = (cfg, tuple([(grid.shape, grid.numbers) for grid in grids]), grids[0].spacing.device)
    return _with_masks(keep(key, follow), masks, cfg)


def _with_masks(places: Sequence[StagePlaces], masks: Sequence[Tensor | None], cfg: RatConfig) -> list[StageInput]:
    if all(mask is None for mask in masks) or cfg.mask_token:
        whole = [None] * len(masks)
        return [StageInput(here, whole, whole) for here in places]
    inputs = []
    masks = [None if mask is None else pool_mask(mask, cfg.stem_strides) for mask in masks]
    for here in places:
        fine = masks
        if here.stride is not None:
            masks = [None if mask is None else pool_mask(mask, here.stride) for mask in masks]
        inputs.append(StageInput(here, fine, masks))
    return inputs


def _follow(cfg: RatConfig, grids: Sequence[Grid]) -> tuple[StagePlaces, ...]:
    places: list[StagePlaces] = []
    prefix = 0
    grids = [_embedded(grid, cfg) for grid in grids]
    for stage in cfg.stages():
        fine, grids, prefix = grids, [_grouped(grid, stage) for grid in grids], stage.reg_tokens or prefix
        tokens: Sequence[Positions]
        if stage.attn_kernel_size is None:
            tokens = [_sequence_positions(grids, stage.unit, prefix)]
        else:
            tokens = [grid.positions(field_center([grid]), stage.unit) for grid in grids]
        if stage.sga_attention_type is None:
            places.append(StagePlaces(tuple(grids), None, tuple(tokens), (), ()))
            continue
        # about the centre of the tokens, for groups too: rotations are relative
        sides = (
            [side.positions(field_center([grid]), stage.sga_unit) for side, grid in zip(sides, fine, strict=True)]
            for sides in (fine, grids)
        )
        places.append(StagePlaces(tuple(grids), stage.stride, tuple(tokens), *map(tuple, sides)))
    return tuple(places)


def _embedded(grid: Grid, cfg: RatConfig) -> Grid:
    """Returns the grid of the tokens that the stem makes of pixels."""
    kernels = cfg.stem_kernel_size
    for kernel, stride in zip(kernels, share_stride(cfg.stem_strides, kernels), strict=True):
        grid = grid.conv([kernel] * len(stride), stride, [kernel // 2] * len(stride))
    return grid


def _grouped(grid: Grid, stage: StageConfig) -> Grid:
    """Returns the grid of the groups that a stage makes of tokens."""
    return grid if stage.sga_attention_type is None else grid.conv(*stage.grouping_conv)


def _sequence_positions(grids: Sequence[Grid], unit: Sequence[float], prefix: int) -> Positions:
    """Lines up prefix and levels: ``[1 or B, N]`` per axis.

    Prefix tokens stand at the centre of the field, where the rotation is none.
    """
    center = field_center(grids)
    positions = [grid.positions(center, unit).dense() for grid in grids]
    if prefix:
        nowhere = positions[0].offset[0].new_zeros(1, prefix)
        positions.insert(0, Positions((nowhere,) * len(unit), (torch.ones_like(nowhere),) * len(unit)))
    return Positions(*(_line_up(parts) for parts in zip(*positions, strict=True)))


def _line_up(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Lines up what each part has per axis, ``[1 or B, *grid]``, into ``[1 or B, N]`` per axis."""
    rows = max(part[0].shape[0] for part in parts)
    return tuple(torch.cat([t.flatten(1).expand(rows, -1) for t in along], dim=1) for along in zip(*parts, strict=True))
