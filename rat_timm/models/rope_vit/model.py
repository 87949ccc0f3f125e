"""Plain RAT: timm's rotary ViTs with their weights unchanged, and with spacing, pyramids, origins, masks and volumes.

Every architecture of `timm.models.Eva` with a rotary embedding is registered under ``rat_`` and timm's name, with
timm's pretrained entries. Without any word on geometry a model does what timm's does, by timm's code.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import RotaryEmbeddingMixed, register_notrace_function, resample_abs_pos_embed
from timm.models import checkpoint, eva
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...geometry.grid import (
    Grid,
    Tokens,
    axis_values,
    channels_first,
    field_center,
    integers,
    merge_axes,
)
from ...geometry.read import Told, read_images, what_is_told
from ...layers.head import carried_mask, with_mask
from ...layers.sequence import TokenSequence
from ...ops.masking import check_mask, join_masks
from ...timm_api.state_dict import inflate
from ..pool import pool_tokens
from .patches import patchify, physical_patchify
from .rotary import FAMILIES, Frame, extend_along_z, rotary_embedding

torch.fx.wrap("what_is_told")  # else symbolic tracing would ask at once what is to be asked in each call


class RatVit(eva.Eva):
    """A rotary ViT of timm's that knows physical coordinates.

    Positions: without ``spacing`` rotary coordinates and learned embeddings are laid over the image as timm lays them,
    whatever its size. With it they are physical: laid over the extent that an image of ``reference_size`` has at the
    reference spacing, about the centre of the field of view.

    Args:
        spatial_dims: 2 for images, 3 for volumes: patches get a depth, and frequencies a third axis.
        spacing: Reference spacing: pixel size per axis in array order (z, y, x). What ``forward`` takes as the spacing
            of an image of a pyramid whose spacing is not given.
        reference_size: Size in pixels (y, x) of the images that the weights were trained with. Default: ``img_size``.
        patch_depth: Patch size along z. Default: that along y.
        physical_patches: Whether a patch covers the same physical size at any spacing: the kernel is resampled (see
            `rat_timm.models.rope_vit.patches.physical_patchify`). Takes one spacing per batch and level.
        **kwargs: Of `timm.models.Eva`. Every image size is taken, so that ``dynamic_img_size`` is always on.

    Raises:
        ValueError: If a value is out of range, or the embedding is not rotary, of kind "cat", "mixed" or "dinov3".
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 2,
        spacing: float | Sequence[float] = 1.0,
        reference_size: int | Sequence[int] | None = None,
        patch_depth: int | None = None,
        physical_patches: bool = False,
        **kwargs: Any,
    ) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        super().__init__(**{**kwargs, "dynamic_img_size": True, "dynamic_img_pad": True})
        if not isinstance(self.rope, FAMILIES):
            raise ValueError(f"rope_type must be 'cat', 'mixed' or 'dinov3', got {kwargs.get('rope_type')!r}")
        self.spatial_dims = spatial_dims
        self.reference_spacing = axis_values(spacing, "spacing", spatial_dims)
        size = self.patch_embed.img_size if reference_size is None else reference_size
        self.reference_size = integers(size, "reference_size", 2)
        self.physical_patches = physical_patches
        self._traits = {"first_conv": None}  # timm adapts no channels: checkpoint_filter_fn does, in 3D too
        if spatial_dims == 3 and self.patch_drop is not None:
            raise ValueError("patch_drop_rate goes with spatial_dims=2")
        if spatial_dims == 3:
            self._deepen(self.patch_embed.patch_size[0] if patch_depth is None else patch_depth)
        elif patch_depth is not None:
            raise ValueError(f"patch_depth is for spatial_dims=3, got {patch_depth} with spatial_dims=2")
        self._inform()

    def _inform(self) -> None:
        patch = self.patch_embed.proj.kernel_size
        spacing = tuple(a * b for a, b in zip(patch, self.reference_spacing, strict=True))
        for info in self.feature_info:
            info.update(reduction=max(patch), stride=patch, spacing=spacing)

    def _deepen(self, depth: int) -> None:
        flat = self.patch_embed.proj
        (depth,) = integers(depth, "patch_depth", 1)
        patch = (depth, *flat.kernel_size)
        deep = nn.Conv3d(
            flat.in_channels,
            flat.out_channels,
            patch,
            patch,
            bias=flat.bias is not None,
            device=flat.weight.device,
            dtype=flat.weight.dtype,
        )
        with torch.no_grad():
            deep.weight.copy_(inflate(flat.weight, deep.weight.shape))
        deep.bias = flat.bias
        self.patch_embed.proj = deep
        if isinstance(self.rope, RotaryEmbeddingMixed):
            self.rope.freqs = nn.Parameter(extend_along_z(self.rope.freqs.detach()))

    def forward(
        self,
        x: Any,
        spacing: Any = None,
        mask: Any = None,
        origin: Any = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Classifies images, or returns pooled features where there are no classes.

        Args:
            x: Image ``[B, C, *size]`` of any size, or a pyramid: a list of images of one scene.
            spacing: Physical pixel size in array-axis order (z, y, x): a number, one value per axis, ``[B, axes]`` per
                sample, or a list with one of these per level. Default: positions as timm has them.
            mask: ``[B, *size]``, True = valid, or one per level. What is masked influences nothing.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``. Default: levels share
                the outer corner of their field of view.
            attn_mask: timm's, for an image without geometry.
            is_causal: timm's, likewise.

        Returns:
            ``[B, num_classes]``; without pooling ``[B, prefix + patches, C]``, or a list of them for a list.

        Raises:
            ValueError: If an argument does not fit the model or another argument.
        """
        told = what_is_told(x, spacing, mask, origin)
        if (image := self._plain(x, told)) is not None:
            out = super().forward(image, attn_mask=attn_mask, is_causal=is_causal)
            return out if self._pools or isinstance(x, Tensor) else [out]
        encoded = self._encode(x, told, attn_mask, is_causal)
        return self._classify(self.norm(self._run(encoded)[0]), encoded)

    def forward_features(
        self,
        x: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        spacing: Any = None,
        mask: Any = None,
        origin: Any = None,
    ) -> Any:
        """Returns the last tokens, ``[B, prefix + patches, C]``, or a list with one such per level; see `forward`.

        Prefix tokens (class, registers) are shared by the levels, and stand in front of each level's patches. Invalid
        patches are zero.
        """
        told = what_is_told(x, spacing, mask, origin)
        if (image := self._plain(x, told)) is not None:
            return self._unwrap([super().forward_features(image, attn_mask, is_causal)], isinstance(x, Tensor))
        encoded = self._encode(x, told, attn_mask, is_causal)
        return self._sequences(self.norm(self._run(encoded)[0]), encoded)

    def forward_head(self, x: Any, pre_logits: bool = False, mask: Any = None) -> Any:
        """Pools and classifies what `forward_features` returned.

        Args:
            x: ``[B, prefix + patches, C]``, or a list with one such per level.
            pre_logits: Whether to stop before the classifier.
            mask: ``[B, *grid]`` or ``[B, patches]``, bool, True = valid, or one per level: which patches to pool over.
                Default: what `forward_features` and `forward_intermediates` know of the very tensor that they returned.
        """
        sequences = [x] if isinstance(x, Tensor) else list(x)
        if mask is None:
            masks = [carried_mask(sequence) for sequence in sequences]
        else:
            masks = [mask] if isinstance(x, Tensor) else mask
        if isinstance(x, Tensor) and masks[0] is None:
            return super().forward_head(x, pre_logits)
        if not isinstance(masks, (list, tuple)) or len(masks) != len(sequences):
            raise ValueError(f"mask must be a list with one entry per level ({len(sequences)}), got {mask!r}")
        patches = [sequence[:, self.num_prefix_tokens :] for sequence in sequences]
        flat = [None if m is None else m.flatten(1) for m in masks]
        for level, (m, part) in enumerate(zip(flat, patches, strict=True)):
            check_mask(m, part.shape[:-1], f"mask of level {level}")
        if not self._pools:
            heads = [self._head(s, pre_logits) for s in sequences]
            return heads[0] if isinstance(x, Tensor) else heads
        joined = torch.cat([sequences[0][:, : self.num_prefix_tokens], *patches], dim=1)
        valid = join_masks(masks, [part.shape[:-1] for part in patches])
        return self._head(pool_tokens(self, joined, valid), pre_logits)

    def forward_intermediates(
        self,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        spacing: Any = None,
        mask: Any = None,
        origin: Any = None,
        output_dict: bool = False,
    ) -> Any:
        """Returns the maps of several blocks; timm's arguments, and those of `forward`.

        Args:
            x: See `forward`.
            indices: The blocks: None for all, the last n for a number, or a sequence.
            return_prefix_tokens: Whether each map comes as a pair with the prefix tokens.
            norm: Whether maps are normalised.
            stop_early: Whether to stop at the last block asked for.
            output_fmt: "NCHW" for maps, channels first, in 3D too; "NLC" for sequences of patches.
            intermediates_only: Whether to leave out the final tokens.
            attn_mask: See `forward`.
            is_causal: See `forward`.
            spacing: See `forward`.
            mask: See `forward`. Masked places of maps are zero.
            origin: See `forward`.
            output_dict: Whether to return a dict: "image_features" (not with ``intermediates_only``),
                "image_intermediates", and for each of these maps its `Grid` in "grids" and its mask in "masks".

        Returns:
            The final tokens (as `forward_features`) and the list of maps, or the list alone; or a dict. For a pyramid
            each map is a list, one per level.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        told = what_is_told(x, spacing, mask, origin)
        if isinstance(x, Tensor) and self._plain(x, told) is not None and not output_dict:
            return super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, attn_mask, is_causal
            )
        take, last = feature_take_indices(len(self.blocks), indices)
        encoded = self._encode(x, told, attn_mask, is_causal)
        sequence, taken = self._run(encoded, take, last + 1 if stop_early else None)
        taken = [self.norm(tokens) for tokens in taken] if norm else taken
        maps = [self._maps(tokens, encoded, output_fmt) for tokens in taken]
        if return_prefix_tokens:
            maps = [(m, tokens[:, : self.num_prefix_tokens]) for m, tokens in zip(maps, taken, strict=True)]
        final = None if intermediates_only else self._sequences(self.norm(sequence), encoded)
        if not output_dict:
            return maps if intermediates_only else (final, maps)
        return {
            **({} if intermediates_only else {"image_features": final}),
            "image_intermediates": maps,
            "grids": [self._unwrap([level.grid for level in encoded.levels], encoded.single)] * len(taken),
            "masks": [self._unwrap([level.mask for level in encoded.levels], encoded.single)] * len(taken),
        }

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Sets the image size (y, x) that a learned embedding has one entry per patch for, and the patch size."""
        if patch_size is not None and self.spatial_dims == 3:
            raise ValueError("patch_size can be changed for spatial_dims=2 only")
        super().set_input_size(img_size, patch_size)
        self._inform()

    def model_args(self) -> dict[str, Any]:
        """Returns the keywords beside timm's that make this model again, as JSON has them."""
        deep = self.spatial_dims == 3
        return {
            "spatial_dims": self.spatial_dims,
            "spacing": merge_axes(self.reference_spacing),
            "reference_size": list(self.reference_size),
            "patch_depth": self.patch_embed.proj.kernel_size[0] if deep else None,
            "physical_patches": self.physical_patches,
        }

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token, as `timm.models.VisionTransformer` tells."""
        return self.cls_token is not None

    @property
    def _pools(self) -> bool:
        return bool(self.global_pool) or self.attn_pool is not None

    def _plain(self, x: Any, told: Told) -> Tensor | None:
        """Returns the only image if nothing is said about its geometry, else None."""
        if isinstance(x, torch.fx.Proxy):
            if self.pos_embed is not None:
                raise ValueError("torch.fx cannot trace learned embeddings of images of any size: use torch.export")
            return image_alone(x, told.spacing, told.mask, told.origin)
        image = x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x
        plain = (
            isinstance(image, Tensor)
            and image.ndim == 4
            and self.spatial_dims == 2
            and all(value is None for value in told)
        )
        return image if plain else None

    def _encode(self, x: Any, told: Told, attn_mask: Tensor | None, is_causal: bool) -> TokenSequence:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal go with one image, without spacing, mask, origin and output_dict")
        if self.training and self.patch_drop is not None:
            raise ValueError("patch_drop_rate goes with one image, without spacing, mask, origin and output_dict")
        pyramid = read_images(x, told, self.reference_spacing, self.in_chans, (1,) * self.spatial_dims)
        proj = self.patch_embed.proj
        if self.physical_patches:
            levels = [
                physical_patchify(tokens, proj.weight, proj.bias, self.reference_spacing) for tokens in pyramid.levels
            ]
        else:
            levels = [patchify(tokens, proj.weight, proj.bias) for tokens in pyramid.levels]
        frame = self._frame(levels, [tokens.grid for tokens in pyramid.levels], told.spacing is not None)
        places = [level.grid.coordinates().flatten(1, -2) for level in levels]
        rows = max(len(p) for p in places)
        rope = rotary_embedding(self.rope, frame, torch.cat([p.expand(rows, -1, -1) for p in places], dim=1))
        stretched = [told.spacing is None and i == 0 for i in range(len(levels))]  # what timm does with an image
        embedded = [
            level.x.flatten(1, -2) + self._position_embedding(level, frame, p, whole)
            for level, p, whole in zip(levels, places, stretched, strict=True)
        ]
        sequence = torch.cat([*self._prefix(len(levels[0].x)), *embedded], dim=1)
        return TokenSequence(self.norm_pre(self.pos_drop(sequence)), rope, levels, pyramid.single)

    def _frame(self, levels: Sequence[Tokens], images: Sequence[Grid], physical: bool) -> Frame:
        patch = self.patch_embed.proj.kernel_size
        base = levels[0].grid
        if physical:
            # the reference image is filled up to whole patches, as every image is
            short = [-n % p for n, p in zip(self.reference_size, patch[-2:], strict=True)]
            rows, columns = (-(-n // p) for n, p in zip(self.reference_size, patch[-2:], strict=True))
            pixel = base.spacing.new_tensor([self.reference_spacing[-2:]])
            extent = pixel * base.spacing.new_tensor([a + b for a, b in zip(self.reference_size, short, strict=True)])
            shift = nn.functional.pad(pixel * base.spacing.new_tensor(short) / 2, (self.spatial_dims - 2, 0))
            center = field_center(images) + shift
        else:
            rows, columns = base.shape[-2:]
            center, extent = field_center([base]), base.spacing[:, -2:] * base.spacing.new_tensor([rows, columns])
        depth = None
        if self.spatial_dims == 3:
            depth = base.spacing.new_tensor([[patch[0] * self.reference_spacing[0]]])
        return Frame(center, extent, (rows, columns), depth)

    def _position_embedding(self, level: Tokens, frame: Frame, places: Tensor, stretched: bool) -> Tensor:
        """Returns the learned embedding at a level's patches, ``[1 or B, N, C]``, zero if there is none."""
        if self.pos_embed is None:
            return level.x.new_zeros(())
        learned = self.pos_embed if self.no_embed_class else self.pos_embed[:, self.num_prefix_tokens :]
        size = self.patch_embed.grid_size
        if stretched:
            plane = list(level.grid.shape[-2:])
            learned = resample_abs_pos_embed(learned, plane, list(size), num_prefix_tokens=0)
            return learned.repeat(1, math.prod(level.grid.shape[:-2]), 1)
        table = learned.float().unflatten(1, size).movedim(-1, 1)  # [1, C, *size]
        at = frame.relative(places).flip(-1).unsqueeze(1)  # [1 or B, 1, N, 2] (x, y)
        sampled = nn.functional.grid_sample(
            table.expand(len(at), -1, -1, -1), at, mode="bicubic", padding_mode="border", align_corners=False
        )
        return sampled[:, :, 0].mT.to(learned.dtype)

    def _prefix(self, batch: int) -> Iterator[Tensor]:
        tokens = [t.expand(batch, -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if tokens:
            prefix = torch.cat(tokens, dim=1)
            embedded = self.pos_embed is not None and not self.no_embed_class
            yield prefix + self.pos_embed[:, : self.num_prefix_tokens] if embedded else prefix

    def _run(
        self, encoded: TokenSequence, take: Sequence[int] = (), blocks: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the first ``blocks`` blocks; returns the last one's tokens, and those of the blocks in ``take``."""
        x, mask, taken = encoded.x, encoded.attention_mask(self.num_prefix_tokens), []
        for i, block in enumerate(self.blocks[:blocks]):
            rope = encoded.rope[i] if self.rope_mixed else encoded.rope
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, rope=rope, attn_mask=mask)
            else:
                x = block(x, rope=rope, attn_mask=mask)
            if i in take:
                taken.append(x)
        return x, taken

    def _maps(self, x: Tensor, encoded: TokenSequence, output_fmt: str) -> Any:
        maps = encoded.split(x, self.num_prefix_tokens)
        maps = [channels_first(m).contiguous() if output_fmt == "NCHW" else m.flatten(1, -2) for m in maps]
        return self._unwrap(maps, encoded.single)

    def _sequences(self, x: Tensor, encoded: TokenSequence) -> Any:
        prefix = x[:, : self.num_prefix_tokens]
        patches = encoded.split(x, self.num_prefix_tokens)
        sequences = [
            with_mask(
                torch.cat((prefix, p.flatten(1, -2)), dim=1), None if level.mask is None else level.mask.flatten(1)
            )
            for p, level in zip(patches, encoded.levels, strict=True)
        ]
        return self._unwrap(sequences, encoded.single)

    @staticmethod
    def _unwrap(per_level: list, single: bool) -> Any:
        return per_level[0] if single else per_level

    def _classify(self, x: Tensor, encoded: TokenSequence) -> Any:
        if not self._pools:
            sequences = self._sequences(x, encoded)
            return self._head(sequences) if encoded.single else [self._head(s) for s in sequences]
        return self._head(pool_tokens(self, x, encoded.valid))

    def _head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)


@register_notrace_function
def image_alone(x: Tensor, spacing: Any, mask: Any, origin: Any) -> Tensor:
    """Stands in symbolically traced graphs, which follow timm's code and know no geometry."""
    if any(value is not None for value in (spacing, mask, origin)):
        raise ValueError("spacing, mask and origin have no effect on a symbolically traced model: use the model itself")
    return x
