"""Spatial Grouping Attention: downsampling in which each token chooses its group (arXiv 2505.16993).

Per head, with groups g_m and tokens x_n, ``iters`` times:

    A[m, n]  = softmax over n of  temp * <R q(g_m), R k(x_n)>
    Ah[m, n] = A[m, n] / sum over m' of A[m', n]                a token's soft assignment to groups
    g_m     += LayerNorm(sum over n of Ah[m, n] v_n);   g_m += LayerNorm(MLP(g_m))

Parameters and their names are those of the package ``spatial-grouping-attention``.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import spatial_grouping_attention as upstream
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..grid import Tokens, axis_values, channels_first, channels_last, field_center, integers
from . import tiling
from .assignment import Assignment
from .masking import check_mask, masked_log_softmax, nothing, pool_mask
from .rose import RotarySpatialEmbedding, check_heads

_CHUNK_ELEMENTS = 1 << 24  # logits that dense grouping holds at a time


def grouping_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    group_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Dense grouping: every group takes from every token, each token shares itself out among the groups.

    The M x N matrix is made in chunks of groups and, where it does not fit one chunk, made again in the backward pass.

    Args:
        query: Groups, ``[B, heads, M, d]``, scaled already: logits are plain dot products.
        key: Tokens, ``[B, heads, N, d]``.
        value: Tokens, ``[B, heads, N, d]``.
        mask: ``[B, N]``, bool, True = valid token. Masked keys and values may hold anything, NaN included.
        group_mask: ``[B, M]``, bool, True = valid group. An invalid group takes nothing, so that it has no share in
            any token.
        chunk_size: Number of groups handled at a time; None chooses by memory.

    Returns:
        ``sum over n of Ah[m, n] v_n``, ``[B, heads, M, d]``; zeros for an invalid group, and if no token is valid.

    Raises:
        ValueError: If shapes or the mask's dtype do not fit.
    """
    _check_dense(query, key, value, mask, group_mask)
    allowed = None if mask is None else mask[:, None, None, :]  # [B, 1, 1, N]
    groups = None if group_mask is None else group_mask[:, None, :, None]  # [B, 1, M, 1]
    if mask is not None:
        key, value = (torch.where(mask[:, None, :, None], x, 0.0) for x in (key, value))
    chunk_size = chunk_size or max(1, _CHUNK_ELEMENTS // max(1, key.shape[:3].numel()))
    if chunk_size >= query.shape[2]:
        weights = _log_weights(query, key, allowed, groups)
        return _shares(weights, *_column_sum(weights)).to(value.dtype) @ value
    chunks = query.split(chunk_size, dim=2)
    masks = [None] * len(chunks) if groups is None else groups.split(chunk_size, dim=2)
    again = functools.partial(checkpoint, use_reentrant=False)
    columns = [again(_chunk_column_sum, q, key, allowed, m) for q, m in zip(chunks, masks, strict=True)]
    peak = functools.reduce(torch.maximum, [p for p, _ in columns])
    total = functools.reduce(torch.add, [t * (p - peak).exp() for p, t in columns])
    outs = [again(_chunk_output, q, key, value, allowed, m, peak, total) for q, m in zip(chunks, masks, strict=True)]
    return torch.cat(outs, dim=2)


def _log_weights(query: Tensor, key: Tensor, allowed: Tensor | None, groups: Tensor | None) -> Tensor:
    weights = masked_log_softmax(query @ key.mT, allowed)  # log A, [B, heads, M, N]
    return weights if groups is None else weights.masked_fill(~groups, nothing(weights.dtype))


def _column_peak(weights: Tensor) -> Tensor:
    # above what stands for zero, of which a difference then underflows; a constant, on which no result depends
    return weights.detach().amax(dim=-2, keepdim=True).clamp(min=nothing(weights.dtype) / 2)


def _column_sum(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the largest of ``weights`` over the groups, and the sum of their exponentials in units of its own."""
    peak = _column_peak(weights)
    return peak, (weights - peak).exp().sum(dim=-2, keepdim=True)


def _shares(weights: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    # relative to the peak, instead of upstream's eps: a token that no group looks at is shared out as exactly as any
    # other. The peak itself adds 1 to the total, so that the limit is for tokens without a group
    return (weights - peak).exp() / total.clamp(min=0.5)


def _chunk_column_sum(
    query: Tensor, key: Tensor, allowed: Tensor | None, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _column_sum(_log_weights(query, key, allowed, groups))


def _chunk_output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None,
    groups: Tensor | None,
    peak: Tensor,
    total: Tensor,
) -> Tensor:
    return _shares(_log_weights(query, key, allowed, groups), peak, total).to(value.dtype) @ value


def local_grouping_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stride: int | Sequence[int],
    window: int | Sequence[int] = 3,
    mask: Tensor | None = None,
    group_mask: Tensor | None = None,
) -> Tensor:
    """Sparse grouping: a group takes from the tokens of the stride cells around its own.

    Group m and token n interact if the cell ``n // stride`` lies in the window of cells centred on m; at a border the
    window is cut off. With a window that covers the grid this is `grouping_attention`.

    Args:
        query: Groups, ``[B, *coarse, heads, d]`` with ``coarse = ceil(fine / stride)``, scaled already.
        key: Tokens, ``[B, *fine, heads, d]``.
        value: Tokens, ``[B, *fine, heads, d]``.
        stride: Size of a cell in tokens, one number or one per axis.
        window: Size of the window in cells, odd, one number or one per axis.
        mask: ``[B, *fine]``, bool, True = valid token. Masked keys and values may hold anything, NaN included.
        group_mask: ``[B, *coarse]``, bool, True = valid group. An invalid group takes nothing.

    Returns:
        ``sum over n of Ah[m, n] v_n``, ``[B, *coarse, heads, d]``; zeros for an invalid group, and for one whose
        window has no valid token.

    Raises:
        ValueError: If shapes, stride, window or the mask's dtype do not fit.
    """
    steps, cells = _check_local(query, key, value, stride, window, mask)
    if mask is not None:
        value = torch.where(mask[..., None, None], value, 0.0)
    assignment = _assign(query, key, steps, cells, mask, group_mask)
    out = assignment.attn_q.to(value.dtype) @ tiling.gather(value, assignment.tokens)
    return tiling.untile(out, assignment.groups, assignment.coarse)


def _assign(
    query: Tensor,
    key: Tensor,
    stride: Sequence[int],
    window: Sequence[int],
    mask: Tensor | None,
    group_mask: Tensor | None,
) -> Assignment:
    check_mask(group_mask, query.shape[:-2], "group_mask")
    coarse, fine = tuple(query.shape[1:-2]), tuple(key.shape[1:-2])
    tiles = [_axis_tiles(m, n, s, w, query.device) for m, n, s, w in zip(coarse, fine, stride, window, strict=True)]
    groups, tokens = [axis.queries for axis in tiles], [axis.keys for axis in tiles]
    allowed = tiling.allowed_pairs(tiles)[:, None, None]  # [tiles, 1, 1, groups, tokens]
    if mask is not None:
        key = torch.where(mask[..., None, None], key, 0.0)
        allowed = allowed & tiling.gather_mask(mask, tokens)[:, :, None, None]
    valid_groups = None if group_mask is None else tiling.gather_mask(group_mask, groups)[:, :, None, :, None]
    weights = _log_weights(tiling.gather(query, groups), tiling.gather(key, tokens), allowed, valid_groups)
    peak = tiling.scatter_max(_column_peak(weights).mT, tokens, fine)  # [B, *fine, heads, 1], over all tiles
    parts = (weights - tiling.gather(peak, tokens).mT).exp()
    counted = tiling.first_queries(groups)[:, None, None, :, None]
    total = tiling.scatter_add((parts * counted).sum(dim=-2).unsqueeze(-1), tokens, fine)
    shares = parts / tiling.gather(total, tokens).mT.clamp(min=0.5)
    return Assignment(shares, weights.exp(), groups, tokens, coarse, fine)


def _axis_tiles(groups: int, tokens: int, stride: int, window: int, device: torch.device) -> tiling.AxisTiles:
    reach = window // 2
    queries = tiling.query_tiles(groups, stride + reach + 1, device)
    keys = tiling.key_tiles((queries[:, 0] - reach) * stride, (queries.shape[1] + 2 * reach) * stride, tokens)
    distance = keys[:, None, :] // stride - queries[:, :, None]  # [T, b, w], in cells
    return tiling.AxisTiles(queries, keys, distance.abs() <= reach)


def _check_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> None:
    same = key.shape == value.shape and query.ndim == key.ndim == 4
    if not same or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query must be [B, heads, M, d] and key, value [B, heads, N, d], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    check_mask(mask, (key.shape[0], key.shape[2]))
    check_mask(group_mask, (query.shape[0], query.shape[2]), "group_mask")


def _check_local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stride: int | Sequence[int],
    window: int | Sequence[int],
    mask: Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    axes = key.ndim - 3
    if axes < 1 or query.ndim != key.ndim or key.shape != value.shape:
        raise ValueError(
            "query must be [B, *coarse, heads, d] and key, value [B, *fine, heads, d], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    steps, cells = integers(stride, "stride", axes), integers(window, "window", axes)
    if any(w % 2 == 0 for w in cells):
        raise ValueError(f"window must be an odd positive number or {axes} of them, got {window!r}")
    coarse = tuple(-(-n // s) for n, s in zip(key.shape[1:-2], steps, strict=True))
    if tuple(query.shape) != (key.shape[0], *coarse, *key.shape[-2:]):
        raise ValueError(
            f"query must be {[key.shape[0], *coarse, *key.shape[-2:]]} (coarse = ceil(fine / stride)), "
            f"got {list(query.shape)}"
        )
    check_mask(mask, key.shape[:-2])
    return steps, cells


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
        self.padding = tuple((k - 1) // 2 for k in self.kernel_size)
        self.unit = axis_values(unit, "unit", spatial_dims)
        self.to(dtype=dtype)

    def attn(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Tensor:
        """Takes values ``[B, *fine, heads, d]`` into groups ``[B, *coarse, heads, d]``; masks lack two axes."""
        raise NotImplementedError

    def assign(self, query: Tensor, key: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Assignment:
        """Returns the matrices behind `attn`."""
        return _assign(query, key, self.stride, self._window(query.shape[1:-2]), mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        raise NotImplementedError

    def forward(self, tokens: Tokens, return_assignment: bool = False) -> tuple[Tokens, Assignment | None]:
        """Groups ``tokens`` ``[B, *fine, C]`` into ``[B, *coarse, C]``, ``coarse = ceil(fine / stride)``.

        Returns:
            The groups, and, if asked for, the matrices of the last iteration.
        """
        x, grid, mask = tokens.filled(), tokens.grid, tokens.mask
        coarse = grid.conv(self.kernel_size, self.stride, self.padding)
        center = field_center([grid])
        key, value = self._split_heads(self.kv(x), 2)
        key = self.temp.to(key.dtype) * self.rose(key, grid.positions(center, self.unit))
        groups = self.norm1(channels_last(self.strider(channels_first(x))))
        group_mask = None if mask is None else pool_mask(mask, self.stride)
        rotation = self.rose.rotation(coarse.positions(center, self.unit), key.dtype)
        for _ in range(self.iters):
            (query,) = self._split_heads(self.q(groups), 1)
            query = query if rotation is None else rotation(query)
            groups = groups + self.norm2(self.attn(query, key, value, mask, group_mask).flatten(-2))
            groups = groups + self.norm3(self.mlp(groups))
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

    def attn(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Tensor:
        """See the base class."""
        coarse = query.shape[1:-2]
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))  # [B, heads, N, d]
        mask, group_mask = (None if m is None else m.flatten(1) for m in (mask, group_mask))
        out = grouping_attention(query, key, value, mask, group_mask)
        return out.transpose(1, 2).unflatten(1, coarse)

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

    def attn(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Tensor:
        """See the base class."""
        return local_grouping_attention(query, key, value, self.stride, self.neighborhood_kernel, mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        return integers(self.neighborhood_kernel, "neighborhood_kernel", len(coarse))
