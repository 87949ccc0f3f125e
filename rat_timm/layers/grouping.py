"""Spatial Grouping Attention: downsampling in which each token chooses its group (arXiv 2505.16993).

Per head, with groups g_m and tokens x_n, ``iters`` times:

    A[m, n]  = softmax over n of  temp * <R q(g_m), R k(x_n)>
    Ah[m, n] = A[m, n] / sum over m' of A[m', n]                a token's soft assignment to groups
    g_m     += LayerNorm(sum over n of Ah[m, n] v_n);   g_m += LayerNorm(MLP(g_m))

Parameters and their names are those of the package ``spatial-grouping-attention``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..geometry.grid import Positions, Tokens, axis_values, field_center, fill, integers
from ..ops.assignment import Assignment
from ..ops.grouping import DenseGrouping, LocalGrouping, local_tiles, sparse_grouping
from ..ops.masking import pool_mask
from ..ops.windows import Tiles
from .rose import RotarySpatialEmbedding, Rotation, check_heads
from .tracing import compiled_once, split_heads_in_export

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

_FEWER = 24
"""A convolution rearranges its weights for the layout of its input. An input of so many times fewer numbers than the
weights is rearranged instead, which is faster on CPUs."""


def extent_and_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns how many places the taps of an odd kernel span along each axis, and the padding that keeps it centred."""
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    return extent, tuple((n - 1) // 2 for n in extent)


class Grouping(Protocol):
    """Tokens that groups can take from."""

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""


class SpatialGroupingAttention(nn.Module):
    """Groups the tokens of a grid onto the coarser grid of a strided convolution.

    Keywords and parameters are named as in the package ``spatial-grouping-attention``, whose weights load. What differs
    from it: heads are separate; keys and values are computed once; positions are physical (see
    `RotarySpatialEmbedding`) and coherent by default (scaling "identity", not learnable); masked tokens take no part,
    so there is no ``mask_embedding``; ``temp`` starts at ``head_dim ** -0.5``; tokens and their grid come and go as
    `Tokens`.

    Args:
        feature_dims: Width of the groups.
        spatial_dims: Number of axes.
        kernel_size: Size of the strided convolution that starts the groups, odd, one number or one per axis.
        num_heads: Number of heads.
        stride: Its stride, one number or one per axis. Default: half the kernel.
        iters: Number of times that groups take.
        mlp_ratio: Hidden width of the MLP over ``feature_dims``.
        mlp_dropout: Dropout in the MLP.
        mlp_bias: Whether the MLP has biases.
        mlp_activation: Its activation.
        qkv_bias: Whether queries, keys and values have a bias.
        base_theta: See `RotarySpatialEmbedding`.
        learnable_rose: Whether rotary frequencies are parameters.
        init_jitter_std: See `RotarySpatialEmbedding`.
        rotary_ratio: Share of the heads that are rotated.
        frequency_scaling: See `RotarySpatialEmbedding`.
        learnable_rose_scaling: Whether the scaling of spacings is learnable.
        rose_initial_scaling: How it starts.
        in_dims: Width of the tokens. Default: that of the groups.
        attn_dims: Width of queries, keys and values. Default: that of the groups; with another one a linear layer,
            ``proj``, brings to the groups' width what they take.
        dilation: Distance of the convolution's taps, one number or one per axis.
        unit: Physical length of one unit of the rotary coordinate, one number or one per axis: the fine side's spacing
            where the input of the network has the reference spacing.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If heads do not divide the width, or a kernel size is even.
    """

    def __init__(
        self,
        feature_dims: int = 128,
        spatial_dims: int = 2,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int = 16,
        stride: int | Sequence[int] | None = None,
        iters: int = 3,
        mlp_ratio: float = 4.0,
        mlp_dropout: float = 0.0,
        mlp_bias: bool = True,
        mlp_activation: type[nn.Module] = nn.GELU,
        qkv_bias: bool = True,
        base_theta: float = 1e4,
        learnable_rose: bool = True,
        init_jitter_std: float = 0.02,
        rotary_ratio: float = 0.5,
        frequency_scaling: str = "sqrt",
        learnable_rose_scaling: bool = False,
        rose_initial_scaling: str | None = None,
        *,
        in_dims: int | None = None,
        attn_dims: int | None = None,
        dilation: int | Sequence[int] = 1,
        unit: float | Sequence[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        attn_dims = feature_dims if attn_dims is None else attn_dims
        check_heads(attn_dims, num_heads)
        self.feature_dims, self.spatial_dims, self.num_heads, self.iters = feature_dims, spatial_dims, num_heads, iters
        self.kernel_size = integers(kernel_size, "kernel_size", spatial_dims)
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, got {kernel_size!r}")
        half = tuple(max(1, k // 2) for k in self.kernel_size)
        self.stride = half if stride is None else integers(stride, "stride", spatial_dims)
        dilation = integers(dilation, "dilation", spatial_dims)
        self.extent, self.padding = extent_and_padding(self.kernel_size, dilation)
        self.unit = axis_values(unit, "unit", spatial_dims)
        in_dims = feature_dims if in_dims is None else in_dims
        self.strider = CONVS[spatial_dims](
            in_dims, feature_dims, self.kernel_size, self.stride, self.padding, dilation, **dd
        )
        self.kv = nn.Linear(in_dims, 2 * attn_dims, bias=qkv_bias, **dd)
        self.q = nn.Linear(feature_dims, attn_dims, bias=qkv_bias, **dd)
        self.proj = nn.Linear(attn_dims, feature_dims, **dd) if attn_dims != feature_dims else None
        self.mlp = Mlp(
            feature_dims, int(feature_dims * mlp_ratio), act_layer=mlp_activation, drop=mlp_dropout, bias=mlp_bias, **dd
        )
        self.temp = nn.Parameter(torch.full((1,), (attn_dims // num_heads) ** -0.5, **dd))
        with torch.device(device or torch.get_default_device()):
            self.rose = RotarySpatialEmbedding(
                attn_dims,
                num_heads,
                spatial_dims,
                base_theta=base_theta,
                learnable=learnable_rose,
                init_jitter_std=init_jitter_std,
                frequency_scaling=frequency_scaling,
                rotary_ratio=rotary_ratio,
                learnable_scale=learnable_rose_scaling,
                initial_scaling=rose_initial_scaling,
            ).to(dtype=dtype)
        self.norm1 = nn.LayerNorm(feature_dims, **dd)
        self.norm2 = nn.LayerNorm(feature_dims, **dd)
        self.norm3 = nn.LayerNorm(feature_dims, **dd)

    def prepare(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        tiles: Tiles | None = None,
    ) -> Grouping:
        """Makes ready to take values ``[B, *fine, heads, d]``; masks ``[B, *fine]`` and ``[B, *coarse]``."""
        raise NotImplementedError

    def assign(self, query: Tensor, key: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Assignment:
        """Returns the matrices behind what groups ``[B, *coarse, heads, d]`` take."""
        tiles = local_tiles(key.shape[1:-2], self.stride, self._window(query.shape[1:-2]), key.device)
        return LocalGrouping.create(key, key, tiles, mask, group_mask).assign(query)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        raise NotImplementedError

    def forward(self, tokens: Tokens, return_assignment: bool = False) -> tuple[Tokens, Assignment | None]:
        """Groups ``tokens`` ``[B, *fine, C]`` into ``[B, *coarse, C]``, ``coarse = ceil(fine / stride)``.

        Returns:
            The groups, and, if asked for, the matrices of the last iteration.
        """
        grid, mask = tokens.grid, tokens.mask
        coarse, center = grid.conv(self.extent, self.stride, self.padding), field_center([grid])
        fine, groups = (side.positions(center, self.unit) for side in (grid, coarse))
        group_mask = None if mask is None else pool_mask(mask, self.stride)
        x, assignment = self.group(tokens.x, fine, groups, mask, group_mask, return_assignment)
        return Tokens(x, coarse, group_mask), assignment

    def group(
        self,
        x: Tensor,
        fine: Positions,
        coarse: Positions,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        return_assignment: bool = False,
        tiles: Tiles | None = None,
    ) -> tuple[Tensor, Assignment | None]:
        """Groups tokens whose places are known.

        Args:
            x: ``[B, *fine, in_dims]``.
            fine: Their positions, in the layer's unit.
            coarse: The groups' positions, about the same centre.
            mask: ``[B, *fine]``, True = valid; None if all are.
            group_mask: ``[B, *coarse]``: the groups over whose cell a valid token stands.
            return_assignment: Whether to return the matrices of the last iteration.
            tiles: Of a sparse grouping, the tokens' grid in `rat_timm.ops.grouping.local_tiles`; None: cut here.

        Returns:
            ``[B, *coarse, C]``, and the matrices if asked for.
        """
        x = x if mask is None else fill(x, mask)
        kv = self.kv(x)
        rotation = self.rose.rotation(coarse, kv.dtype)
        if rotation is None or rotation.other is None:
            key, value = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(-3)  # [B, *fine, heads, d]
        else:
            key, value = split_heads_in_export(kv, 2, self.num_heads)
        key = self.rose(key, fine)
        groups = self.norm1(self._stride(x))
        grouping = self.prepare(key, value, mask, group_mask, tiles)
        compiles = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        iterate = _compiled_iteration if compiles else _iterate
        for _ in range(self.iters):
            groups, query = iterate(self, groups, rotation, grouping)
        return groups, self.assign(query, key, mask, group_mask) if return_assignment else None

    def _stride(self, x: Tensor) -> Tensor:
        """Returns what groups start from: ``[B, *fine, in_dims]`` -> ``[B, *coarse, C]``."""
        x = x.movedim(-1, 1)
        if not torch.compiler.is_compiling() and x.numel() * _FEWER <= self.strider.get_parameter("weight").numel():
            x = x.contiguous()
        return self.strider(x).movedim(1, -1)

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"{self.feature_dims}, num_heads={self.num_heads}, stride={self.stride}, iters={self.iters}"


class DenseSpatialGroupingAttention(SpatialGroupingAttention):
    """Spatial grouping attention between all groups and all tokens."""

    def prepare(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        tiles: Tiles | None = None,
    ) -> Grouping:
        """See the base class."""
        return DenseGrouping.create(key, value, mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        return tuple(2 * n + 1 for n in coarse)


class SparseSpatialGroupingAttention(SpatialGroupingAttention):
    """Spatial grouping attention between groups and the tokens around them.

    Args:
        *args: As in the base class.
        neighborhood_kernel: Window in stride cells, odd, one number or one per axis.
        **kwargs: As in the base class.
    """

    def __init__(self, *args: Any, neighborhood_kernel: int | Sequence[int] = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.neighborhood_kernel = neighborhood_kernel

    def prepare(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        group_mask: Tensor | None = None,
        tiles: Tiles | None = None,
    ) -> Grouping:
        """See the base class."""
        if tiles is None:
            fine = key.shape[1:-2]
            tiles = local_tiles(fine, self.stride, self._window(fine), key.device)
        return sparse_grouping(key, value, tiles, mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        return integers(self.neighborhood_kernel, "neighborhood_kernel", len(coarse))


def _iterate(
    sga: SpatialGroupingAttention, groups: Tensor, rotation: Rotation | None, grouping: Grouping
) -> tuple[Tensor, Tensor]:
    query = sga.q(groups).unflatten(-1, (sga.num_heads, -1))  # [B, *coarse, heads, d]
    # there are fewer groups than tokens to multiply by the temperature
    query = sga.temp.to(query.dtype) * (query if rotation is None else rotation(query))
    taken = grouping.take(query).flatten(-2)
    groups = groups + sga.norm2(taken if sga.proj is None else sga.proj(taken))
    return groups + sga.norm3(sga.mlp(groups)), query


_compiled_iteration = compiled_once(_iterate)
