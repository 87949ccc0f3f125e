"""One stage of the hierarchical model: group the tokens onto a coarser grid, then attend."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from ...geometry.grid import Positions, Pyramid, Tokens, channels_first, channels_last, field_center, merge_axes
from ...layers.attention import Attention, Block
from ...layers.grouping import DenseSpatialGroupingAttention, SparseSpatialGroupingAttention
from ...layers.rose import RotarySpatialEmbedding
from ...layers.tracing import traced_as_whole
from ...ops.assignment import Assignment
from ...ops.masking import join_masks, pool_mask
from ...ops.windows import Tiles
from .config import RatConfig, StageConfig

TAKEN = 0.1
"""Weight of what groups take over what they start from, when training starts (after Swin V2, arXiv 2111.09883)."""


class Downsample(nn.Module):
    """Spatial grouping attention at the width of the finer stage, then a projection to the coarser stage's.

    Args:
        cfg: The model.
        stage: The coarser stage.
        proj_drop: Dropout in the grouping's MLP.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        cfg: RatConfig,
        stage: StageConfig,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        grouping: Callable[..., nn.Module] = DenseSpatialGroupingAttention
        if stage.sga_attention_type == "sparse":
            window: Any = merge_axes(stage.neighborhood_kernel)
            grouping = partial(SparseSpatialGroupingAttention, neighborhood_kernel=window)
        self.sga = grouping(
            stage.dim_in,
            cfg.spatial_dims,
            cfg.kernel_size,
            stage.sga_num_heads,
            stage.stride,
            dilation=stage.dilation,
            unit=stage.sga_unit,
            iters=cfg.iters,
            mlp_ratio=cfg.sga_mlp_ratio,
            mlp_dropout=proj_drop,
            qkv_bias=cfg.qkv_bias,
            base_theta=cfg.base_theta,
            learnable_rose=cfg.learnable_rose,
            init_jitter_std=cfg.init_jitter_std,
            rotary_ratio=cfg.rotary_ratio,
            frequency_scaling=cfg.frequency_scaling,
            learnable_rose_scaling=cfg.learnable_rose_scaling,
            rose_initial_scaling=cfg.rose_initial_scaling,
            **dd,
        )
        # what a `Grid` has to know of the grouping: extent, stride and padding of its convolution
        sga: Any = self.sga
        self.step: tuple[tuple[int, ...], ...] = (sga.extent, sga.stride, sga.padding)
        for name in ("norm2", "norm3"):
            # at first all groups take nearly the same, which at full weight drowns what tells them apart
            nn.init.constant_(self.sga.get_parameter(f"{name}.weight"), TAKEN)
        self.proj = None if stage.dim_in == stage.dim else nn.Linear(stage.dim_in, stage.dim, **dd)

    def forward(
        self, pyramid: Pyramid, return_assignments: bool = False
    ) -> tuple[Pyramid, list[Assignment | None] | None]:
        """Groups each level by itself; prefix tokens are only projected."""
        grouped = [self.sga(tokens, return_assignments) for tokens in pyramid.levels]
        levels = [tokens._replace(x=self._project(tokens.x)) for tokens, _ in grouped]
        prefix = None if pyramid.prefix is None else self._project(pyramid.prefix)
        assignments = [assignment for _, assignment in grouped] if return_assignments else None
        return Pyramid(levels, prefix, pyramid.single), assignments

    def _project(self, x: Tensor) -> Tensor:
        return x if self.proj is None else self.proj(x)


class StageOutput(NamedTuple):
    """What a stage returns that has more to say than its map.

    Attributes:
        maps: ``[B, C, *grid]``, or one per level for a list.
        prefix: ``[B, P, C]``, or None before the first stage with global attention.
        assignments: How each level's tokens were grouped, if asked for.
    """

    maps: Any
    prefix: Tensor | None
    assignments: list[Assignment | None] | None


class Stage(nn.Module):
    """Downsampling and blocks; the blocks of a global stage see all tokens of all levels and the prefix together.

    The model calls `advance`, which takes and gives a `Pyramid`; that calls the module itself with maps, so that hooks
    on a stage meet the tensor that ``features_only`` gives.

    Args:
        cfg: The model.
        stage: This stage.
        drop_path: Stochastic depth rate of each block.
        proj_drop: Dropout after projections.
        attn_drop: Dropout of attention weights.
        device: Where parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        cfg: RatConfig,
        stage: StageConfig,
        drop_path: Sequence[float],
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.unit = stage.unit
        self.is_global = stage.attn_kernel_size is None
        self.grad_checkpointing = False
        self.downsample = Downsample(cfg, stage, proj_drop, **dd) if stage.sga_attention_type else None
        self.reg_tokens = None
        if stage.reg_tokens:
            self.reg_tokens = nn.Parameter(torch.empty(1, stage.reg_tokens, stage.dim, **dd))
            trunc_normal_(self.reg_tokens, std=0.02)

        def attention() -> Attention:
            rose = RotarySpatialEmbedding(stage.dim, stage.num_heads, cfg.spatial_dims, **cfg.rose).to(**dd)
            return Attention(
                stage.dim, stage.num_heads, rose, stage.attn_kernel_size, cfg.qkv_bias, attn_drop, proj_drop, **dd
            )

        self.blocks = nn.ModuleList(
            Block(attention(), stage.dim, stage.mlp_ratio, proj_drop, rate, **dd) for rate in drop_path
        )

    def advance(
        self, pyramid: Pyramid, return_assignments: bool = False
    ) -> tuple[Pyramid, list[Assignment | None] | None]:
        """Takes a pyramid one stage further; returns, if asked, how each level's tokens were grouped."""
        output = self(stage_maps(pyramid), pyramid, return_assignments)
        return advanced(pyramid, output, None if self.downsample is None else self.downsample.step)

    @traced_as_whole
    def forward(self, x: Any, pyramid: Pyramid, return_assignments: bool = False) -> Any:
        """Computes maps from maps.

        Args:
            x: ``[B, C, *grid]``, or one per level for a list.
            pyramid: Where they stand; its features are not looked at.
            return_assignments: Whether to return how each level's tokens were grouped.

        Returns:
            ``[B, C, *grid]``, or one per level for a list, zero where masked; a `StageOutput` if there are prefix
            tokens or assignments.
        """
        maps = [x] if isinstance(x, Tensor) else x
        levels = [t._replace(x=channels_last(level)) for t, level in zip(pyramid.levels, maps, strict=True)]
        pyramid, assignments = pyramid._replace(levels=levels), None
        if self.downsample is not None:
            pyramid, assignments = self._run(self.downsample, pyramid, return_assignments)
        if self.reg_tokens is not None:
            batch_size = pyramid.levels[0].x.shape[0]
            pyramid = pyramid._replace(prefix=self.reg_tokens.expand(batch_size, -1, -1))
        pyramid = self._attend_together(pyramid) if self.is_global else self._attend_apart(pyramid)
        if pyramid.prefix is None and assignments is None:
            return stage_maps(pyramid)
        return StageOutput(stage_maps(pyramid), pyramid.prefix, assignments)

    def _attend_apart(self, pyramid: Pyramid) -> Pyramid:
        levels = []
        for x, grid, mask in pyramid.levels:
            positions = grid.positions(field_center([grid]), self.unit)
            levels.append(Tokens(self._run_blocks(x, positions, mask, self._plan(x)), grid, mask))
        return pyramid._replace(levels=levels)

    def _attend_together(self, pyramid: Pyramid) -> Pyramid:
        x, positions, mask = _to_sequence(pyramid, self.unit)
        x = self._run_blocks(x, positions, mask)
        return _from_sequence(x, pyramid)

    def _run_blocks(self, x: Tensor, positions: Positions, mask: Tensor | None, plan: Tiles | None = None) -> Tensor:
        for block in self.blocks:
            x = self._run(block, x, positions, mask, plan)
        return x

    def _plan(self, x: Tensor) -> Tiles | None:
        first: Any = next(iter(self.blocks), None)
        return None if first is None else first.attn.plan(x)

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(module, *inputs) if self.grad_checkpointing else module(*inputs)


@torch.fx.wrap
def stage_maps(pyramid: Pyramid) -> Any:
    """Returns a pyramid's features channels first, ``[B, C, *grid]``, zero where masked; a list of them for a list."""
    return pyramid.unwrap([channels_first(x) for x in pyramid.features])


@torch.fx.wrap
def advanced(
    pyramid: Pyramid, output: Any, step: tuple[tuple[int, ...], ...] | None
) -> tuple[Pyramid, list[Assignment | None] | None]:
    """Puts what a stage made of a pyramid on the grids where it stands.

    Args:
        pyramid: What the stage was given.
        output: What it returned.
        step: See `Downsample`; None for a stage without one.
    """
    if not isinstance(output, StageOutput):
        output = StageOutput(output, None, None)
    maps = [output.maps] if pyramid.single else output.maps
    levels = []
    for x, (_, grid, mask) in zip(maps, pyramid.levels, strict=True):
        if step is not None:
            grid, mask = grid.conv(*step), None if mask is None else pool_mask(mask, step[1])
        levels.append(Tokens(channels_last(x), grid, mask))
    return Pyramid(levels, output.prefix, pyramid.single), output.assignments


class PyramidNorm(nn.LayerNorm):
    """LayerNorm over the channels of all levels and of the prefix."""

    @traced_as_whole
    def forward(self, input: Any) -> Any:
        """Normalises every token of a `Pyramid`."""
        normalize = super().forward
        levels = [tokens._replace(x=normalize(tokens.x)) for tokens in input.levels]
        return Pyramid(levels, None if input.prefix is None else normalize(input.prefix), input.single)


def _to_sequence(pyramid: Pyramid, unit: Sequence[float]) -> tuple[Tensor, Positions, Tensor | None]:
    """Lines up prefix and levels: features ``[B, N, C]``, positions ``[1 or B, N]`` per axis, mask ``[B, N]``.

    Prefix tokens stand at the centre of the field, where the rotation is none.
    """
    center = field_center([tokens.grid for tokens in pyramid.levels])
    features = [tokens.x.flatten(1, -2) for tokens in pyramid.levels]
    positions = [tokens.grid.positions(center, unit).dense() for tokens in pyramid.levels]
    masks = pyramid.masks
    if pyramid.prefix is not None:
        features.insert(0, pyramid.prefix)
        nowhere = positions[0].offset[0].new_zeros(1, pyramid.prefix.shape[1])
        axes = len(unit)
        positions.insert(0, Positions((nowhere,) * axes, (torch.ones_like(nowhere),) * axes))
        masks.insert(0, None)
    joint = Positions(*(_join(parts) for parts in zip(*positions, strict=True)))
    return torch.cat(features, dim=1), joint, join_masks(masks, [x.shape[:-1] for x in features])


def _join(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Lines up what each part has per axis, ``[1 or B, *grid]``, into ``[1 or B, N]`` per axis."""
    rows = max(part[0].shape[0] for part in parts)
    return tuple(torch.cat([t.flatten(1).expand(rows, -1) for t in along], dim=1) for along in zip(*parts, strict=True))


def _from_sequence(x: Tensor, pyramid: Pyramid) -> Pyramid:
    """Undoes `_to_sequence`."""
    sizes = [0 if pyramid.prefix is None else pyramid.prefix.shape[1]]
    sizes += [math.prod(tokens.grid.shape) for tokens in pyramid.levels]
    prefix, *parts = x.split(sizes, dim=1)
    levels = [
        tokens._replace(x=part.unflatten(1, tokens.grid.shape))
        for tokens, part in zip(pyramid.levels, parts, strict=True)
    ]
    return Pyramid(levels, None if pyramid.prefix is None else prefix, pyramid.single)
