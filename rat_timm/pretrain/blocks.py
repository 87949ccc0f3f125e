"""Blocks of a physical size: which of them are hidden from a model, and pixels normalised in each of them.

Blocks are counted from the lower corner of a field of view. A place belongs to the block in which its centre lies.
Chance is PyTorch's: seeding PyTorch repeats what is hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.grid import Grid, axis_values
from ..ops.assignment import to_pixels

FLOOR = 0.1
"""Deviation that is added, as a variance, to that of each block's pixels, in the numbers of images that are about
normalised: noise on an empty ground is not blown up to what there is to predict."""
_ROUNDING = 1e-6  # of a block, by which a centre may lie before it


class Blocks(NamedTuple):
    """The block of each place of a grid.

    Attributes:
        number: ``[1 or B, *shape]``, int64.
        most: One more than the largest number that there may be.
    """

    number: Tensor
    most: int

    @classmethod
    def of(cls, grid: Grid, block: Sequence[float], cell: Sequence[int] | None = None) -> "Blocks":
        """Numbers blocks.

        Args:
            grid: The places.
            block: Physical length of a block along each axis.
            cell: Places along each axis that are in one block together. Default: one.
        """
        shape = grid.shape
        if cell is not None:
            padded = tuple(n + -n % c for n, c in zip(shape, cell, strict=True))
            grid = grid._replace(shape=padded).conv(cell, cell, [0] * len(cell))
        number, most = torch.zeros((), dtype=torch.long, device=grid.spacing.device), 1
        for axis, (n, length) in enumerate(zip(grid.shape, block, strict=True)):
            centers = (torch.arange(n, device=grid.spacing.device) + 0.5) * grid.spacing[:, axis, None]
            along = (centers / length + _ROUNDING).floor().long()  # [1 or B, n]
            size = int(along.max()) + 1
            view = [-1 if other == axis else 1 for other in range(len(shape))]
            number, most = number * size + along.view(len(along), *view), most * size
        return cls(number if cell is None else to_pixels(number, cell, shape), most)


def hide_blocks(
    grid: Grid,
    block: float | Sequence[float],
    share: float,
    count: int = 1,
    *,
    valid: Tensor | None = None,
    cell: Sequence[int] | None = None,
) -> Tensor:
    """Hides blocks at random, until as near to a share of the valid places is hidden as whole blocks allow.

    At least one block is hidden and one is not. A sample whose valid places are all in one block stays as it is.

    Args:
        grid: The pixels of images; one row, or one per sample.
        block: Physical length of a block, for all axes or one per axis, in the unit of the grid.
        share: Of the valid places.
        count: Number of samples.
        valid: ``[count, *shape]``, bool. Default: all are.
        cell: Pixels along each axis that are hidden together, where a model sees cells of them: the size of a plain
            transformer's patch. They are in the block of the cell's centre.

    Returns:
        ``[count, *shape]``, bool, True = hidden; where nothing is valid, nothing is hidden.

    Raises:
        ValueError: If ``block`` is not positive or ``share`` not between 0 and 1.
    """
    lengths = axis_values(block, "block", len(grid.shape))
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    number, most = Blocks.of(grid, lengths, cell)
    number = number.expand(count, *grid.shape).flatten(1)
    there = torch.ones_like(number, dtype=torch.bool) if valid is None else valid.flatten(1)
    hidden = [_hide(*each, most, share) for each in zip(number, there, strict=True)]
    return torch.stack(hidden).unflatten(1, grid.shape)


def _hide(number: Tensor, valid: Tensor, most: int, share: float) -> Tensor:
    """Hides the blocks, by number ``[N]``, of one sample; returns ``[N]``."""
    sizes = torch.bincount(number[valid], minlength=most)
    blocks = sizes.nonzero()[:, 0]
    chosen = torch.zeros(most, dtype=torch.bool, device=number.device)
    if len(blocks) > 1:
        order = blocks[torch.randperm(len(blocks)).to(blocks.device)]
        ends = sizes[order].cumsum(0)
        hides = ends - sizes[order] / 2 < share * ends[-1]  # ends nearest to the share
        hides[0], hides[-1] = True, False
        chosen[order[hides]] = True
    return chosen[number] & valid


def hide_pyramid(
    grids: Sequence[Grid],
    block: float | Sequence[float],
    share: float,
    count: int = 1,
    *,
    level: float = 0.0,
    valid: Sequence[Tensor | None] | None = None,
    cell: Sequence[int] | None = None,
) -> list[Tensor]:
    """Hides blocks in each level of a pyramid, and with some probability one level as a whole.

    Args:
        grids: The pixels of each level.
        block: See `hide_blocks`, of level 0; see `level_blocks` for the others.
        share: Of each level.
        count: Number of samples.
        level: Probability that a level, drawn at random for each sample, is hidden as a whole: it is to be told from
            the others.
        valid: ``[count, *shape]``, bool, or None, for each level.
        cell: See `hide_blocks`.

    Returns:
        ``[count, *shape]``, bool, True = hidden, for each level.

    Raises:
        ValueError: As `hide_blocks`; if ``level`` is no probability, or not 0 where there is one level.
    """
    if not 0 <= level <= 1 or (level and len(grids) == 1):
        raise ValueError(f"level must be a probability, and 0 for a single image, got {level} for {len(grids)} levels")
    masks = [None] * len(grids) if valid is None else valid
    hidden = [
        hide_blocks(grid, lengths, share, count, valid=there, cell=cell)
        for grid, lengths, there in zip(grids, level_blocks(grids, block), masks, strict=True)
    ]
    if not level:
        return hidden
    drawn = torch.randint(len(grids), (count,)).where(torch.rand(count) < level, -1)
    for index, one in enumerate(hidden):
        there = masks[index]
        whole = (drawn == index).view(-1, *[1] * (one.ndim - 1)).to(one.device)
        hidden[index] = one | (whole if there is None else whole & there)
    return hidden


def level_blocks(grids: Sequence[Grid], block: float | Sequence[float]) -> list[tuple[float, ...]]:
    """Returns the length of blocks in each level: as much larger than in level 0 as the first sample's pixels are."""
    lengths = axis_values(block, "block", len(grids[0].shape))
    first = grids[0].spacing[0]
    ratios = [(grid.spacing[0] / first).tolist() for grid in grids]
    return [tuple(length * r for length, r in zip(lengths, ratio, strict=True)) for ratio in ratios]


class BlockNorm(NamedTuple):
    """What pixels of each block are normalised by.

    Attributes:
        mean: ``[B, C, *size]``, of the valid pixels of each pixel's block.
        std: Likewise the deviation, with `FLOOR`.
    """

    mean: Tensor
    std: Tensor

    def apply(self, image: Tensor) -> Tensor:
        """Normalises ``[B, C, *size]``."""
        return (image - self.mean) / self.std

    def undo(self, image: Tensor) -> Tensor:
        """Returns the pixels of which these are the normalised ones."""
        return image * self.std + self.mean


def normalize_blocks(
    image: Tensor, grid: Grid, block: float | Sequence[float], valid: Tensor | None = None
) -> BlockNorm:
    """Measures mean and deviation of the valid pixels of each block, channel by channel.

    Args:
        image: ``[B, C, *size]``.
        grid: Its pixels.
        block: See `hide_blocks`.
        valid: ``[B, *size]``, bool: what stands elsewhere, NaN included, influences nothing. Default: all are.
    """
    number, most = Blocks.of(grid, axis_values(block, "block", len(grid.shape)))
    where = number.expand(len(image), *grid.shape).flatten(1).unsqueeze(1)  # [B, 1, N]
    there = torch.ones_like(where, dtype=torch.bool) if valid is None else valid.flatten(1).unsqueeze(1)
    x = torch.where(there, image.flatten(2).float(), 0.0)
    count = _sums(there.float(), where, most).clamp(min=1)
    mean = (_sums(x, where, most) / count).gather(2, where.expand_as(x))
    square = torch.where(there, x - mean, 0.0).square()
    variance = (_sums(square, where, most) / count).gather(2, where.expand_as(x))
    std = (variance + FLOOR**2).sqrt()
    return BlockNorm(mean.view(image.shape), std.view(image.shape))


def _sums(x: Tensor, where: Tensor, count: int) -> Tensor:
    """Adds up ``[B, C, N]`` by number ``[B, 1, N]``, ``[B, C, count]``."""
    return x.new_zeros(*x.shape[:2], count).scatter_add(2, where.expand_as(x), x)


def check_block(block: Sequence[float], field: Sequence[float]) -> None:
    """Raises ``ValueError`` if a field of view of these lengths is not longer than one block along any axis."""
    if all(length >= whole * (1 - _ROUNDING) for length, whole in zip(block, field, strict=True)):
        raise ValueError(
            f"block must be smaller than the field of view {[round(n, 6) for n in field]}, got "
            f"{[round(n, 6) for n in block]}"
        )
