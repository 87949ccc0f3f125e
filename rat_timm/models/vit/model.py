"""What plain ViTs have in common: prefix tokens, blocks, intermediates, pooling and head."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ...geometry.grid import axis_values, fill
from ...geometry.ranges import KnowsRange, RangeLike
from ...geometry.read import Told, what_is_told
from ...geometry.types import ImageOrPyramid, MapOrMaps, MaskLike, OriginLike, SpacingLike
from ...layers.head import carried_mask
from ...ops.masking import check_mask, join_masks
from .sequence import POOLS, VitSequence, attention_mask, pad_prefix, pool_valid

# symbolic tracing keeps these calls, which methods below make: what they ask is to be asked whenever the graph runs
for _function in ("what_is_told", "image_without"):
    torch.fx.wrap(_function)

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}
"""Keywords with which timm's ViTs take images of any size."""

Intermediates: TypeAlias = list | tuple[MapOrMaps, list] | dict[str, Any]
"""Maps; the final tokens and maps; or a dict of these and of where they are."""


class Wanted(NamedTuple):
    """What ``forward_intermediates`` is asked for: timm's arguments, in its order."""

    indices: int | Sequence[int] | None
    return_prefix_tokens: bool
    norm: bool
    stop_early: bool
    output_fmt: str
    intermediates_only: bool
    output_dict: bool


class VitBase(KnowsRange):
    """The half of a plain ViT that is ours; a class of timm's, the next base, makes the parts.

    It knows blocks, prefix tokens and the head; a family turns images into a `VitSequence`.
    """

    # of timm's classes
    blocks: nn.ModuleList
    norm: nn.Module
    norm_pre: nn.Module
    pos_drop: nn.Module
    pos_embed: Tensor | None
    cls_token: Tensor | None
    reg_token: Tensor | None
    num_prefix_tokens: int
    no_embed_class: bool
    global_pool: str
    attn_pool: nn.Module | None
    pool: Callable[[Tensor], Tensor]
    fc_norm: nn.Module
    head_drop: nn.Module
    head: nn.Module
    grad_checkpointing: bool
    training: bool

    def _set_space(self, spatial_dims: int, spacing: float | Sequence[float], spacing_range: RangeLike) -> None:
        self.spatial_dims = spatial_dims
        self.reference_spacing = axis_values(spacing, "spacing", spatial_dims)
        self.spacing_range = spacing_range
        self._traits = {"first_conv": None}  # timm adapts no channels: checkpoint_filter_fn does, in 3D too

    def _told(self, x: ImageOrPyramid, spacing: SpacingLike, mask: MaskLike, origin: OriginLike) -> Told:
        return what_is_told(x, spacing, mask, origin)

    def _traced_image(self, x: Tensor, told: Told, *names: str) -> Tensor:
        return image_without(x, told, names)

    @property
    def _pools(self) -> bool:
        return bool(self.global_pool) or self.attn_pool is not None

    @property
    def _embedded_prefix(self) -> int:
        """How many prefix tokens the learned embedding has an entry for, in front of those of patches."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _with_prefix(self, patches: Tensor) -> Tensor:
        """Puts prefix tokens before ``patches`` ``[B, N, C]``; returns what enters the first block."""
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if tokens:
            prefix = torch.cat(tokens, dim=1)
            if self.pos_embed is not None and self._embedded_prefix:
                prefix = prefix + self.pos_embed[:, : self._embedded_prefix]
            patches = torch.cat((prefix.expand(patches.shape[0], -1, -1), patches), dim=1)
        return self.norm_pre(self.pos_drop(patches))

    def _run(
        self, sequence: VitSequence, kept: Sequence[int] = (), count: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the first ``count`` blocks; returns the last one's tokens, and those of the blocks in ``kept``."""
        x, valid, outputs = sequence.x, sequence.valid, []
        mask = None if valid is None else attention_mask(valid, self.num_prefix_tokens)
        for index, block in enumerate(self.blocks[:count]):
            args = {"attn_mask": mask, **sequence.block_args(index)}
            x = checkpoint(block, x, **args) if self.grad_checkpointing and self.training else block(x, **args)
            if index in kept:
                outputs.append(x)
        return x, outputs

    def _features(self, sequence: VitSequence) -> Any:
        return sequence.sequences(self.norm(self._run(sequence)[0]))

    def _intermediates(self, sequence: VitSequence, wanted: Wanted) -> Any:
        kept, last = feature_take_indices(len(self.blocks), wanted.indices)
        x, outputs = self._run(sequence, kept, last + 1 if wanted.stop_early else None)
        outputs = [self.norm(tokens) for tokens in outputs] if wanted.norm else outputs
        maps: list = [sequence.maps(tokens, wanted.output_fmt) for tokens in outputs]
        if wanted.return_prefix_tokens:
            maps = [(m, tokens[:, : self.num_prefix_tokens]) for m, tokens in zip(maps, outputs, strict=True)]
        if wanted.intermediates_only and not wanted.output_dict:
            return maps
        final = {} if wanted.intermediates_only else {"image_features": sequence.sequences(self.norm(x))}
        if wanted.output_dict:
            return {**final, "image_intermediates": maps, **sequence.places(len(maps))}
        return final["image_features"], maps

    def _classify(self, sequence: VitSequence) -> Any:
        x = self.norm(self._run(sequence)[0])
        if self._pools:
            return self._head(self._pool(x, sequence.valid))
        sequences = sequence.sequences(x)
        return [self._head(level) for level in sequences] if isinstance(sequences, list) else self._head(sequences)

    @overload
    def forward_head(self, x: Tensor, pre_logits: bool = False, mask: Tensor | None = None) -> Tensor: ...

    @overload
    def forward_head(self, x: Sequence[Tensor], pre_logits: bool = False, mask: MaskLike = None) -> MapOrMaps: ...

    def forward_head(self, x: ImageOrPyramid, pre_logits: bool = False, mask: MaskLike = None) -> MapOrMaps:
        """Pools and classifies what ``forward_features`` returned.

        Args:
            x: ``[B, prefix + patches, C]``, or a list with one such per level.
            pre_logits: Whether to stop before the classifier.
            mask: ``[B, patches]``, or the map's ``[B, *grid]``, bool, True = valid, or one per level: which patches to
                pool over. Not the image's mask. Default: what ``forward_features`` and ``forward_intermediates`` know
                of the very tensor that they returned.

        Raises:
            ValueError: If a mask does not fit its patches.
        """
        sequences: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
        masks = _patch_masks(mask, sequences, self.num_prefix_tokens)
        if self._pools:
            others = [s[:, self.num_prefix_tokens :] for s in sequences[1:]]
            sizes = [(s.shape[0], s.shape[1] - self.num_prefix_tokens) for s in sequences]
            joined = torch.cat([sequences[0], *others], dim=1) if others else sequences[0]
            return self._head(self._pool(joined, join_masks(masks, sizes)), pre_logits)
        filled = [
            s if m is None else fill(s, pad_prefix(m, self.num_prefix_tokens))
            for s, m in zip(sequences, masks, strict=True)
        ]
        heads = [self._head(s, pre_logits) for s in filled]
        return heads if isinstance(x, (list, tuple)) else heads[0]

    def _head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def _pool(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Pools tokens ``[B, P + N, C]`` over valid patches ``[B, N]``, and as timm does if all are."""
        if valid is None:
            return self.pool(x)
        prefix, patches = x[:, : self.num_prefix_tokens], fill(x[:, self.num_prefix_tokens :], valid)
        if self.attn_pool is not None:
            if not getattr(self, "pool_include_prefix", True):  # which timm's Eva always does
                prefix = prefix[:, :0]
            allowed = attention_mask(valid, prefix.shape[1])
            # added to the logits: that is what timm's pooling does with any mask where attention is not fused
            bias = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, -math.inf)
            return self.attn_pool(torch.cat((prefix, patches), dim=1), attn_mask=bias)
        if self.global_pool in POOLS:
            return pool_valid(patches, valid, self.global_pool)
        return self.pool(torch.cat((prefix, patches), dim=1))


def _patch_masks(mask: MaskLike, sequences: Sequence[Tensor], prefix: int) -> list[Tensor | None]:
    """Reads which patches of each level are valid, ``[B, patches]``."""
    if mask is None:
        return [carried_mask(sequence) for sequence in sequences]
    masks = [mask] if isinstance(mask, Tensor) and len(sequences) == 1 else mask
    if not isinstance(masks, (list, tuple)) or len(masks) != len(sequences):
        raise ValueError(f"mask must be a list with one entry per level ({len(sequences)}), got {mask!r}")
    flat = [None if m is None else m.flatten(1) for m in masks]
    for level, (m, sequence) in enumerate(zip(flat, sequences, strict=True)):
        name = "mask" if len(sequences) == 1 else f"mask of level {level}"
        check_mask(m, (sequence.shape[0], sequence.shape[1] - prefix), name)
    return flat


def image_without(x: Tensor, told: Told, names: Sequence[str]) -> Tensor:
    """Returns an image in a symbolically traced graph, which must not be told what ``names`` says.

    Raises:
        ValueError: If it is.
    """
    for name in names:
        if getattr(told, name) is not None:
            raise ValueError(f"{name} has no effect on a symbolically traced model: use the model itself")
    return x
