"""Images at another pixel size: in one field of view, without aliasing, and with masks that hold."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .box import Box
from .grid import Grid, Numbers, Tokens, exact_dtype, fill, fixed, integers

_SAME = 1e-6  # how near 1 a ratio of spacings is taken for 1
_GROWTH = 4  # by which an image may grow beyond the limit: large ones near the wanted pixel size are no mistake
_limit = 2**24


def set_resample_limit(pixels: int) -> None:
    """Sets how many pixels a resampled image may have; a pixel size in a wrong unit asks for millions of times as many.

    Images that do not become more than four times as large are never refused.

    Args:
        pixels: Number of pixels of one image, 2^24 when the package is imported (4096 x 4096, 256 x 256 x 256).

    Raises:
        ValueError: If it is not a positive whole number.
    """
    global _limit
    (_limit,) = integers(pixels, "pixels", 1)


def resample_limit() -> int:
    """Returns how many pixels a resampled image may have; see `set_resample_limit`."""
    return _limit


def resample(tokens: Tokens, spacing: Sequence[float]) -> Tokens:
    """Resamples an image to a pixel size, linearly; what becomes coarser is averaged by the triangle filter.

    The field of view keeps its lower corner, and its extent up to half a pixel. What is masked has no weight; a new
    pixel is valid if any valid pixel lies under it. Samples of different spacings come out in the size of the largest,
    the others' ends masked.

    Args:
        tokens: An image on its grid.
        spacing: The new pixel size per axis.

    Raises:
        ValueError: If the grid's spacing is a tensor and the model is compiled, or an image would become larger than
            `resample_limit` and four times its size.
    """
    rows = spacing_rows(tokens.grid)
    ratios = [tuple(s / new for s, new in zip(row, spacing, strict=True)) for row in rows]
    if all(abs(ratio - 1) < _SAME for row in ratios for ratio in row):
        return tokens
    if len(ratios) == 1 or len(set(ratios)) == 1:
        return _resample(tokens, ratios[0], spacing)
    grid = tokens.grid
    parts = []
    for index, ratio in enumerate(ratios):
        here = slice(index, index + 1)
        mask = None if tokens.mask is None else tokens.mask[here]
        origin = grid.origin[here] if len(grid.origin) > 1 else grid.origin
        part = Tokens(tokens.x[here], grid._replace(spacing=grid.spacing[here], origin=origin), mask)
        parts.append(_resample(part, ratio, spacing))
    return stack(parts)


def spacing_rows(grid: Grid) -> list[tuple[float, ...]]:
    """Returns a grid's spacing in numbers, per sample or one for all.

    Raises:
        ValueError: If a tensor holds it and the model is compiled.
    """
    if grid.numbers.spacing is not None:
        return [tuple(fixed(step) for step in grid.numbers.spacing)]
    rows = grid.spacing
    if torch.compiler.is_compiling() or rows.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(rows):
        raise ValueError(
            "spacing must be numbers, not a tensor, where stem or patches are physical and the model is compiled, "
            "exported, mapped over or on the meta device: sizes depend on it. Models made with physical_stem=False (or "
            "physical_patches=False) take it as an input"
        )
    return [tuple(row) for row in rows.tolist()]


def _resample(tokens: Tokens, ratio: Sequence[float], spacing: Sequence[float]) -> Tokens:
    """Resamples to ``ratio`` pixels for one, per axis."""
    plan = Resampling.create(tokens.grid.shape, ratio)
    check_size(plan.shape, plan.size)
    whole = Box.whole(plan.size)
    x, valid = plan.apply(tokens.x, tokens.mask, Box.whole(plan.shape), whole)
    return Tokens(x, plan.grid(tokens.grid, spacing), valid)


class Resampling(NamedTuple):
    """How an image becomes one of another pixel size: any part of the result, of a part of the image.

    Attributes:
        shape: Pixels of the image along each axis.
        size: Pixels of the result.
        ratio: Pixels of the result for one of the image.
    """

    shape: tuple[int, ...]
    size: tuple[int, ...]
    ratio: tuple[float, ...]

    @classmethod
    def create(cls, shape: Sequence[int], ratio: Sequence[float]) -> "Resampling":
        """Plans it for an image of a shape."""
        size = tuple(max(1, round(n * r)) for n, r in zip(shape, ratio, strict=True))
        return cls(tuple(shape), size, tuple(ratio))

    def grid(self, grid: Grid, spacing: Sequence[float]) -> Grid:
        """Returns the grid of the result, from the image's and the new pixel size."""
        step = grid.spacing.new_tensor([list(spacing)])
        shift = [(1 / r - 1) / 2 for r in self.ratio]  # from pixel centre to pixel centre, from one corner
        start = grid.numbers.moved([1.0] * len(self.size), shift).origin
        return Grid(self.size, step, grid.corners()[0] + step / 2, Numbers(tuple(spacing), start))

    def source(self, box: Box) -> Box:
        """Returns the pixels of the image that have weight in a box of the result."""
        start, stop = [], []
        for first, last, r in zip(box.start, box.stop, self.ratio, strict=True):
            reach = max(1.0, 1 / r)
            start.append(min(math.ceil((first + 0.5) / r - 0.5 - reach), math.floor(first / r)))
            stop.append(max(math.floor((last - 0.5) / r - 0.5 + reach) + 1, math.ceil(last / r)))
        return Box(tuple(start), tuple(stop)).clipped(self.shape)

    def apply(self, x: Tensor, mask: Tensor | None, source: Box, box: Box) -> tuple[Tensor, Tensor | None]:
        """Makes a part of the result.

        Args:
            x: ``[B, *source, C]``.
            mask: ``[B, *source]``, True = valid; None if all are.
            source: Where ``x`` lies in the image; it holds what `source` says.
            box: The part of the result.

        Returns:
            ``[B, *box, C]``, and ``[B, *box]`` if there is a mask.
        """
        dtype = x.dtype
        x = fill(x, mask).to(exact_dtype(dtype))  # sums of many pixels
        axes = range(len(self.shape))
        triangles = [_shifted(_triangle(self.shape[a], *self._range(box, a)), source, a) for a in axes]
        if mask is None:
            for axis, taps in enumerate(triangles, start=1):
                x = _weigh(x, axis, *taps, normalize=True)
            return x.to(dtype), None
        weight = covered = mask.unsqueeze(-1).to(x.dtype)
        for axis, taps in enumerate(triangles, start=1):
            x, weight = _weigh(x, axis, *taps), _weigh(weight, axis, *taps)
            here = axis - 1
            covered = _weigh(
                covered, axis, *_shifted(_overlap(self.shape[here], *self._range(box, here)), source, here)
            )
        valid = covered[..., 0] > 0
        weight = torch.where(valid.unsqueeze(-1), weight, 1.0)  # no division by zero, whose gradient is not a number
        return fill(x / weight, valid).to(dtype), valid

    def _range(self, box: Box, axis: int) -> tuple[int, int, float]:
        return box.start[axis], box.stop[axis], self.ratio[axis]


def _shifted(taps: tuple[Tensor, Tensor], source: Box, axis: int) -> tuple[Tensor, Tensor]:
    """Counts pixels from where a part of the image starts; pixels beyond it have no weight."""
    index, weight = taps
    return (index - source.start[axis]).clamp(0, source.shape[axis] - 1), weight


def check_size(shape: Sequence[int], size: Sequence[int]) -> None:
    """Raises ``ValueError`` if an image of a shape would become too large; see `set_resample_limit`."""
    if math.prod(size) > max(_limit, _GROWTH * math.prod(shape)):
        new, old = (" x ".join(map(str, sizes)) for sizes in (size, shape))
        raise ValueError(
            f"spacing would make {new} pixels of {old} at the model's own pixel size, more than the limit of {_limit}: "
            "is its unit the model's? rat_timm.set_resample_limit raises the limit"
        )


def _triangle(n: int, start: int, stop: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Returns which of ``n`` pixels the new ones lie near, and their weights, both ``[stop - start, taps]``."""
    step = 1 / ratio
    reach = max(1.0, step)
    center = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * step - 0.5
    first = (center - reach).ceil().clamp(min=0)
    index = first[:, None] + torch.arange(min(math.floor(2 * reach) + 1, n))
    return _inside(index, (1 - (index - center[:, None]).abs() / reach).clamp(min=0), n)


def _overlap(n: int, start: int, stop: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Returns which of ``n`` pixels the new ones lie over, and for how long, both ``[stop - start, taps]``."""
    edge = torch.arange(start, stop + 1, dtype=torch.float64) / ratio
    lower, upper = edge[:-1, None], edge[1:, None]
    index = lower.floor() + torch.arange(min(math.ceil(1 / ratio) + 1, n))
    shared = torch.minimum(upper, index + 1) - torch.maximum(lower, index)
    return _inside(index, torch.where(shared > _SAME, shared, 0.0), n)


def _inside(index: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    inside = (index >= 0) & (index < n)
    return index.clamp(0, n - 1).long(), torch.where(inside, weight, 0.0)


def _weigh(x: Tensor, axis: int, index: Tensor, weight: Tensor, normalize: bool = False) -> Tensor:
    """Sums ``x`` over the taps of an axis; no matrix product, whose precision autocast and TF32 lower."""
    weight = weight / weight.sum(dim=1, keepdim=True) if normalize else weight
    index, weight = index.to(x.device), weight.to(x.device, x.dtype)
    shape = [-1, *[1] * (x.ndim - 1 - axis)]
    parts = (x.index_select(axis, i) * w.view(shape) for i, w in zip(index.unbind(1), weight.unbind(1), strict=True))
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def stack(parts: Sequence[Tokens]) -> Tokens:
    """Puts samples on grids of several sizes into one batch; their far ends are filled up and masked."""
    shapes = [part.grid.shape for part in parts]
    size = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    whole = len(set(shapes)) == 1 and all(part.mask is None for part in parts)
    mask = None if whole else torch.cat([_fill_up(_full_mask(part), size) for part in parts])
    x = torch.cat([_fill_up(part.x, size) for part in parts])
    spacing = torch.cat([part.grid.spacing.expand(len(part.x), -1) for part in parts])
    origin = torch.cat([part.grid.origin.expand(len(part.x), -1) for part in parts])
    return Tokens(x, Grid(size, spacing, origin), mask)


def _full_mask(part: Tokens) -> Tensor:
    return part.x.new_ones(part.x.shape[:-1], dtype=torch.bool) if part.mask is None else part.mask


def _fill_up(x: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, *grid, ...]`` -> ``[B, *size, ...]``, with zeros at the far ends."""
    ends = [part for n, most in zip(x.shape[1:], size, strict=False) for part in (most - n, 0)][::-1]
    return F.pad(x, [0, 0] * (x.ndim - 1 - len(size)) + ends)
