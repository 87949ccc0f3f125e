"""From the maps of a backbone to one map: two decoders that differ in how they go up, and levels of fine detail.

Maps are `Tokens`, features on a grid with the mask of its places. A decoder starts with a projection of the coarsest
map. From stage to stage it brings what it has to the finer grid, adds a projection of the finer map, and passes a
convolution:

- "fpn" interpolates between the coarse centres, at physical coordinates (arXiv 1612.03144);
- "groups" carries up along the assignments of the groupings, ``y_fine[n] = sum over m of Ah[m, n] y_coarse[m]``: what
  was grouped by likeness comes back by likeness (the native segmentation of SeNaTra, arXiv 2505.16993). Measured on
  real cells it was not better, and it takes longer (``examples/cells/README.md``).

All else is the same, parameters included. What is masked influences nothing.

Where a model has ``context``, every level of a pyramid is decoded, by the same weights, the others than level 0 as far
as their second map. What they come to is sampled at the places of level 0's pixels and added to what is classified
(`add_context`): so context reaches a pixel by its position, past all norms, and not only through the levels' attention,
of which it is not learned in as many steps (``examples/context_study``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.grid import Grid, Tokens, channels_first, channels_last, fill
from ..geometry.sample import sample_at
from ..layers.grouping import CONVS
from ..ops.assignment import Assignment, to_pixels
from ..ops.masking import pool_mask

BEYOND = 1.0
"""`sample_at`'s reach between maps of one image: a place under a stride cell's far end is past the cell's centre."""


class ConvNorm(nn.Module):
    """A convolution of three taps per axis, LayerNorm and GELU on tokens; masked places are zero for it.

    Args:
        in_dims: Width that comes in.
        dims: Width that goes out.
        stride: Stride per axis.
        norm: Whether there is a LayerNorm. After the first convolution it would take from an image of one channel how
            bright it is.
    """

    def __init__(self, in_dims: int, dims: int, stride: Sequence[int], norm: bool = True) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.conv = CONVS[len(self.stride)](in_dims, dims, 3, self.stride, 1)
        self.norm = nn.LayerNorm(dims, eps=1e-6) if norm else nn.Identity()

    def forward(self, tokens: Tokens) -> Tokens:
        """``[B, *grid, in_dims]`` -> ``[B, *ceil(grid / stride), dims]``."""
        x = channels_last(self.conv(channels_first(tokens.filled())))
        grid, mask = tokens.grid, tokens.mask
        if max(self.stride) > 1:
            ones = [1] * len(self.stride)
            grid = grid.conv([3 * n for n in ones], self.stride, ones)
            mask = None if mask is None else pool_mask(mask, self.stride)
        return Tokens(F.gelu(self.norm(x)), grid, mask)


class LevelMaps(NamedTuple):
    """What a backbone made of one level of a pyramid.

    Attributes:
        maps: ``[B, *grid, C]`` of each stage, finest first; of a level that is context, from the second on.
        assignments: How the tokens of each map were grouped into those of the next one, finest first; none if the
            decoder needs none.
    """

    maps: list[Tokens]
    assignments: list[Assignment]


class Decoder(nn.Module):
    """Brings the maps of all stages together on the finest one's grid; see the module.

    Args:
        dims: Widths of the maps, finest first.
        width: Width of the decoder.
        spatial_dims: Number of axes.
    """

    needs_assignments = False
    """Whether `forward` has to be given them."""

    def __init__(self, dims: Sequence[int], width: int, spatial_dims: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), _linear(dim, width)) for dim in dims)
        ones = (1,) * spatial_dims
        self.fusions = nn.ModuleList(ConvNorm(width, width, ones) for _ in dims[1:])

    def forward(self, maps: Sequence[Tokens], assignments: Sequence[Assignment] = ()) -> Tokens:
        """Decodes.

        Args:
            maps: ``[B, *grid, C]`` of each stage, finest first, or of the last ones.
            assignments: How the tokens of each map were grouped into those of the next one, finest first.

        Returns:
            ``[B, *grid, width]`` on the finest map's grid.
        """
        y = self._lateral(-1, maps[-1])
        for index in range(-2, -len(maps) - 1, -1):
            fine = self._lateral(index, maps[index])
            up = self._up(y, fine, assignments[index + 1] if self.needs_assignments else None)
            y = self.fusions[index + 1](fine._replace(x=fine.x + up))
        return y

    def _lateral(self, index: int, tokens: Tokens) -> Tokens:
        return tokens._replace(x=fill(self.laterals[index](tokens.x), tokens.mask))

    def _up(self, coarse: Tokens, fine: Tokens, assignment: Assignment | None) -> Tensor:
        """Brings ``[B, *coarse, width]`` to the fine places."""
        raise NotImplementedError


class GroupDecoder(Decoder):
    """Goes up along the assignments of the groupings."""

    needs_assignments = True

    def _up(self, coarse: Tokens, fine: Tokens, assignment: Assignment | None) -> Tensor:
        assert assignment is not None
        return assignment.carry_up(coarse.filled())


class FpnDecoder(Decoder):
    """Goes up by linear interpolation at physical coordinates."""

    def _up(self, coarse: Tokens, fine: Tokens, assignment: Assignment | None) -> Tensor:
        return sample_at(coarse, fine.grid, BEYOND).x


DECODERS: dict[str, type[Decoder]] = {"fpn": FpnDecoder, "groups": GroupDecoder}
"""The decoders by name."""


DETAILS = ("contrast", "pixels")
"""What the levels of fine detail may see."""


class ContrastConv(nn.Module):
    """A convolution of what is finer than a backbone's maps: pixels, less the mean of those around them.

    How bright a place is, is left to the maps, which see what it is part of. A convolution of pixels learns it within
    a few steps, as the shortest way to tell a cell from what is around it, and goes wrong where others are brighter.

    Args:
        conv: The convolution.
        cells: Pixels, per axis, whose mean is taken; between their centres it is interpolated.
    """

    def __init__(self, conv: ConvNorm, cells: Sequence[int]) -> None:
        super().__init__()
        self.conv, self.cells = conv, tuple(cells)

    def forward(self, image: Tokens) -> Tokens:
        """``[B, *size, in_chans]`` -> ``[B, *size, dims]``."""
        return self.conv(image._replace(x=contrast(image, self.cells)))


def contrast(image: Tokens, cells: Sequence[int]) -> Tensor:
    """Returns how pixels differ from the mean of the valid ones around them, ``[B, *size, C]``; see `ContrastConv`."""
    return image.x - sample_at(average_cells(image, cells), image.grid, BEYOND).x


class DetailLevels(nn.Module):
    """Two cheap convolutional levels, of the image's own pixels and of two per axis, under a decoder's map.

    Both are interpolated between at physical coordinates, whatever the decoder is: nothing has grouped pixels.

    Args:
        in_chans: Number of image channels.
        width: Width of the decoder's map; that of the levels is a half and a quarter of it, and ``dims`` the latter.
        strides: Pixels per place of the finest map, per axis.
        sees: One of `DETAILS`: "contrast", how pixels differ from those around them (`ContrastConv`), or "pixels".
    """

    def __init__(self, in_chans: int, width: int, strides: Sequence[float], sees: str = "contrast") -> None:
        super().__init__()
        self.dims, half, self.sees = max(1, width // 4), max(1, width // 2), sees
        step, ones = [2 if stride >= 2 else 1 for stride in strides], (1,) * len(strides)
        first = ConvNorm(in_chans, self.dims, ones, norm=False)
        cells = [round(stride) for stride in strides]
        cells = cells if max(cells) > 1 else [2] * len(cells)  # where the maps are as fine as the image
        self.conv_1 = ContrastConv(first, cells) if sees == "contrast" else first
        self.conv_2 = ConvNorm(self.dims, half, step)
        self.to_2, self.to_1 = _linear(width, half), _linear(half, self.dims)
        self.fuse_2, self.fuse_1 = ConvNorm(half, half, ones), ConvNorm(self.dims, self.dims, ones)

    def forward(self, image: Tokens, coarse: Tokens) -> Tokens:
        """Brings a decoder's map down to pixels.

        Args:
            image: ``[B, *size, in_chans]``.
            coarse: ``[B, *grid, width]``.

        Returns:
            ``[B, *size, dims]`` on the image's grid.
        """
        fine = self.conv_1(image)
        half = self.conv_2(fine)
        half = self.fuse_2(_add_sampled(half, coarse._replace(x=self.to_2(coarse.x))))
        return self.fuse_1(_add_sampled(fine, half._replace(x=self.to_1(half.x))))

    def project(self, coarse: Tokens) -> Tokens:
        """Brings a decoder's map to the width of the finest level, where it is: ``[B, *grid, dims]``."""
        return coarse._replace(x=self.to_1(self.to_2(coarse.x)))


class SimplePyramid(nn.Module):
    """Four maps of a plain transformer's last one: at a quarter, half, one and two times its stride (arXiv 2203.16527).

    Finer maps are made by transposed convolutions, whose kernel is their stride. The coarser one is the mean of the
    valid places of cells of two per axis, in place of the paper's maximum.

    Args:
        dim: Width of the transformer.
        patch: Size of a patch in pixels, per axis. Along an axis where no whole pixel is left, finer maps stay.
    """

    def __init__(self, dim: int, patch: Sequence[int]) -> None:
        super().__init__()
        first = tuple(2 if size >= 2 else 1 for size in patch)
        second = tuple(2 if size / factor >= 2 else 1 for size, factor in zip(patch, first, strict=True))
        self.finer = Refine(dim, dim // 2, first)
        self.finest_1, self.finest_norm = Refine(dim, dim // 2, first), nn.LayerNorm(dim // 2, eps=1e-6)
        self.finest_2 = Refine(dim // 2, dim // 4, second)
        self.dims = [dim // 4, dim // 2, dim, dim]
        self.strides = [size / (a * b) for size, a, b in zip(patch, first, second, strict=True)]
        """Pixels per place of the finest map, per axis."""

    def forward(self, tokens: Tokens, is_context: bool = False) -> list[Tokens]:
        """``[B, *grid, dim]`` -> four maps, finest first; for context without the finest one."""
        maps = [self.finer(tokens), tokens, average_cells(tokens, (2,) * len(self.strides))]
        if is_context:
            return maps
        finest = self.finest_1(tokens)
        return [self.finest_2(finest._replace(x=F.gelu(self.finest_norm(finest.x)))), *maps]


class Refine(nn.Module):
    """A transposed convolution whose kernel is its stride: every place becomes a cell of finer ones.

    Args:
        in_dims: Width that comes in.
        dims: Width that goes out.
        factors: Finer places per place and axis.
    """

    def __init__(self, in_dims: int, dims: int, factors: Sequence[int]) -> None:
        super().__init__()
        self.factors = tuple(factors)
        self.conv = _TRANSPOSED[len(self.factors)](in_dims, dims, self.factors, self.factors)

    def forward(self, tokens: Tokens) -> Tokens:
        """``[B, *grid, in_dims]`` -> ``[B, *grid * factors, dims]``."""
        x = channels_last(self.conv(channels_first(tokens.filled())))
        grid = refined(tokens.grid, self.factors)
        mask = None if tokens.mask is None else to_pixels(tokens.mask, self.factors, grid.shape)
        return Tokens(x, grid, mask)


def refined(grid: Grid, factors: Sequence[int]) -> Grid:
    """Returns the grid that has so many places per place and axis, in the same field of view."""
    ratio, shift = [1 / f for f in factors], [(1 / f - 1) / 2 for f in factors]
    return Grid(
        tuple(n * f for n, f in zip(grid.shape, factors, strict=True)),
        grid.spacing * grid.spacing.new_tensor(ratio),
        grid.origin + grid.spacing * grid.spacing.new_tensor(shift),
        grid.numbers.moved(ratio, shift),
    )


def average_cells(tokens: Tokens, factors: Sequence[int]) -> Tokens:
    """Averages the valid places of cells, ``[B, *grid, C]`` -> ``[B, *ceil(grid / factors), C]``.

    The last cell of an axis may be cut off; its place is where it would be of a whole one.
    """
    ends = [-n % f for n, f in zip(tokens.grid.shape, factors, strict=True)]
    mask = torch.ones_like(tokens.x[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask
    padding = [part for end in reversed(ends) for part in (0, end)]
    x, valid = F.pad(tokens.filled(), [0, 0, *padding]), F.pad(mask, padding)
    count, total = (_sum_cells(part, factors) for part in (valid.unsqueeze(-1).to(x.dtype), x))
    mean = total / count.clamp(min=1)
    return Tokens(mean, cell_grid(tokens.grid, factors), None if tokens.mask is None else count[..., 0] > 0)


def cell_grid(grid: Grid, factors: Sequence[int]) -> Grid:
    """Returns where the cells of `average_cells` are."""
    shape = tuple(n + -n % f for n, f in zip(grid.shape, factors, strict=True))
    return grid._replace(shape=shape).conv(factors, factors, [0] * len(factors))


def _sum_cells(x: Tensor, factors: Sequence[int]) -> Tensor:
    for axis, factor in enumerate(factors, start=1):
        x = x.unflatten(axis, (-1, factor)).sum(dim=axis + 1)
    return x


def add_context(tokens: Tokens, context: Sequence[Tokens]) -> Tokens:
    """Adds the mean of what other levels have at each place, ``[B, *grid, C]``, where any has a valid place."""
    if not context:
        return tokens
    sampled = [sample_at(level, tokens.grid) for level in context]
    count = torch.stack([level.mask for level in sampled if level.mask is not None]).sum(dim=0)
    total = torch.stack([level.x for level in sampled]).sum(dim=0)
    return tokens._replace(x=tokens.x + total / count.clamp(min=1).unsqueeze(-1))


def _add_sampled(fine: Tokens, coarse: Tokens) -> Tokens:
    return fine._replace(x=fine.x + sample_at(coarse, fine.grid, BEYOND).x)


def _linear(in_dims: int, dims: int) -> nn.Linear:
    linear = nn.Linear(in_dims, dims)
    trunc_normal_(linear.weight, std=in_dims**-0.5)  # what comes in is normalised, and so is what goes out
    nn.init.zeros_(linear.bias)
    return linear


_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
