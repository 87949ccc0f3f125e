"""Adaptive ViT: timm's `VisionTransformer`, whose patches go where the image is interesting.

After the package "Adaptive Patching for Vision Transformers"; see `rat_timm.layers.AdaptivePatching`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, register_notrace_function, register_notrace_module, resample_abs_pos_embed
from timm.models import vision_transformer
from torch import Tensor
from torch.nn import functional as F

from ...geometry.grid import Positions, Tokens, merge_axes
from ...geometry.ranges import RangeLike, range_of_json
from ...geometry.read import Told, read_images
from ...geometry.types import MaskLike, OriginLike, SpacingLike
from ...layers.adaptive_patching import AdaptivePatching, Patches, interpolate_pos_embed
from ...layers.rose import RotarySpatialEmbedding
from ..vit.model import ANY_SIZE, Intermediates, VitBase, Wanted
from .sequence import PatchSequence

POSITIONS = ("interpolated", "rose")


class RoseAttention(Attention):
    """timm's attention, with queries and keys rotated by where their patches are."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **kwargs)
        self.rose = RotarySpatialEmbedding(self.attn_dim, num_heads, 2).to(device=device, dtype=dtype)

    def forward(self, x: Tensor, positions: Positions, attn_mask: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: ``[B, N, C]``.
            positions: Where the tokens are, ``[B, N]`` per axis.
            attn_mask: Broadcastable to ``[B, heads, N, N]``, bool, True = may be looked at.
        """
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, heads, d]
        query, key = self.rose(self.q_norm(query), positions), self.rose(self.k_norm(key), positions)
        dropout_p = self.attn_drop.p if self.training else 0.0
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


register_notrace_module(AdaptivePatching)
register_notrace_module(RoseAttention)


class RoseBlock(vision_transformer.Block):
    """timm's block around `RoseAttention`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None, positions: Positions) -> Tensor:
        """See `RoseAttention.forward`."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), positions, attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class AdaptiveVit(VitBase, vision_transformer.VisionTransformer):
    """A `VisionTransformer` that cuts its patches out of the image where a small network predicts.

    With as many patches as the regular grid has, and before training, it is the `VisionTransformer`, for images of any
    size that patches divide (others are not padded: patches overlap a little). Patches are a set without order: there
    are no feature maps, but sequences of tokens and, for each, where it is (`patches`).

    Args:
        num_patches: How many; None: as many as the regular grid has, whatever the image's size.
        positions: "interpolated": the learned embedding at the patches' places. "rose": none, but queries and keys
            rotated by physical positions.
        scaling: Whether patches change size: None, "isotropic" or "anisotropic".
        max_scale: The most by which a patch is enlarged or reduced.
        rotate: Whether patches turn.
        jitter: How far patches are moved at random in training, in parts of their distance.
        spacing: Reference spacing: pixel size per axis in array order (y, x), at which neighbouring patches are one
            rotary unit apart, and which an image has whose spacing is not given.
        spacing_range: Pixel sizes that the model was trained and validated at: (low, high), or one pair per axis; calls
            outside warn (see `rat_timm.geometry.ranges`).
        **kwargs: Of `timm.models.VisionTransformer`. Every image size is taken, so that ``dynamic_img_size`` is always
            on.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        *,
        num_patches: int | None = None,
        positions: str = "interpolated",
        scaling: str | None = None,
        max_scale: float = 2.0,
        rotate: bool = False,
        jitter: float = 0.0,
        spacing: float | Sequence[float] = 1.0,
        spacing_range: RangeLike = None,
        **kwargs: Any,
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate goes with regular patches: give num_patches or jitter")
        if positions == "rose":
            given = [name for name in ("block_fn", "attn_layer") if name in kwargs]
            if given or kwargs.get("pos_embed", "none") not in ("", "none"):
                raise ValueError(f"positions 'rose' has its own {given or ['pos_embed']}, got {kwargs}")
            kwargs = {**kwargs, "pos_embed": "none", "block_fn": RoseBlock, "attn_layer": RoseAttention}
        super().__init__(**{**kwargs, **ANY_SIZE})
        self.positions = positions
        self._set_space(2, spacing, spacing_range)
        self.patching = AdaptivePatching(
            self.in_chans,
            self.patch_embed.patch_size,
            num_patches,
            scaling=scaling,
            max_scale=max_scale,
            rotate=rotate,
            jitter=jitter,
            device=kwargs.get("device"),
            dtype=kwargs.get("dtype"),
        )

    def forward(
        self, x: Tensor, *, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
    ) -> Tensor:
        """Classifies images, or returns pooled features where there are no classes.

        Args:
            x: ``[B, C, *size]`` of any size.
            spacing: Physical pixel size in array-axis order (y, x): a number, one value per axis, or ``[B, 2]`` per
                sample. Default: the reference spacing.
            mask: ``[B, *size]``, True = valid. What is masked influences nothing.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``.

        Returns:
            ``[B, num_classes]``; without pooling ``[B, prefix + patches, C]``.

        Raises:
            ValueError: If an argument does not fit the model or another argument.
        """
        return self._classify(self._encode(x, self._told(x, spacing, mask, origin)))

    def forward_features(
        self, x: Tensor, *, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
    ) -> Tensor:
        """Returns the last tokens, ``[B, prefix + patches, C]``, zero for patches that are not valid; see `forward`."""
        return self._features(self._encode(x, self._told(x, spacing, mask, origin)))

    def patches(
        self, x: Tensor, *, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
    ) -> Patches:
        """Returns the patches that are cut out of images, and where; see `forward`."""
        return self.patching(self._read(x, self._told(x, spacing, mask, origin)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NLC",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> Intermediates:
        """Returns the patches' features after several blocks: sequences, since patches form no map.

        Args:
            x: See `forward`.
            indices: The blocks: None for all, the last n for a number, or a sequence.
            return_prefix_tokens: Whether each sequence comes as a pair with the prefix tokens.
            norm: Whether sequences are normalised.
            stop_early: Whether to stop at the last block asked for.
            output_fmt: "NLC".
            intermediates_only: Whether to leave out the final tokens.
            output_dict: Whether to return a dict: "image_features" (not with ``intermediates_only``),
                "image_intermediates", and "patches", which says where the patches are.
            spacing: See `forward`.
            mask: See `forward`. Patches that are not valid are zero.
            origin: See `forward`.

        Raises:
            ValueError: For maps (``output_fmt="NCHW"``).
        """
        if output_fmt != "NLC":
            raise ValueError(f"output_fmt must be 'NLC', since adaptive patches form no map, got {output_fmt!r}")
        wanted = Wanted(indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, output_dict)
        return self._intermediates(self._encode(x, self._told(x, spacing, mask, origin)), wanted)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> list:
        """Returns the patches' features after the last ``n`` blocks or the blocks ``n``, as DINO's models name it."""
        layers: Any = self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            spacing=spacing,
            mask=mask,
            origin=origin,
        )
        return layers

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Sets the image size (y, x) that a learned embedding has one entry per patch for, and the patch size."""
        super().set_input_size(img_size, patch_size)
        self.patching.patch_size = tuple(self.patch_embed.patch_size)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialises weights as timm does; patches are the regular grid again."""
        super().init_weights(mode, needs_reset)
        if hasattr(self, "patching"):  # which is made after timm's constructor has come here
            self.patching.predictor.init_weights()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns how parameters are grouped into layers, for layer-wise learning rates."""
        groups = super().group_matcher(coarse)
        return {**groups, "stem": f"{groups['stem']}|^patching"}

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay would harm."""
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith("rose.freqs")}

    def model_args(self) -> dict[str, Any]:
        """Returns the keywords beside timm's that make this model again, as JSON has them."""
        names = ("num_patches", "scaling", "max_scale", "rotate", "jitter")
        args = {name: getattr(self.patching, name) for name in names}
        args |= {"positions": self.positions, "spacing": merge_axes(self.reference_spacing)}
        return {**args, "spacing_range": range_of_json(self.spacing_range)}

    def _read(self, x: Tensor, told: Told) -> Tokens:
        if isinstance(x, (list, tuple)):
            raise ValueError("x must be an image: adaptive patches are cut out of one image, not of a pyramid")
        images = read_images(x, told, self.reference_spacing, self.in_chans, (1, 1))
        self._check_range(told, images)
        return images.levels[0]

    def _encode(self, x: Tensor, told: Told) -> PatchSequence:
        """Cuts patches out of images; returns their tokens."""
        tracing = isinstance(x, torch.fx.Proxy)
        image = self._read(self._traced_image(x, told, "mask") if tracing else x, told)
        patches = self.patching(image)
        if tracing:
            patches = Patches(patches.x, patches.transform, patches.center, patches.position)
        positions = self._positions(patches, image) if self.positions == "rose" else None
        return PatchSequence(self._embed(patches, image), self.num_prefix_tokens, patches, positions)

    def _embed(self, patches: Patches, image: Tokens) -> Tensor:
        proj = self.patch_embed.proj
        x = self.patch_embed.norm(F.linear(patches.x.flatten(2), proj.weight.flatten(1), proj.bias))  # [B, N, C]
        if self.pos_embed is not None:
            learned = self.pos_embed[:, self._embedded_prefix :]
            grid, patch = self.patch_embed.grid_size, self.patch_embed.patch_size
            x = x + embed_places(learned, grid, image, patch, patches.center)
        return self._with_prefix(x)

    def _positions(self, patches: Patches, image: Tokens) -> Positions:
        unit = [p * s for p, s in zip(self.patch_embed.patch_size, self.reference_spacing, strict=True)]
        return sequence_positions(patches.center, image, unit, self.num_prefix_tokens)


@register_notrace_function
def embed_places(
    learned: Tensor, grid_size: Sequence[int], image: Tokens, patch_size: Sequence[int], center: Tensor
) -> Tensor:
    """Interpolates a learned embedding at patches' centres.

    Args:
        learned: ``[1, cells, C]``.
        grid_size: The grid of these cells.
        image: What the patches are cut out of; the embedding is laid over it as timm does.
        patch_size: Pixels of a regular patch per axis.
        center: Centres in the image's normalised coordinates, ``[B, N, 2]``.

    Returns:
        ``[B, N, C]``.
    """
    regular = [-(-n // p) for n, p in zip(image.grid.shape, patch_size, strict=True)]
    learned = resample_abs_pos_embed(learned, regular, list(grid_size), num_prefix_tokens=0)
    return interpolate_pos_embed(learned.unflatten(1, regular), center)


@register_notrace_function
def sequence_positions(center: Tensor, image: Tokens, unit: Sequence[float], prefix: int) -> Positions:
    """Returns where tokens are, in units of length, from the middle of the image, where prefix tokens stand.

    Args:
        center: Centres of patches in the image's normalised coordinates, ``[B, N, axes]``.
        image: What they are cut out of.
        unit: One length per axis.
        prefix: Number of tokens before the patches.
    """
    lower, upper = image.grid.corners()
    extent = ((upper - lower) / lower.new_tensor(unit)).to(center.dtype)  # [1 or B, axes]
    offset = F.pad(center * extent[:, None] / 2, (0, 0, prefix, 0)).float()
    return Positions(offset.unbind(-1), (torch.ones_like(offset[..., 0]),) * len(unit))
