"""Where the tokens of every stage are: worked out of the images' grids once, before the first layer runs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry.grid import Grid, Positions, field_center
from ...ops.grouping import local_tiles
from ...ops.masking import pool_mask
from ...ops.neighborhood import neighborhood_plan, padded_grid
from ...ops.relative import pair_entries
from ...ops.windows import Tiles
from .config import RatConfig, StageConfig


class StagePlaces(NamedTuple):
    """Where one stage's tokens are, level by level.

    Attributes:
        grids: The tokens' grids.
        tokens: Positions for the blocks, in the stage's unit, on grids that may be filled up for windows; where all
            tokens attend to all, those of all levels in one sequence, prefix tokens first.
        windows: How the blocks' neighbourhoods cut each level's grid; None where another backend than PyTorch attends.
            Empty where all tokens attend to all. Like positions and ``entries``, none where blocks are convolutions.
        entries: Where all tokens attend to all and relative positions have a bias, the entry of each pair, ``[N, N]``.
        stride: That of the grouping, per axis; None without one.
        fine: Positions of the tokens that are grouped, in the grouping's unit; empty without a grouping.
        groups: Positions of the groups, likewise.
        cells: How a sparse grouping cuts the tokens' grid; None for another one.
    """

    grids: tuple[Grid, ...]
    tokens: tuple[Positions, ...]
    windows: tuple[Tiles | None, ...]
    entries: Tensor | None = None
    stride: tuple[int, ...] | None = None
    fine: tuple[Positions, ...] = ()
    groups: tuple[Positions, ...] = ()
    cells: tuple[Tiles | None, ...] = ()


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


def pool_masks(places: Sequence[StagePlaces], masks: Sequence[Tensor | None], cfg: RatConfig) -> list[StageInput]:
    """Follows the masks of images, ``[B, *size]`` or None for each level, through the stem and all stages."""
    inputs = []
    masks = [None if mask is None else pool_mask(mask, cfg.stem_strides) for mask in masks]
    for here in places:
        fine = masks
        if here.stride is not None:
            masks = [None if mask is None else pool_mask(mask, here.stride) for mask in masks]
        inputs.append(StageInput(here, fine, masks))
    return inputs


def stage_places(cfg: RatConfig, grids: Sequence[Grid]) -> tuple[StagePlaces, ...]:
    """Follows the grids of images through the stem and all stages."""
    places: list[StagePlaces] = []
    prefix = 0
    grids = [embedded(grid, cfg) for grid in grids]
    for stage in cfg.stages():
        fine, grids, prefix = grids, [grouped(grid, stage) for grid in grids], stage.reg_tokens or prefix
        grouping = () if stage.sga_attention_type is None else _of_grouping(stage, fine, grids)
        tokens, windows = _of_blocks(stage, grids, prefix)
        entries = None if windows else _entries(stage, grids, prefix)
        places.append(StagePlaces(tuple(grids), tokens, windows, entries, *grouping))
    return tuple(places)


def _of_blocks(
    stage: StageConfig, grids: Sequence[Grid], prefix: int
) -> tuple[tuple[Positions, ...], tuple[Tiles | None, ...]]:
    """Returns the positions of the tokens and the windows for a stage's blocks."""
    if stage.conv_kernel_size:
        return (), ()
    kernel = stage.attn_kernel_size
    if kernel is None or (stage.joint_attention and (prefix or len(grids) > 1)):
        return (sequence_positions(grids, stage.unit, prefix),), ()
    wide = [Grid(padded_grid(grid.shape, kernel), *grid[1:]) for grid in grids] if stage.pad_windows else grids
    tokens = [side.positions(field_center([grid]), stage.unit) for side, grid in zip(wide, grids, strict=True)]
    biased = stage.bias_kernel_size is not None
    return tuple(tokens), tuple([neighborhood_plan(grid.shape, kernel, grid.spacing.device, biased) for grid in wide])


def _entries(stage: StageConfig, grids: Sequence[Grid], prefix: int) -> Tensor | None:
    """Returns which bias each pair of tokens has in one sequence; None where there is no bias."""
    kernel = stage.attn_kernel_size
    if kernel is None or stage.bias_kernel_size is None:
        return None
    return pair_entries([grid.shape for grid in grids], prefix, kernel, grids[0].spacing.device)


def _of_grouping(
    stage: StageConfig, fine: Sequence[Grid], coarse: Sequence[Grid]
) -> tuple[tuple[int, ...], tuple[Positions, ...], tuple[Positions, ...], tuple[Tiles | None, ...]]:
    """Returns the stride of a stage's grouping, the positions of tokens and of groups, and how tokens are cut."""
    # about the centre of the tokens, for groups too: rotations are relative
    sides = (
        [side.positions(field_center([grid]), stage.sga_unit) for side, grid in zip(sides, fine, strict=True)]
        for sides in (fine, coarse)
    )
    cells: list[Tiles | None] = [None] * len(fine)
    if stage.sga_attention_type == "sparse":
        cells = [local_tiles(g.shape, stage.stride, stage.neighborhood_kernel, g.spacing.device) for g in fine]
    tokens, groups = map(tuple, sides)
    return stage.stride, tokens, groups, tuple(cells)


def embedded(grid: Grid, cfg: RatConfig) -> Grid:
    """Returns the grid of the tokens that the stem makes of pixels."""
    for conv in cfg.stem_convs:
        grid = grid.conv(*conv)
    return grid


def grouped(grid: Grid, stage: StageConfig) -> Grid:
    """Returns the grid of the groups that a stage makes of tokens."""
    return grid if stage.sga_attention_type is None else grid.conv(*stage.grouping_conv)


def sequence_positions(grids: Sequence[Grid], unit: Sequence[float], prefix: int) -> Positions:
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
