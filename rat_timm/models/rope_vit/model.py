"""Plain RAT: timm's rotary ViTs with their weights unchanged, and with spacing, pyramids, origins, masks and volumes.

Every architecture of `timm.models.Eva` with a rotary embedding is registered under ``rat_`` and timm's name, with
timm's pretrained entries. Without any word on geometry a model does what timm's does, by timm's code.
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from timm.layers import RotaryEmbeddingMixed, resample_abs_pos_embed
from timm.models import eva
from torch import Tensor, nn

from ...geometry.grid import Grid, Pyramid, Tokens, field_center, integers, merge_axes
from ...geometry.ranges import RangeLike, range_of_json
from ...geometry.read import Told, read_images
from ...geometry.types import ImageOrPyramid, MapOrMaps, MaskLike, OriginLike, SpacingLike
from ...timm_api.state_dict import inflate
from ..vit.model import ANY_SIZE, Intermediates, VitBase, Wanted
from .patches import patchify, physical_patchify
from .rotary import Frame, TimmRotary, extend_along_z, rotary_embedding
from .sequence import PyramidSequence, ValidSequence


class RatVit(VitBase, eva.Eva):
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
        spacing_range: Pixel sizes that the model was trained and validated at: (low, high), or one pair per axis; calls
            outside warn (see `rat_timm.geometry.ranges`).
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
        spacing_range: RangeLike = None,
        **kwargs: Any,
    ) -> None:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        super().__init__(**{**kwargs, **ANY_SIZE})
        if not isinstance(self.rope, TimmRotary):
            raise ValueError(f"rope_type must be 'cat', 'mixed' or 'dinov3', got {kwargs.get('rope_type')!r}")
        self._set_space(spatial_dims, spacing, spacing_range)
        size = self.patch_embed.img_size if reference_size is None else reference_size
        self.reference_size = integers(size, "reference_size", 2)
        self.physical_patches = physical_patches
        if spatial_dims == 3 and self.patch_drop is not None:
            raise ValueError("patch_drop_rate goes with spatial_dims=2")
        if spatial_dims == 3:
            self._extend_to_volumes(self.patch_embed.patch_size[0] if patch_depth is None else patch_depth)
        elif patch_depth is not None:
            raise ValueError(f"patch_depth is for spatial_dims=3, got {patch_depth} with spatial_dims=2")
        self._tell_strides()

    def _tell_strides(self) -> None:
        patch = self.patch_embed.proj.kernel_size
        spacing = tuple(a * b for a, b in zip(patch, self.reference_spacing, strict=True))
        for info in self.feature_info:
            info.update(reduction=max(patch), stride=patch, spacing=spacing)

    def _extend_to_volumes(self, depth: int) -> None:
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

    @overload
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Sequence[Tensor],
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps: ...

    def forward(
        self,
        x: ImageOrPyramid,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps:
        """Classifies images, or returns pooled features where there are no classes.

        Args:
            x: Image ``[B, C, *size]`` of any size, or a pyramid: a list of images of one scene.
            attn_mask: timm's, for an image without geometry.
            is_causal: timm's, likewise.
            spacing: Physical pixel size in array-axis order (z, y, x): a number, one value per axis, ``[B, axes]`` per
                sample, or a list with one of these per level. Default: positions as timm has them.
            mask: ``[B, *size]``, True = valid, or one per level. What is masked influences nothing.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``. Default: levels share
                the outer corner of their field of view.

        Returns:
            ``[B, num_classes]``; without pooling ``[B, prefix + patches, C]``, or a list of them for a list.

        Raises:
            TypeError: If geometry is not given by keyword.
            ValueError: If an argument does not fit the model or another argument.
        """
        told = self._told(x, spacing, mask, origin)
        if (image := self._plain(x, told, attn_mask, is_causal)) is not None:
            out = super().forward(image, attn_mask=attn_mask, is_causal=is_causal)
            return [out] if isinstance(x, (list, tuple)) and not self._pools else out
        return self._classify(self._encode(x, told, attn_mask, is_causal))

    @overload
    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> Tensor: ...

    @overload
    def forward_features(
        self,
        x: Sequence[Tensor],
        attn_mask: None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> list[Tensor]: ...

    def forward_features(
        self,
        x: ImageOrPyramid,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps:
        """Returns the last tokens, ``[B, prefix + patches, C]``, or a list with one such per level; see `forward`.

        Prefix tokens (class, registers) are shared by the levels, and stand in front of each level's patches. Invalid
        patches are zero.
        """
        told = self._told(x, spacing, mask, origin)
        if (image := self._plain(x, told, attn_mask, is_causal)) is not None:
            out = super().forward_features(image, attn_mask, is_causal)
            return [out] if isinstance(x, (list, tuple)) else out
        return self._features(self._encode(x, told, attn_mask, is_causal))

    def forward_intermediates(
        self,
        x: ImageOrPyramid,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        output_dict: bool = False,
        drop_masked: bool = False,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> Intermediates:
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
            output_dict: Whether to return a dict: "image_features" (not with ``intermediates_only``),
                "image_intermediates", and for each of these maps its `Grid` in "grids" and its mask in "masks".
            drop_masked: Whether blocks are given the valid patches alone. Masked ones take no part either way; without
                them time falls with their share. How many there are decides sizes: not for compilers.
            spacing: See `forward`.
            mask: See `forward`. Masked places of maps are zero.
            origin: See `forward`.

        Returns:
            The final tokens (as `forward_features`) and the list of maps, or the list alone; or a dict. For a pyramid
            each map is a list, one per level.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        told = self._told(x, spacing, mask, origin)
        wanted = Wanted(indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict)
        image = self._plain(x, told, attn_mask, is_causal)
        if image is not None and not isinstance(x, (list, tuple)) and not output_dict:
            return super().forward_intermediates(image, *wanted[:-1], attn_mask=attn_mask, is_causal=is_causal)
        sequence = self._encode(x, told, attn_mask, is_causal)
        return self._intermediates(ValidSequence.of(sequence) if drop_masked else sequence, wanted)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Sets the image size (y, x) that a learned embedding has one entry per patch for, and the patch size."""
        if patch_size is not None and self.spatial_dims == 3:
            raise ValueError("patch_size can be changed for spatial_dims=2 only")
        super().set_input_size(img_size, patch_size)
        self._tell_strides()

    def model_args(self) -> dict[str, Any]:
        """Returns the keywords beside timm's that make this model again, as JSON has them."""
        deep = self.spatial_dims == 3
        return {
            "spatial_dims": self.spatial_dims,
            "spacing": merge_axes(self.reference_spacing),
            "reference_size": list(self.reference_size),
            "patch_depth": self.patch_embed.proj.kernel_size[0] if deep else None,
            "physical_patches": self.physical_patches,
            "spacing_range": range_of_json(self.spacing_range),
        }

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token, as `timm.models.VisionTransformer` tells."""
        return self.cls_token is not None

    def _plain(self, x: ImageOrPyramid, told: Told, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """Returns the only image if nothing is said about its geometry, else None."""
        if isinstance(x, torch.fx.Proxy):
            if self.pos_embed is not None:
                raise ValueError("torch.fx cannot trace learned embeddings of images of any size: use torch.export")
            return self._traced_image(x, told, "spacing", "mask", "origin")
        if not (attn_mask is None or isinstance(attn_mask, Tensor)) or not isinstance(is_causal, bool):
            raise TypeError(
                "attn_mask must be a tensor and is_causal a bool (spacing, mask and origin are keywords), got "
                f"{attn_mask!r} and {is_causal!r}"
            )
        image: Any = x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x
        plain = (
            isinstance(image, Tensor)
            and image.ndim == 4
            and self.spatial_dims == 2
            and all(value is None for value in told)
        )
        return image if plain else None

    def _encode(self, x: ImageOrPyramid, told: Told, attn_mask: Tensor | None, is_causal: bool) -> PyramidSequence:
        """Reads images; returns their tokens at their physical places."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal go with one image, without spacing, mask, origin and output_dict")
        if self.training and self.patch_drop is not None:
            raise ValueError("patch_drop_rate goes with one image, without spacing, mask, origin and output_dict")
        images = read_images(x, told, self.reference_spacing, self.in_chans, (1,) * self.spatial_dims)
        self._check_range(told, images)
        levels = self._patches(images)
        frame = self._frame(levels, [tokens.grid for tokens in images.levels], told.spacing is not None)
        places = [level.grid.coordinates().flatten(1, -2) for level in levels]
        rows = max(len(p) for p in places)
        rope = rotary_embedding(self.rope, frame, torch.cat([p.expand(rows, -1, -1) for p in places], dim=1))
        stretched = [told.spacing is None and i == 0 for i in range(len(levels))]  # what timm does with an image
        embedded = [
            level.x.flatten(1, -2) + self._position_embedding(level, frame, p, whole)
            for level, p, whole in zip(levels, places, stretched, strict=True)
        ]
        x = self._with_prefix(torch.cat(embedded, dim=1))
        return PyramidSequence(x, self.num_prefix_tokens, rope, levels, images.single)

    def _patches(self, images: Pyramid) -> list[Tokens]:
        """Cuts images into patches, ``[B, *grid, C]`` per level."""
        proj = self.patch_embed.proj
        if not self.physical_patches:
            return [patchify(tokens, proj.weight, proj.bias) for tokens in images.levels]
        return [physical_patchify(tokens, proj.weight, proj.bias, self.reference_spacing) for tokens in images.levels]

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
        learned = self.pos_embed[:, self._embedded_prefix :]
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
