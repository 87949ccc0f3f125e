"""Masked-image modelling (MAE, arXiv 2111.06377) with masks that are exact, and pixels predicted at their places."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..dense.backbone import Backbone, in_parts, last_infos, last_maps, make_backbone, parts_for, read_for
from ..dense.decoders import BEYOND, ConvNorm, FpnDecoder
from ..geometry.grid import Pyramid, Tokens, fill
from ..geometry.parts import Part
from ..geometry.read import Told, read_images, what_is_told
from ..geometry.sample import sample_at
from ..geometry.types import ImageOrPyramid, MapOrMaps, MaskLike, OriginLike, SpacingLike
from ..layers.attention import Attention, Block
from ..layers.rose import RotarySpatialEmbedding
from ..models import RatVit, ResolutionAwareTransformer
from ..models.rat.places import sequence_positions
from ..ops.masking import join_masks, pool_mask
from .blocks import level_blocks, normalize_blocks

HEAD_DIM = 32


class PixelDecoder(nn.Module):
    """Blocks over all places of all levels, with a learned token where a place is hidden, and pixels of each place.

    Hidden places are all alike: with attention alone, they learn for many steps no more than the mean of what is seen.
    So a convolution, of three taps per axis, in front of each block brings in what is beside a place.

    Args:
        width: Of the blocks, a multiple of 32.
        depth: Number of blocks.
        cell: Pixels per place and axis.
        in_chans: Number of image channels.
        unit: Physical length per axis by which neighbouring places are one rotary unit apart.
    """

    def __init__(self, width: int, depth: int, cell: Sequence[int], in_chans: int, unit: Sequence[float]) -> None:
        super().__init__()
        self.cell, self.unit, axes = tuple(cell), tuple(unit), len(cell)
        self.hidden_token = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.hidden_token, std=0.02)
        heads = width // HEAD_DIM
        self.blocks = nn.ModuleList(
            Block(Attention(width, heads, RotarySpatialEmbedding(width, heads, axes)), width) for _ in range(depth)
        )
        self.convs = nn.ModuleList(ConvNorm(width, width, (1,) * axes) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_pixels = nn.Linear(width, in_chans * torch.Size(self.cell).numel())
        trunc_normal_(self.to_pixels.weight, std=0.02)
        nn.init.zeros_(self.to_pixels.bias)

    def forward(self, levels: Sequence[Tokens], there: Sequence[Tensor | None]) -> list[Tensor]:
        """Predicts pixels.

        Args:
            levels: ``[B, *grid, width]``, masked where nothing is seen.
            there: ``[B, *grid]``, bool: which places are in the images, hidden or not. None if all are.

        Returns:
            ``[B, *(grid * cell), in_chans]`` of each level.
        """
        pairs = zip(levels, there, strict=True)
        levels = [Tokens(self._with_hidden(tokens), tokens.grid, mask) for tokens, mask in pairs]
        positions = sequence_positions([tokens.grid for tokens in levels], self.unit, 0)
        mask = join_masks(there, [tokens.x.shape[:-1] for tokens in levels])
        if mask is not None:  # nothing to look at would be 0 / 0
            mask = mask | ~mask.any(dim=1, keepdim=True)
        for conv, block in zip(self.convs, self.blocks, strict=True):
            levels = [tokens._replace(x=tokens.x + conv(tokens).x) for tokens in levels]
            parts = [tokens.x.flatten(1, -2) for tokens in levels]
            x = block(torch.cat(parts, dim=1), positions, mask, None, True)
            split = zip(x.split([part.shape[1] for part in parts], dim=1), levels, strict=True)
            levels = [tokens._replace(x=part.unflatten(1, tokens.grid.shape)) for part, tokens in split]
        return [unfold_cells(self.to_pixels(self.norm(tokens.x)), self.cell) for tokens in levels]

    def _with_hidden(self, tokens: Tokens) -> Tensor:
        if tokens.mask is None:
            return tokens.x
        return torch.where(tokens.mask.unsqueeze(-1), tokens.x, self.hidden_token.to(tokens.x.dtype))


def unfold_cells(x: Tensor, cell: Sequence[int]) -> Tensor:
    """Lays out the pixels that each place has: ``[B, *grid, pixels * C]`` -> ``[B, *(grid * cell), C]``."""
    axes = len(cell)
    x = x.unflatten(-1, (*cell, -1))  # [B, *grid, *cell, C]
    order = [0, *(part for axis in range(axes) for part in (1 + axis, 1 + axes + axis)), 1 + 2 * axes]
    x = x.permute(order)
    for axis in range(1, 1 + axes):
        x = x.flatten(axis, axis + 1)
    return x


class MaskedImageModel(nn.Module):
    """Predicts the pixels of hidden blocks.

    Args:
        backbone: A registered name of a hierarchical or plain RAT, or such a model, whose classifier is removed.
        in_chans: Number of image channels. Default: the backbone's.
        decoder_width: Width of the decoder, a multiple of 32.
        decoder_depth: Number of its blocks.
        stages: Of a hierarchical backbone: from the maps of how many stages, counted from the last, pixels are
            predicted. They are brought to the finest one's grid by interpolation.
        **backbone_kwargs: Of ``timm.create_model``, for a name.

    Raises:
        ValueError: If an argument is out of range, or the backbone has physical patches, whose sizes in pixels differ,
            or a token of its own for what is masked.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        in_chans: int | None = None,
        decoder_width: int = 128,
        decoder_depth: int = 2,
        stages: int = 2,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        width, depth = decoder_width, decoder_depth
        if width < HEAD_DIM or width % HEAD_DIM or depth < 0:
            raise ValueError(
                f"decoder_width must be a multiple of {HEAD_DIM} and decoder_depth not negative, got {width}, {depth}"
            )
        self.backbone: Backbone = make_backbone(backbone, in_chans, backbone_kwargs)
        if getattr(self.backbone, "physical_patches", False):
            raise ValueError("backbone must have physical_patches=False, got True")
        if isinstance(self.backbone, ResolutionAwareTransformer) and self.backbone.cfg.mask_token:
            raise ValueError("backbone must have mask_token=False, for masks that are exact, got True")
        infos = last_infos(self.backbone, stages)
        self.stages, self.cell = stages, tuple(infos[0]["stride"])
        axes, reference = self.backbone.spatial_dims, self.backbone.reference_spacing
        self.fuse = FpnDecoder([info["num_chs"] for info in infos], width, axes)
        unit = [n * step for n, step in zip(self.cell, reference, strict=True)]
        self.decoder = PixelDecoder(width, depth, self.cell, self.backbone.in_chans, unit)
        self.hidden_cell = self.cell if isinstance(self.backbone, RatVit) else None
        """Pixels per axis that should be hidden together, so that tokens are dropped; see `hide_blocks`."""

    def forward(
        self,
        x: ImageOrPyramid,
        hidden: Tensor | Sequence[Tensor],
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps:
        """Predicts pixels from those that are not hidden.

        Args:
            x: Image ``[B, C, *size]``, or a pyramid: a list of images of one scene.
            hidden: ``[B, *size]``, bool, True = hidden, or one per level.
            spacing: See the backbone's ``forward``.
            mask: ``[B, *size]``, True = valid, or one per level: what is not valid is not predicted either.
            origin: See the backbone's ``forward``.

        Returns:
            ``[B, C, *size]``, normalised in each block as `masked_loss` wants them, at all pixels; or one per level.
            What stands in hidden and in invalid pixels influences nothing.

        Raises:
            ValueError: If an argument does not fit the model or another argument.
        """
        told = what_is_told(x, spacing, mask, origin)
        images = read_for(self.backbone, x, told)
        seen = _without(images, hidden)
        told = told._replace(mask=seen.unwrap(seen.masks))
        parts = parts_for(self.backbone, seen, told)
        pairs = [_Pair(part, whole) for part, whole in zip(parts, self._whole(images, parts, told), strict=True)]
        joined = in_parts(self, lambda pair: self._predict(pair, told), pairs, [part.rows for part in parts])
        return images.unwrap(
            [
                fill(sample_at(predicted, image.grid, BEYOND).x, image.mask).movedim(-1, 1)
                for predicted, image in zip(joined.levels, images.levels, strict=True)
            ]
        )

    def features(
        self, x: ImageOrPyramid, *, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
    ) -> Tokens:
        """Returns what is predicted from, of level 0 with nothing hidden: ``[B, *grid, C]``, stages side by side."""
        told = what_is_told(x, spacing, mask, origin)
        parts = parts_for(self.backbone, read_for(self.backbone, x, told), told)
        made = in_parts(self, lambda part: self._side_by_side(part, told), parts, [part.rows for part in parts])
        return made.levels[0]

    def _side_by_side(self, part: Part, told: Told) -> Pyramid:
        finest, *others = last_maps(self.backbone, part.images, told, self.stages)[0]
        sampled = [sample_at(tokens, finest.grid, BEYOND).x for tokens in others]
        return Pyramid([finest._replace(x=torch.cat([finest.filled(), *sampled], dim=-1))])

    def _whole(self, images: Pyramid, parts: Sequence[Part], told: Told) -> list[Pyramid]:
        """Returns, for each part, which places images have, hidden or not."""
        if all(mask is None for mask in images.masks):
            return [_with_levels(part.images, [t._replace(mask=None) for t in part.images.levels]) for part in parts]
        blank = [tokens._replace(x=tokens.x.new_zeros(*tokens.x.shape[:-1], 1)) for tokens in images.levels]
        return [part.images for part in parts_for(self.backbone, _with_levels(images, blank), told)]

    def _predict(self, pair: "_Pair", told: Told) -> Pyramid:
        """Predicts pixels on the grids of what the backbone is given."""
        maps = last_maps(self.backbone, pair.seen.images, told, self.stages, drop_masked=True)
        fused = [self.fuse(level) for level in maps]
        images = pair.whole.levels
        there = [None if image.mask is None else pool_mask(image.mask, self.cell) for image in images]
        predicted = self.decoder(fused, there)
        cut = [x[(slice(None), *map(slice, image.grid.shape))] for x, image in zip(predicted, images, strict=True)]
        return Pyramid([Tokens(x, image.grid, image.mask) for x, image in zip(cut, images, strict=True)])


class _Pair(NamedTuple):
    """A part of a batch.

    Attributes:
        seen: The images, masked where they are hidden too.
        whole: Which of their places there are.
    """

    seen: Part
    whole: Pyramid


def _with_levels(images: Pyramid, levels: list[Tokens]) -> Pyramid:
    return images._replace(levels=levels)


def _without(images: Pyramid, hidden: Tensor | Sequence[Tensor]) -> Pyramid:
    """Masks what is hidden."""
    given = [hidden] if isinstance(hidden, Tensor) else list(hidden)
    if len(given) != len(images.levels):
        raise ValueError(f"hidden must have one entry per level ({len(images.levels)}), got {len(given)}")
    levels = []
    for level, (tokens, each) in enumerate(zip(images.levels, given, strict=True)):
        if each.dtype != torch.bool or each.shape != tokens.x.shape[:-1]:
            raise ValueError(
                f"hidden of level {level} must be bool {list(tokens.x.shape[:-1])}, got {each.dtype} {list(each.shape)}"
            )
        levels.append(tokens._replace(mask=~each if tokens.mask is None else tokens.mask & ~each))
    return _with_levels(images, levels)


def masked_loss(
    predicted: ImageOrPyramid,
    x: ImageOrPyramid,
    hidden: Tensor | Sequence[Tensor],
    block: float | Sequence[float],
    *,
    spacing: SpacingLike = None,
    mask: MaskLike = None,
) -> Tensor:
    """Returns the mean squared error of hidden valid pixels that are normalised in each block.

    Args:
        predicted: What a `MaskedImageModel` returned.
        x: The images.
        hidden: What was hidden.
        block: Physical length of the blocks in which pixels of level 0 are normalised; see `hide_pyramid`.
        spacing: As the model was told. Default: 1.
        mask: As the model was told.

    Returns:
        ``[B]``: of each sample the mean over its levels of which something is hidden, zero where nothing is.
    """
    images = read_alone(x, spacing, mask)
    both = [[each] if isinstance(each, Tensor) else list(each) for each in (predicted, hidden)]
    lengths = level_blocks([tokens.grid for tokens in images.levels], block)
    errors, known = [], []
    for made, where, tokens, length in zip(*both, images.levels, lengths, strict=True):
        image = tokens.x.movedim(-1, 1)
        target = normalize_blocks(image, tokens.grid, length, tokens.mask).apply(image)
        counts = where if tokens.mask is None else where & tokens.mask
        error = torch.where(counts.unsqueeze(1), made.float() - target, 0.0).square().mean(dim=1)
        number = counts.flatten(1).sum(dim=1)
        errors.append(error.flatten(1).sum(dim=1) / number.clamp(min=1))
        known.append(number > 0)
    return torch.stack(errors).sum(dim=0) / torch.stack(known).sum(dim=0).clamp(min=1)


def read_alone(
    x: ImageOrPyramid, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
) -> Pyramid:
    """Reads images for no model: the spacing is 1 where it is not said."""
    first = x if isinstance(x, Tensor) else x[0]
    ones = (1,) * (first.ndim - 2)
    return read_images(x, Told(spacing, mask, origin), tuple(map(float, ones)), first.shape[1], ones)
