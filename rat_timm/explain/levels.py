"""How much each level of a pyramid is attended to, from each place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..geometry.grid import Tokens, fill
from ..geometry.types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike
from ..models import RatVit, ResolutionAwareTransformer
from .images import at_pixels, backbone_of, read


class LevelAttention(NamedTuple):
    """Shares of attention, the mean over heads: one for each level, and one more for prefix tokens.

    Attributes:
        shares: At each level's pixels, ``[B, *size, levels (+ 1)]``; sums to 1, to 0 where masked.
        tokens: The same for the tokens themselves, ``[B, *grid, levels (+ 1)]`` on their grids.
        prefix: How many prefix tokens there are.
    """

    shares: list[Tensor]
    tokens: list[Tokens]
    prefix: int

    def even(self) -> Tensor:
        """Returns the shares if attention were even: those of valid tokens, ``[B, levels (+ 1)]``."""
        counts = [_valid(level).flatten(1).sum(dim=1) for level in self.tokens]
        prefix = torch.full_like(counts[0], self.prefix)
        parts = torch.stack(counts if self.prefix == 0 else [*counts, prefix], dim=1).double()
        return parts / parts.sum(dim=1, keepdim=True)


def _valid(tokens: Tokens) -> Tensor:
    return torch.ones_like(tokens.x[..., 0], dtype=torch.bool) if tokens.mask is None else tokens.mask


class _Call(NamedTuple):
    """What a block that sees all tokens of all levels attended with; see `torch.nn.functional`."""

    stage: int
    query: Tensor
    key: Tensor
    options: dict[str, Any]


class _Watch(TorchFunctionMode):
    """Keeps what attention is computed of, inside the modules that tell so."""

    def __init__(self) -> None:
        super().__init__()
        self.stage: int | None = None
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.stage is not None:
            query, key, _, *rest = args
            options = {**dict(zip(("attn_mask", "dropout_p"), rest, strict=False)), **kwargs, "dropout_p": 0.0}
            self.calls.append(_Call(self.stage, query, key, options))
        return func(*args, **kwargs)


@torch.no_grad()
def attend_levels(
    model: nn.Module,
    x: ImageOrPyramid,
    *,
    block: int = -1,
    spacing: SpacingLike = None,
    mask: MaskLike = None,
    origin: OriginLike = None,
) -> LevelAttention:
    """Tells how much attention each place gives to each level of a pyramid.

    Args:
        model: A RAT or a plain RAT, or a segmenter with one; in evaluation mode.
        x: A list of images ``[B, C, *size]``.
        block: Which of the blocks that see the tokens of all levels together, in order.
        spacing: Physical pixel size of each level, in any form that the models take; the same for all samples.
        mask: ``[B, *size]`` of each level, True = valid.
        origin: Physical position of each level's first pixel's centre.

    Raises:
        ValueError: If an argument does not fit, or there is no such block.
    """
    backbone = backbone_of(model)
    images = read(backbone, x, spacing, mask, origin)
    images_given: list[Any] = list(x) if isinstance(x, (list, tuple)) else [x]
    with _watched(backbone) as watch:
        out: Any = backbone.forward_intermediates(
            images_given, output_dict=True, intermediates_only=True, spacing=spacing, mask=mask, origin=origin
        )
    batch = len(images_given[0])
    if any(len(call.query) != batch for call in watch.calls):
        raise ValueError("spacing must be the same for all samples: others are computed apart")
    if not -len(watch.calls) <= block < len(watch.calls):
        raise ValueError(f"block must be one of {len(watch.calls)} blocks that see all levels, got {block}")
    call = watch.calls[block]
    grids, masks = out["grids"][call.stage], out["masks"][call.stage]
    sizes = [grid.shape for grid in grids]
    counts = [torch.Size(size).numel() for size in sizes]
    prefix = call.key.shape[2] - sum(counts)
    shares = _shares(call, [prefix, *counts])[:, prefix:].split(counts, dim=1)
    tokens = [
        Tokens(fill(share.unflatten(1, size), mask), grid, mask)
        for share, size, grid, mask in zip(shares, sizes, grids, masks, strict=True)
    ]
    pixels = [at_pixels(*level, image) for level, image in zip(tokens, images.levels, strict=True)]
    return LevelAttention(pixels, tokens, prefix)


def _shares(call: _Call, counts: list[int]) -> Tensor:
    """Returns the attention of each token to each part of the sequence: values are which part a token is of.

    Args:
        call: The attention.
        counts: Tokens of each part; the first one is the prefix, which comes last in the result.

    Returns:
        ``[B, N, parts]``, without the prefix if it has no tokens.
    """
    part = torch.arange(len(counts), device=call.key.device)
    part = part.repeat_interleave(torch.tensor(counts, device=part.device))
    value = F.one_hot(part, len(counts)).roll(-1, dims=-1)[:, : len(counts) if counts[0] else -1]
    value = value.to(call.key.dtype).expand(*call.key.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(call.query, call.key, value, **call.options).mean(dim=1)


@contextmanager
def _watched(backbone: ResolutionAwareTransformer | RatVit) -> Iterator[_Watch]:
    """Watches the blocks of a backbone, as far as they get tokens as one sequence."""
    watch, handles = _Watch(), []
    attending = [(i, stage) for i, stage in enumerate(getattr(backbone, "stages", [])) if not stage.convolves]
    layers = [(i, block) for i, stage in attending for block in stage.blocks]
    if isinstance(backbone, RatVit):
        blocks: Any = backbone.blocks
        layers = list(enumerate(blocks))

    def end(*_: object) -> None:
        watch.stage = None

    for stage, block in layers:

        def begin(_: nn.Module, args: tuple, stage: int = stage) -> None:
            watch.stage = stage if args[0].ndim == 3 else None

        handles += [block.attn.register_forward_pre_hook(begin), block.attn.register_forward_hook(end)]
    try:
        with watch:
            yield watch
    finally:
        for handle in handles:
            handle.remove()
