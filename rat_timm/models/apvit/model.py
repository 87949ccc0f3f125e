"""Adaptive ViT: timm's `VisionTransformer`, whose patches go where the image is interesting.

After the package "Adaptive Patching for Vision Transformers"; see `rat_timm.layers.AdaptivePatching`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, register_notrace_function, register_notrace_module, resample_abs_pos_embed
from timm.models import checkpoint, vision_transformer
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.nn import functional as F

from ...geometry.grid import Positions, Tokens, axis_values, fill, merge_axes
from ...geometry.read import Told, read_images, what_is_told
from ...layers.adaptive_patching import AdaptivePatching, Patches, interpolate_pos_embed
from ...layers.head import carried_mask, with_mask
from ...layers.rose import RotarySpatialEmbedding
from ...layers.sequence import attention_mask
from ..pool import pool_tokens

torch.fx.wrap("what_is_told")  # else symbolic tracing would ask at once what is to be asked in each call

POSITIONS = ("interpolated", "rose")


class RoseAttention(Attention):
    """timm's attention, with queries and keys rotated by where their patches are."""

    def __init__(self, dim: int, num_heads: int = 8, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
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


class AdaptiveVit(vision_transformer.VisionTransformer):
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
        **kwargs: Any,
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
        if kwargs.get("patch_drop_rate"):
            raise ValueError("patch_drop_rate goes with regular patches: give num_patches or jitter")
        if positions == "rose":
            taken = [name for name in ("block_fn", "attn_layer") if name in kwargs]
            if taken or kwargs.get("pos_embed", "none") not in ("", "none"):
                raise ValueError(f"positions 'rose' has its own {taken or ['pos_embed']}, got {kwargs}")
            kwargs = {**kwargs, "pos_embed": "none", "block_fn": RoseBlock, "attn_layer": RoseAttention}
        super().__init__(**{**kwargs, "dynamic_img_size": True, "dynamic_img_pad": True})
        self.positions = positions
        self.spatial_dims = 2
        self.reference_spacing = axis_values(spacing, "spacing", 2)
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
        self._traits = {"first_conv": None}  # timm adapts no channels: checkpoint_filter_fn does

    def forward(self, x: Tensor, spacing: Any = None, mask: Any = None, origin: Any = None) -> Tensor:
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
        tokens, patches, _ = self._run(x, spacing, mask, origin)
        return self._classify(self.norm(tokens), patches.mask)

    def forward_features(self, x: Tensor, spacing: Any = None, mask: Any = None, origin: Any = None) -> Tensor:
        """Returns the last tokens, ``[B, prefix + patches, C]``, zero for patches that are not valid; see `forward`."""
        tokens, patches, _ = self._run(x, spacing, mask, origin)
        return self._features(tokens, patches)

    def forward_head(self, x: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor:
        """Pools and classifies what `forward_features` returned.

        Args:
            x: ``[B, prefix + patches, C]``.
            pre_logits: Whether to stop before the classifier.
            mask: ``[B, patches]``, bool, True = valid: which patches to pool over. Not the image's mask. Default: what
                `forward_features` and `forward_intermediates` know of the very tensor that they returned.
        """
        return self._classify(x, carried_mask(x) if mask is None else mask, pre_logits)

    def patches(self, x: Tensor, spacing: Any = None, mask: Any = None, origin: Any = None) -> Patches:
        """Returns the patches that are cut out of images, and where; see `forward`."""
        return self.patching(self._read(x, what_is_told(x, spacing, mask, origin)))

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
        spacing: Any = None,
        mask: Any = None,
        origin: Any = None,
    ) -> Any:
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
        take, last = feature_take_indices(len(self.blocks), indices)
        tokens, patches, taken = self._run(x, spacing, mask, origin, take, last + 1 if stop_early else None)
        taken = [self._fill(self.norm(t) if norm else t, patches.mask) for t in taken]
        prefix = self.num_prefix_tokens
        maps: list = [t[:, prefix:] for t in taken]
        if return_prefix_tokens:
            maps = [(m, t[:, :prefix]) for m, t in zip(maps, taken, strict=True)]
        if intermediates_only and not output_dict:
            return maps
        final = {} if intermediates_only else {"image_features": self._features(tokens, patches)}
        if output_dict:
            return {**final, "image_intermediates": maps, "patches": patches}
        return final["image_features"], maps

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        **geometry: Any,
    ) -> list:
        """Returns the patches' features after the last ``n`` blocks or the blocks ``n``, as DINO's models name it."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens,
            norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            **geometry,
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
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
        return {**args, "positions": self.positions, "spacing": merge_axes(self.reference_spacing)}

    def _read(self, x: Tensor, told: Told) -> Tokens:
        if isinstance(x, (list, tuple)):
            raise ValueError("x must be an image: adaptive patches are cut out of one image, not of a pyramid")
        return read_images(x, told, self.reference_spacing, self.in_chans, (1, 1)).levels[0]

    def _run(
        self,
        x: Tensor,
        spacing: Any,
        mask: Any,
        origin: Any,
        take: Sequence[int] = (),
        blocks: int | None = None,
    ) -> tuple[Tensor, Patches, list[Tensor]]:
        """Runs the first ``blocks`` blocks; returns the last one's tokens, the patches, and the tokens to ``take``."""
        tracing, told = isinstance(x, torch.fx.Proxy), what_is_told(x, spacing, mask, origin)
        image = self._read(image_without_mask(x, told.mask) if tracing else x, told)
        patches = self.patching(image)
        if tracing:
            patches = Patches(patches.x, patches.transform, patches.center, patches.position)
        x = self._embed(patches, image)
        allowed = None if patches.mask is None else attention_mask(patches.mask, self.num_prefix_tokens)
        rotary = [self._positions(patches, image)] if self.positions == "rose" else []
        taken = []
        for i, block in enumerate(self.blocks[:blocks]):
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, allowed, *rotary)
            else:
                x = block(x, allowed, *rotary)
            if i in take:
                taken.append(x)
        return x, patches, taken

    def _embed(self, patches: Patches, image: Tokens) -> Tensor:
        proj = self.patch_embed.proj
        x = self.patch_embed.norm(F.linear(patches.x.flatten(2), proj.weight.flatten(1), proj.bias))  # [B, N, C]
        tokens = [t for t in (self.cls_token, self.reg_token) if t is not None]
        prefix = torch.cat(tokens, dim=1) if tokens else x.new_zeros(1, 0, self.embed_dim)
        if self.pos_embed is not None:
            count = 0 if self.no_embed_class else self.num_prefix_tokens
            grid = self.patch_embed.grid_size
            x = x + embed_places(self.pos_embed[:, count:], grid, image, self.patch_embed.patch_size, patches.center)
            prefix = prefix + self.pos_embed[:, :count] if count else prefix
        x = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)
        return self.norm_pre(self.pos_drop(x))

    def _positions(self, patches: Patches, image: Tokens) -> Positions:
        unit = [p * s for p, s in zip(self.patch_embed.patch_size, self.reference_spacing, strict=True)]
        return sequence_positions(patches.center, image, unit, self.num_prefix_tokens)

    def _features(self, tokens: Tensor, patches: Patches) -> Tensor:
        return with_mask(self._fill(self.norm(tokens), patches.mask), patches.mask)

    def _fill(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return fill(x, None if valid is None else F.pad(valid, (self.num_prefix_tokens, 0), value=True))

    def _classify(self, x: Tensor, valid: Tensor | None, pre_logits: bool = False) -> Tensor:
        pools = self.global_pool or self.attn_pool is not None
        x = pool_tokens(self, x, valid) if pools else self._fill(x, valid)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)


@register_notrace_function
def image_without_mask(x: Tensor, mask: Any) -> Tensor:
    """Stands in symbolically traced graphs, which cannot tell whether there is a mask."""
    if mask is not None:
        raise ValueError("mask has no effect on a symbolically traced model: use the model itself")
    return x


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
