"""The parts of RAT that take and give maps: downsampling, stages, the final norm."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.fx import Proxy

from ...geometry.grid import Positions, fill, merge_axes
from ...geometry.types import MapOrMaps
from ...layers.attention import Attention, Block
from ...layers.grouping import DenseSpatialGroupingAttention, SparseSpatialGroupingAttention
from ...layers.rose import RotarySpatialEmbedding
from ...layers.tracing import as_one_node
from ...ops.assignment import Assignment
from ...ops.masking import join_masks
from .config import RatConfig, StageConfig
from .places import StageInput

GROUP_SHARE = 0.1
"""Weight of what groups take over what they start from, when training starts (after Swin V2, arXiv 2111.09883)."""
CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class StridedConv(nn.Module):
    """What grouping starts from, alone: the control.

    Args:
        cfg: The model.
        stage: The coarser stage.
        device: PyTorch's.
        dtype: PyTorch's.
    """

    def __init__(
        self,
        cfg: RatConfig,
        stage: StageConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        _, stride, padding = stage.grouping_conv
        self.conv = CONVS[cfg.spatial_dims](
            stage.dim_in, stage.sga_dim, stage.kernel_size, stride, padding, stage.dilation, **dd
        )
        self.norm = nn.LayerNorm(stage.sga_dim, **dd)
        self.projects_groups = stage.sga_dim != stage.dim
        self.proj = nn.Linear(stage.dim_in, stage.dim, **dd) if stage.needs_projection else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *fine, C]``, zero where masked, -> ``[B, *coarse, C']``."""
        x = self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))
        return self.project(x) if self.projects_groups else x

    def project(self, x: Tensor) -> Tensor:
        """Brings tokens to the coarser stage's width."""
        return x if self.proj is None else self.proj(x)


class Downsample(nn.Module):
    """Spatial grouping attention at the coarser stage's width, or at the finer stage's with a projection after it.

    Args:
        cfg: The model.
        stage: The coarser stage.
        proj_drop: Dropout in the grouping's MLP.
        device: PyTorch's.
        dtype: PyTorch's.
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
        self.sga: Any = grouping(
            stage.sga_dim,
            cfg.spatial_dims,
            stage.kernel_size,
            stage.sga_num_heads,
            stage.stride,
            dilation=stage.dilation,
            unit=stage.sga_unit,
            iters=cfg.iters,
            mlp_ratio=cfg.sga_mlp_ratio,
            mlp_dropout=proj_drop,
            qkv_bias=cfg.qkv_bias,
            in_dims=stage.dim_in,
            **cfg.sga_rose,
            **dd,
        )
        for name in ("norm2", "norm3"):
            # at first all groups take nearly the same, which at full weight drowns what tells them apart
            nn.init.constant_(self.sga.get_parameter(f"{name}.weight"), GROUP_SHARE)
        self.projects_groups = stage.sga_dim != stage.dim
        self.proj = nn.Linear(stage.dim_in, stage.dim, **dd) if stage.needs_projection else None

    def forward(
        self,
        x: Tensor,
        fine: Positions,
        groups: Positions,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        return_assignment: bool = False,
    ) -> Tensor | tuple[Tensor, Assignment]:
        """Groups tokens; see `SpatialGroupingAttention.group`.

        Returns:
            ``[B, *coarse, C']``; with the assignment if asked for.
        """
        grouped, assignment = self.sga.group(x, fine, groups, mask, group_mask, return_assignment)
        if self.projects_groups:
            grouped = self.project(grouped)
        return grouped if assignment is None else (grouped, assignment)

    def project(self, x: Tensor) -> Tensor:
        """Brings tokens to the coarser stage's width."""
        return x if self.proj is None else self.proj(x)


class StageOutput(NamedTuple):
    """What a module returns that has more to say than its map.

    Attributes:
        maps: ``[B, C, *grid]``, or one per level for a list.
        prefix: ``[B, P, C]``, or None before the first stage with global attention.
        assignments: How each level's tokens were grouped, if asked for.
    """

    maps: MapOrMaps
    prefix: Tensor | None
    assignments: list[Assignment | None] | None


def whole_output(output: MapOrMaps | StageOutput) -> StageOutput:
    """Returns what a stage or a norm returned, in full."""
    return output if isinstance(output, StageOutput) else StageOutput(output, None, None)


class Stage(nn.Module):
    """Downsampling and blocks; the blocks of a global stage see all tokens of all levels and the prefix together.

    It takes and gives maps, so that hooks on it meet the tensor that ``features_only`` gives.

    Args:
        cfg: The model.
        stage: This stage.
        drop_path: Stochastic depth rate of each block.
        proj_drop: Dropout after projections.
        attn_drop: Dropout of attention weights.
        device: PyTorch's.
        dtype: PyTorch's.
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
        self.is_global = stage.attn_kernel_size is None
        self.grad_checkpointing = False
        self.downsample: Downsample | StridedConv | None = None
        if stage.sga_attention_type == "none":
            self.downsample = StridedConv(cfg, stage, **dd)
        elif stage.sga_attention_type:
            self.downsample = Downsample(cfg, stage, proj_drop, **dd)
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

    def forward(
        self, x: MapOrMaps, at: StageInput, prefix: Tensor | None = None, return_assignments: bool = False
    ) -> MapOrMaps | StageOutput:
        """Computes maps from maps.

        Args:
            x: ``[B, C, *grid]``, or one per level for a list.
            at: Where tokens are, and which are valid.
            prefix: ``[B, P, C]``, once a stage with global attention has added them.
            return_assignments: Whether to return how each level's tokens were grouped.

        Returns:
            ``[B, C, *grid]``, or one per level for a list, zero where masked; a `StageOutput` if there are prefix
            tokens or assignments.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, at, prefix, return_assignments)
        levels = [level.movedim(1, -1) for level in ([x] if isinstance(x, Tensor) else x)]
        assignments = None
        if self.downsample is not None:
            levels, assignments = self._group(levels, at, return_assignments)
            if prefix is not None:
                prefix = self.downsample.project(prefix)
        if self.reg_tokens is not None:
            prefix = self.reg_tokens.expand(len(levels[0]), -1, -1)
        if self.is_global:
            levels, prefix = self._attend_together(levels, at, prefix)
        else:
            levels = [self._run_blocks(*level) for level in zip(levels, at.places.tokens, at.masks, strict=True)]
        filled = [level if mask is None else fill(level, mask) for level, mask in zip(levels, at.masks, strict=True)]
        maps = [level.movedim(-1, 1) for level in filled]
        output = maps[0] if isinstance(x, Tensor) else maps
        if prefix is None and assignments is None:
            return output
        return StageOutput(output, prefix, assignments)

    def _group(
        self, levels: list[Tensor], at: StageInput, return_assignments: bool
    ) -> tuple[list[Tensor], list[Assignment | None] | None]:
        if isinstance(self.downsample, StridedConv):
            filled = [
                level if mask is None else fill(level, mask) for level, mask in zip(levels, at.fine_masks, strict=True)
            ]
            return [self._run(self.downsample, level) for level in filled], None
        sides = zip(levels, at.places.fine, at.places.groups, at.fine_masks, at.masks, strict=True)
        assert self.downsample is not None
        grouped = [self._run(self.downsample, *side, return_assignments) for side in sides]
        if not return_assignments:
            return grouped, None
        return [tokens for tokens, _ in grouped], [assignment for _, assignment in grouped]

    def _attend_together(
        self, levels: Sequence[Tensor], at: StageInput, prefix: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Runs the blocks on one sequence of prefix tokens and the tokens of all levels."""
        parts = [level.flatten(1, -2) for level in levels]
        masks = list(at.masks)
        if prefix is not None:
            parts, masks = [prefix, *parts], [None, *masks]
        sizes = [part.shape[1] for part in parts]
        mask = None if all(m is None for m in masks) else join_masks(masks, [part.shape[:-1] for part in parts])
        sequence = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        sequence = self._run_blocks(sequence, at.places.tokens[0], mask)
        parts = list(sequence.split(sizes, dim=1)) if len(parts) > 1 else [sequence]
        prefix = None if prefix is None else parts.pop(0)
        return [part.unflatten(1, level.shape[1:-1]) for part, level in zip(parts, levels, strict=True)], prefix

    def _run_blocks(self, x: Tensor, positions: Positions, mask: Tensor | None) -> Tensor:
        first: Any = next(iter(self.blocks), None)
        plan = first.attn.plan(x) if first is not None and torch.compiler.is_compiling() else None
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, positions, mask, plan)
            else:
                x = block(x, positions, mask, plan)
        return x

    def _run(self, module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(module, *inputs) if self.grad_checkpointing else module(*inputs)


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of all levels' maps and of the prefix."""

    def forward(  # type: ignore[override]
        self, x: MapOrMaps, prefix: Tensor | None = None
    ) -> MapOrMaps | StageOutput:
        """Normalises ``[B, C, *grid]``, or one per level; with ``prefix`` ``[B, P, C]`` returns a `StageOutput`."""
        if isinstance(x, Proxy):
            return as_one_node(self, x, prefix)
        normalize = super().forward
        maps = [normalize(level.movedim(1, -1)).movedim(-1, 1) for level in ([x] if isinstance(x, Tensor) else x)]
        output = maps[0] if isinstance(x, Tensor) else maps
        return output if prefix is None else StageOutput(output, normalize(prefix), None)


class NoNorm(nn.Identity):
    """Stands where a model has no final norm."""

    def forward(  # type: ignore[override]
        self, x: MapOrMaps, prefix: Tensor | None = None
    ) -> MapOrMaps | StageOutput:
        """Returns what it is given."""
        if isinstance(x, Proxy):
            return as_one_node(self, x, prefix)
        return x if prefix is None else StageOutput(x, prefix, None)
