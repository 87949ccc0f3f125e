"""Spatial Grouping Attention: downsampling in which each token chooses its group (arXiv 2505.16993).

Per head, with groups g_m and tokens x_n, ``iters`` times:

    A[m, n]  = softmax over n of  temp * <R q(g_m), R k(x_n)>
    Ah[m, n] = A[m, n] / sum over m' of A[m', n]                a token's soft assignment to groups
    g_m     += LayerNorm(sum over n of Ah[m, n] v_n);   g_m += LayerNorm(MLP(g_m))

Parameters and their names are those of the package ``spatial-grouping-attention``.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import spatial_grouping_attention as upstream
import torch
from torch import Tensor, nn

from ..geometry.grid import Tokens, axis_values, channels_first, channels_last, field_center, integers
from ..ops.assignment import Assignment
from ..ops.grouping_dense import DenseGrouping
from ..ops.grouping_local import LocalGrouping
from ..ops.masking import pool_mask
from .rose import RotarySpatialEmbedding, Rotation, check_heads
from .tracing import compiled_once


class Grouping(Protocol):
    """Tokens that groups can take from."""

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""


class SpatialGroupingAttention(upstream.SpatialGroupingAttention):
    """Groups the tokens of a grid onto the coarser grid of a strided convolution.

    Keywords as in the upstream class. What differs: heads are separate; keys and values are computed once; positions
    are physical (see `RotarySpatialEmbedding`); masked tokens take no part, so there is no ``mask_embedding``; ``temp``
    starts at ``head_dim ** -0.5``; tokens and their grid come and go as `Tokens`.

    Args:
        feature_dims: Width.
        spatial_dims: Number of axes.
        kernel_size: Size of the strided convolution that starts the groups, odd, one number or one per axis.
        num_heads: Number of heads.
        stride: Its stride, one number or one per axis. Default: half the kernel.
        dilation: Distance of its taps, one number or one per axis.
        unit: Physical length of one unit of the rotary coordinate, one number or one per axis: the fine side's spacing
            where the input of the network has the reference spacing.
        device: Where parameters are made.
        dtype: Their type.
        **kwargs: ``iters, mlp_ratio, mlp_dropout, mlp_bias, mlp_activation, qkv_bias, base_theta, learnable_rose,
            init_jitter_std, rotary_ratio, frequency_scaling, learnable_rose_scaling, rose_initial_scaling``, as
            upstream, but with coherent coordinates by default (scaling "identity", not learnable).

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
        *,
        dilation: int | Sequence[int] = 1,
        unit: float | Sequence[float] = 1.0,
        learnable_rose_scaling: bool = False,
        rose_initial_scaling: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_heads(feature_dims, num_heads)
        if "spacing" in kwargs:
            raise TypeError("spacing is no keyword here: it comes with the tokens' grid")
        with torch.device(device) if device is not None else contextlib.nullcontext():
            super().__init__(
                feature_dims,
                spatial_dims,
                kernel_size,
                num_heads,
                stride,
                learnable_rose_scaling=learnable_rose_scaling,
                rose_initial_scaling=rose_initial_scaling,
                **kwargs,
            )
            self.rose = RotarySpatialEmbedding(
                feature_dims,
                num_heads,
                spatial_dims,
                base_theta=self.base_theta,
                learnable=self.learnable_rose,
                init_jitter_std=kwargs.get("init_jitter_std", 0.02),
                frequency_scaling=self.frequency_scaling,
                rotary_ratio=self.rotary_ratio,
                learnable_scale=learnable_rose_scaling,
                initial_scaling=rose_initial_scaling,
            )
        if any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"kernel_size must be odd, got {kernel_size!r}")
        del self.mask_embedding
        nn.init.constant_(self.temp, (feature_dims // num_heads) ** -0.5)
        dilation = integers(dilation, "dilation", spatial_dims)
        self.extent = tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, dilation, strict=True))
        self.padding = tuple((extent - 1) // 2 for extent in self.extent)
        # upstream's convolution has no dilation
        self.strider.dilation, self.strider.padding = dilation, self.padding
        self.unit = axis_values(unit, "unit", spatial_dims)
        self.to(dtype=dtype)

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Grouping:
        """Makes ready to take values ``[B, *fine, heads, d]``; masks ``[B, *fine]`` and ``[B, *coarse]``."""
        raise NotImplementedError

    def assign(self, query: Tensor, key: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Assignment:
        """Returns the matrices behind what groups ``[B, *coarse, heads, d]`` take."""
        window = self._window(query.shape[1:-2])
        return LocalGrouping.create(key, key, self.stride, window, mask, group_mask).assign(query)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        raise NotImplementedError

    def forward(self, tokens: Tokens, return_assignment: bool = False) -> tuple[Tokens, Assignment | None]:
        """Groups ``tokens`` ``[B, *fine, C]`` into ``[B, *coarse, C]``, ``coarse = ceil(fine / stride)``.

        Returns:
            The groups, and, if asked for, the matrices of the last iteration.
        """
        x, grid, mask = tokens.filled(), tokens.grid, tokens.mask
        coarse = grid.conv(self.extent, self.stride, self.padding)
        center = field_center([grid])
        key, value = self._split_heads(self.kv(x), 2)
        key = self.temp.to(key.dtype) * self.rose(key, grid.positions(center, self.unit))
        groups = self.norm1(channels_last(self.strider(channels_first(x))))
        group_mask = None if mask is None else pool_mask(mask, self.stride)
        rotation = self.rose.rotation(coarse.positions(center, self.unit), key.dtype)
        grouping = self.prepare(key, value, mask, group_mask)
        for _ in range(self.iters):
            groups, query = _iterate(self, groups, rotation, grouping)
        assignment = self.assign(query, key, mask, group_mask) if return_assignment else None
        return Tokens(groups, coarse, group_mask), assignment

    def _split_heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (parts, self.num_heads, -1)).unbind(-3)  # parts of [B, *grid, heads, d]

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"{self.feature_dims}, num_heads={self.num_heads}, stride={self.stride}, iters={self.iters}"

    __repr__ = nn.Module.__repr__


class DenseSpatialGroupingAttention(SpatialGroupingAttention):
    """Spatial grouping attention between all groups and all tokens."""

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Grouping:
        """See the base class."""
        return DenseGrouping(key, value, mask, group_mask)

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

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Grouping:
        """See the base class."""
        window = self._window(key.shape[1:-2])
        return LocalGrouping.create(key, value, self.stride, window, mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        return integers(self.neighborhood_kernel, "neighborhood_kernel", len(coarse))


@compiled_once
def _iterate(
    sga: SpatialGroupingAttention, groups: Tensor, rotation: Rotation | None, grouping: Grouping
) -> tuple[Tensor, Tensor]:
    (query,) = sga._split_heads(sga.q(groups), 1)
    query = query if rotation is None else rotation(query)
    groups = groups + sga.norm2(grouping.take(query).flatten(-2))
    return groups + sga.norm3(sga.mlp(groups)), query
