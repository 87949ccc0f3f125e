"""The parts of RAT that take and give maps, as an image meets them: stem, downsampling, stages, final norm, head."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ...geometry.grid import Positions, channels_first, fill, merge_axes
from ...geometry.types import MapOrMaps
from ...layers.attention import Attention, Block
from ...layers.convolution import ConvBlock
from ...layers.grouping import CONVS, DenseSpatialGroupingAttention, SparseSpatialGroupingAttention
from ...layers.head import average
from ...layers.rose import RotarySpatialEmbedding
from ...layers.tracing import as_one_node
from ...ops.assignment import Assignment
from ...ops.masking import check_mask, join_masks, pool_mask, take_largest
from ...ops.windows import Tiles
from .config import RatConfig, StageConfig, stem_convs
from .places import StageInput

POOLS = ("avg", "token", "")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions


class Stem(nn.Module):
    """Convolutions with a norm after each and GELU between, or one norm at the end; a single one may stand alone.

    With ``pool`` the last convolution is followed by a maximum over neighbours, and that by a norm.

    Args:
        in_chans: Number of image channels.
        embed_dim: Width of the tokens; earlier convolutions have half of it.
        spatial_dims: Number of axes.
        kernel_size: Kernel size of each convolution, odd.
        stride: Total stride per axis, shared out among the convolutions from the first on.
        mask_token: Whether a learnable token stands at masked places, and is valid there.
        device: PyTorch's.
        dtype: PyTorch's.
        linear: Whether nothing stands between the convolutions, and a norm after the last one.
        norm_eps: What norms add to variances.
        pool: Whether to take the largest of 3 neighbours along axes of an even stride, a factor of 2 of it.

    Raises:
        ValueError: If a kernel is even, the stride is more than the kernels can cover, or nothing would be pooled.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        spatial_dims: int = 2,
        kernel_size: Sequence[int] = (3, 3),
        stride: Sequence[int] = (4, 4),
        mask_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        linear: bool = False,
        norm_eps: float = 1e-6,
        pool: bool = False,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        convs = stem_convs(stride, kernel_size, pool)
        self.pool = convs.pop() if pool else None
        self.strides = [conv.stride for conv in convs]
        widths = [in_chans, *[embed_dim // 2] * (len(kernel_size) - 1), embed_dim]
        conv = CONVS[spatial_dims]
        self.convs = nn.ModuleList(
            conv(a, b, kernel_size=k, stride=s, padding=k // 2, **dd)
            for a, b, k, s in zip(widths[:-1], widths[1:], kernel_size, self.strides, strict=True)
        )
        norms = widths[-1:] if linear else widths[1:] if pool or len(kernel_size) > 1 else []
        self.linear = linear
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=norm_eps, **dd) for width in norms)
        self.mask_token = nn.Parameter(torch.empty(embed_dim, **dd)) if mask_token else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: MapOrMaps, masks: Sequence[Tensor | None] | None = None) -> MapOrMaps:
        """Turns pixels into tokens.

        Args:
            x: Image ``[B, in_chans, *size]``, or a list of them.
            masks: ``[B, *size]``, True = valid, or None, for each image: what is masked influences nothing.

        Returns:
            ``[B, embed_dim, *ceil(size / stride)]``, or a list of them for a list.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, masks)
        if isinstance(x, Tensor):
            return self._embed(x, masks[0] if masks else None)
        return [self._embed(*pair) for pair in zip(x, masks or [None] * len(x), strict=True)]

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        last = len(self.convs) - 1
        if x.ndim in CHANNELS_LAST:  # pooling is several times as fast, and norms need no copy
            x = x.contiguous(memory_format=CHANNELS_LAST[x.ndim])
        for index, (conv, stride) in enumerate(zip(self.convs, self.strides, strict=True)):
            x = conv(x if mask is None else torch.where(mask.unsqueeze(1), x, 0.0))
            mask = None if mask is None else pool_mask(mask, stride)
            if index == last and self.pool is not None:
                x, mask = take_largest(x, mask, *self.pool)
            x = x.movedim(1, -1)
            if self.norms and (index == last or not self.linear):
                x = self.norms[-1 if index == last else index](x)
            if index < last and not self.linear:
                x = F.gelu(x)
            x = x.movedim(-1, 1)
        if self.mask_token is None or mask is None:
            return x
        return torch.where(mask.unsqueeze(1), x, self.mask_token.view(-1, *[1] * (x.ndim - 2)))


class Coarsening(nn.Module):
    """What makes a coarser stage's tokens, ending in a projection where these are not of the blocks' width."""

    proj: nn.Linear | None
    projects_groups: bool

    def add_projection(self, stage: StageConfig, **dd: Any) -> None:
        """Makes the projection that groups, or prefix tokens that come in, have to pass."""
        self.projects_groups = stage.sga_dim != stage.dim
        self.proj = nn.Linear(stage.dim_in, stage.dim, **dd) if stage.needs_projection else None

    def project(self, x: Tensor) -> Tensor:
        """Brings tokens to the coarser stage's width."""
        return x if self.proj is None else self.proj(x)


class StridedConv(Coarsening):
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
        self.add_projection(stage, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, *fine, C]``, zero where masked, -> ``[B, *coarse, C']``."""
        x = self.norm(self.conv(x.movedim(-1, 1)).movedim(1, -1))
        return self.project(x) if self.projects_groups else x


class Downsample(Coarsening):
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
            attn_dims=stage.sga_attn_dim,
            **cfg.sga_rose,
            **dd,
        )
        for name in ("norm2", "norm3"):
            # at first all groups take nearly the same, which at full weight drowns what tells them apart
            # (after Swin V2, arXiv 2111.09883)
            nn.init.constant_(self.sga.get_parameter(f"{name}.weight"), cfg.group_share)
        self.add_projection(stage, **dd)

    def forward(
        self,
        x: Tensor,
        fine: Positions,
        groups: Positions,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        return_assignment: bool = False,
        cells: Tiles | None = None,
    ) -> Tensor | tuple[Tensor, Assignment]:
        """Groups tokens; see `SpatialGroupingAttention.group`.

        Returns:
            ``[B, *coarse, C']``; with the assignment if asked for.
        """
        grouped, assignment = self.sga.group(x, fine, groups, mask, group_mask, return_assignment, cells)
        if self.projects_groups:
            grouped = self.project(grouped)
        return grouped if assignment is None else (grouped, assignment)


class StageOutput(NamedTuple):
    """What a module returns that has more to say than its map.

    Attributes:
        maps: ``[B, C, *grid]``, or one per level for a list.
        prefix: ``[B, P, C]``, or None before the first stage that has them.
        assignments: How each level's tokens were grouped, if asked for.
    """

    maps: MapOrMaps
    prefix: Tensor | None
    assignments: list[Assignment | None] | None


def whole_output(output: MapOrMaps | StageOutput) -> StageOutput:
    """Returns what a stage or a norm returned, in full."""
    return output if isinstance(output, StageOutput) else StageOutput(output, None, None)


class Stage(nn.Module):
    """Downsampling and blocks, which see each level alone or all tokens of all levels and the prefix together.

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
                stage.dim,
                stage.num_heads,
                rose,
                stage.attn_kernel_size,
                cfg.qkv_bias,
                attn_drop,
                proj_drop,
                bias_kernel_size=stage.bias_kernel_size,
                pad_windows=stage.pad_windows,
                **dd,
            )

        def block(rate: float) -> Block | ConvBlock:
            args: Any = stage.mlp_ratio, proj_drop, rate
            extras: dict[str, Any] = {"layer_scale": cfg.layer_scale, "norm_eps": cfg.norm_eps, **dd}
            if stage.conv_kernel_size:
                return ConvBlock(stage.dim, stage.conv_kernel_size, stage.conv_dilation, *args, **extras)
            return Block(attention(), stage.dim, *args, **extras)

        self.convolves = stage.conv_kernel_size is not None
        self.blocks = nn.ModuleList(map(block, drop_path))

    def forward(
        self, x: MapOrMaps, at: StageInput, prefix: Tensor | None = None, return_assignments: bool = False
    ) -> MapOrMaps | StageOutput:
        """Computes maps from maps.

        Args:
            x: ``[B, C, *grid]``, or one per level for a list.
            at: Where tokens are, and which are valid.
            prefix: ``[B, P, C]``, once a stage has added them.
            return_assignments: Whether to return how each level's tokens were grouped.

        Returns:
            ``[B, C, *grid]``, or one per level for a list, zero where masked; a `StageOutput` if there are prefix
            tokens or assignments.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, at, prefix, return_assignments)
        levels = [x.movedim(1, -1)] if isinstance(x, Tensor) else [level.movedim(1, -1) for level in x]
        assignments = None
        if self.downsample is not None:
            levels, assignments = self._group(levels, at, return_assignments)
            if prefix is not None:
                prefix = self.downsample.project(prefix)
        if self.reg_tokens is not None:
            prefix = self.reg_tokens.expand(len(levels[0]), -1, -1)
        places = at.places
        if self.convolves:
            levels = [self._convolve(*level) for level in zip(levels, at.masks, strict=True)]
        elif places.windows:
            inputs = zip(levels, places.tokens, at.masks, places.windows, strict=True)
            levels = [self._run_blocks(*level) for level in inputs]
        else:
            levels, prefix = self._attend_together(levels, at, prefix)
        maps = []
        for level, mask in zip(levels, at.masks, strict=True):
            maps.append((level if mask is None else fill(level, mask)).movedim(-1, 1))
        output = maps[0] if isinstance(x, Tensor) else maps
        if prefix is None and assignments is None:
            return output
        return StageOutput(output, prefix, assignments)

    def _group(
        self, levels: list[Tensor], at: StageInput, return_assignments: bool
    ) -> tuple[list[Tensor], list[Assignment | None] | None]:
        if isinstance(self.downsample, StridedConv):
            pairs = zip(levels, at.fine_masks, strict=True)
            return [self._run(self.downsample, fill(level, mask)) for level, mask in pairs], None
        assert self.downsample is not None
        places, grouped = at.places, []
        for tokens, fine, groups, mask, group_mask, cells in zip(
            levels, places.fine, places.groups, at.fine_masks, at.masks, places.cells, strict=True
        ):
            side = tokens, fine, groups, mask, group_mask, return_assignments, cells
            grouped.append(self._run(self.downsample, *side))
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
        mask = None
        if any(one is not None for one in masks):
            mask = join_masks(masks, [part.shape[:-1] for part in parts])
        sequence = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        sequence = self._run_blocks(sequence, at.places.tokens[0], mask, None, True, at.places.entries)
        parts = list(sequence.split(sizes, dim=1)) if len(parts) > 1 else [sequence]
        prefix = None if prefix is None else parts.pop(0)
        return [part.unflatten(1, level.shape[1:-1]) for part, level in zip(parts, levels, strict=True)], prefix

    def _convolve(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = self._run(block, x, mask)
        return x

    def _run_blocks(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None,
        windows: Tiles | None = None,
        all_to_all: bool = False,
        entries: Tensor | None = None,
    ) -> Tensor:
        if windows is not None and windows.once.order is None and windows.entries is None:  # in an export
            windows = windows.share_bias(x)
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, positions, mask, windows, all_to_all, entries)
            else:
                x = block(x, positions, mask, windows, all_to_all, entries)
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
        output: MapOrMaps
        if isinstance(x, Tensor):
            output = normalize(x.movedim(1, -1)).movedim(-1, 1)
        else:
            output = [normalize(level.movedim(1, -1)).movedim(-1, 1) for level in x]
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


class Head(nn.Module):
    """Pools features and classifies them.

    Args:
        in_features: Width.
        num_classes: Number of classes; 0 leaves the features as they are.
        pool_type: "avg" over the valid tokens of all levels, "token" for the first prefix token, "" for none.
        drop_rate: Dropout before the classifier.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If the pooling is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device, dtype)

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a new classifier; ``pool_type`` None keeps the pooling."""
        if pool_type is not None:
            if pool_type not in POOLS:
                raise ValueError(f"global_pool must be one of {POOLS}, got {pool_type!r}")
            self.pool_type = pool_type
        linear = nn.Linear(self.in_features, num_classes, device=device, dtype=dtype) if num_classes > 0 else None
        self.fc = nn.Identity() if linear is None else linear
        if linear is not None:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.train(self.training)

    def forward(
        self,
        x: MapOrMaps,
        masks: Sequence[Tensor | None] | None = None,
        prefix: Tensor | None = None,
        pre_logits: bool = False,
    ) -> MapOrMaps:
        """Classifies.

        Args:
            x: Map ``[B, C, *grid]``, or one per level.
            masks: ``[B, *grid]``, True = valid, or None, for each level.
            prefix: ``[B, P, C]``, for "token".
            pre_logits: Whether to stop before the classifier.

        Returns:
            ``[B, classes]``; without pooling ``[B, classes, *grid]``, or one per level for a list.

        Raises:
            ValueError: If a mask does not fit its map, or a token is to be pooled and there is none.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, masks, prefix, pre_logits)
        maps = [x] if isinstance(x, Tensor) else x
        features = [level.movedim(1, -1) for level in maps]
        masks = masks or [None] * len(maps)
        if len(masks) != len(maps) or any(mask is not None for mask in masks):
            _check_masks(features, masks)
        if self.pool_type == "":
            classified = [self._classify(level, pre_logits) for level in features]
            out = [channels_first(fill(level, mask)) for level, mask in zip(classified, masks, strict=True)]
            return out[0] if isinstance(x, Tensor) else out
        if self.pool_type == "token":
            if prefix is None:
                raise ValueError("global_pool 'token' needs prefix tokens (reg_tokens), and forward_head their values")
            return self._classify(prefix[:, 0], pre_logits)
        whole = len(features) == 1 and masks[0] is None
        pooled = features[0].flatten(1, -2).mean(dim=1) if whole else average(features, masks)
        return self._classify(pooled, pre_logits)

    def _classify(self, x: Tensor, pre_logits: bool) -> Tensor:
        x = self.drop(x)
        return x if pre_logits else self.fc(x)

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"pool_type={self.pool_type!r}"


def _check_masks(features: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    if len(masks) != len(features):
        raise ValueError(f"mask must have one entry per map ({len(features)}), got {len(masks)}")
    for level, (x, mask) in enumerate(zip(features, masks, strict=True)):
        check_mask(mask, x.shape[:-1], f"mask of level {level}" if len(features) > 1 else "mask")
