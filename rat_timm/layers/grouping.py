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
from typing import Any, NamedTuple, Protocol

import spatial_grouping_attention as upstream
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..grid import Tokens, axis_values, channels_first, channels_last, field_center, integers
from . import tiling
from .assignment import Assignment
from .masking import check_mask, exp_beside_one, nothing, pool_mask
from .rose import RotarySpatialEmbedding, check_heads

_CHUNK_ELEMENTS = 1 << 22  # logits that dense grouping holds at a time


def grouping_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    group_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Dense grouping: every group takes from every token, each token shares itself out among the groups.

    The M x N matrix is made in chunks of tokens, twice: first for what each group's attention sums to, then for the
    tokens' shares. Where it does not fit one chunk, it is made again in the backward pass.

    Args:
        query: Groups, ``[B, heads, M, d]``, scaled already: logits are plain dot products.
        key: Tokens, ``[B, heads, N, d]``.
        value: Tokens, ``[B, heads, N, d]``.
        mask: ``[B, N]``, bool, True = valid token. Masked keys and values may hold anything, NaN included.
        group_mask: ``[B, M]``, bool, True = valid group. An invalid group takes nothing, so that it has no share in
            any token.
        chunk_size: Number of tokens handled at a time; None chooses by memory.

    Returns:
        ``sum over n of Ah[m, n] v_n``, ``[B, heads, M, d]``; zeros for an invalid group, and if no token is valid.

    Raises:
        ValueError: If shapes or the mask's dtype do not fit.
    """
    _check_dense(query, key, value, mask, group_mask)
    allowed = _dense_pairs(mask, group_mask)
    if mask is not None:
        key = torch.where(mask[:, None, :, None], key, 0.0)
    if allowed is not None:
        value = torch.where(allowed.any(dim=-1, keepdim=True), value, 0.0)
    chunk_size = chunk_size or max(1, _CHUNK_ELEMENTS // max(1, query.shape[:3].numel()))
    if chunk_size >= key.shape[2]:
        attention = _logits(query, key, allowed).log_softmax(dim=-2)  # log A transposed
        if allowed is not None:
            attention = attention.masked_fill(~allowed, nothing(attention.dtype))
        return attention.softmax(dim=-1).to(value.dtype).mT @ value
    if _fused_can_run(query, key, value):
        return _fused(query, key, value, mask, group_mask).to(value.dtype)
    keys, values = key.split(chunk_size, dim=2), value.split(chunk_size, dim=2)
    pairs = [None] * len(keys) if allowed is None else allowed.expand(-1, -1, key.shape[2], -1).split(chunk_size, dim=2)
    again = functools.partial(checkpoint, use_reentrant=False)
    sums = [again(_chunk_log_sum, query, k, p) for k, p in zip(keys, pairs, strict=True)]
    log_sum = _log_sum(torch.cat(sums, dim=-2))
    parts = (again(_chunk_take, query, k, p, log_sum, v) for k, p, v in zip(keys, pairs, values, strict=True))
    return functools.reduce(torch.add, parts)


def _fused_can_run(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tells whether PyTorch's fused attention on the CPU can do it; its logarithms of sums have no gradient."""
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return query.device.type == "cpu" and not needed and not tiling.is_traced()


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Tensor:
    """Dense grouping as three passes of fused attention, which hold no part of the M x N matrix.

    With r_m the logarithm of what group m's exponentials sum to and c_n that of token n's column of A, the result is
    ``sum over n of exp(s_mn - r_m - c_n) v_n``: attention with the bias -c_n, up to a factor per group.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    none = torch.zeros_like(key[..., 0])
    tokens = torch.ones_like(none, dtype=torch.bool) if mask is None else mask[:, None].expand_as(none)
    rows = _attend(query, key, key, none, tokens)[1]  # r, [B, heads, M]
    groups = rows > nothing(dtype) / 2
    if group_mask is not None:
        groups = groups & group_mask[:, None]
    columns = _attend(key, query, query, rows, groups)[1]  # c, [B, heads, N]
    out, sums = _attend(query, key, value, columns, tokens & (columns > nothing(dtype) / 2))
    factor = torch.where(groups, sums - rows, nothing(dtype)).exp()
    return out * factor.unsqueeze(-1)


def _attend(query: Tensor, key: Tensor, value: Tensor, less: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Attends with logits ``less`` what is given per key; returns the logarithms of the exponentials' sums too.

    Args:
        query: ``[B, heads, M, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``.
        less: ``[B, heads, N]``.
        valid: Which keys are attended to, likewise.
    """
    width = query.shape[-1]
    # as one more channel: a mask of this shape is slower, and so are odd numbers of channels
    pad = -(width + 1) % 16
    bias = torch.where(valid, -less, nothing(less.dtype)).unsqueeze(-1)
    query = F.pad(torch.cat((query, torch.ones_like(query[..., :1])), dim=-1), (0, pad))
    key = F.pad(torch.cat((key, bias), dim=-1), (0, pad))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attend(query, key, F.pad(value, (0, pad + 1)), scale=1.0)
    return out[..., :width], sums


def _dense_pairs(mask: Tensor | None, group_mask: Tensor | None) -> Tensor | None:
    """Returns which token and group may interact, broadcastable to ``[B, 1, N, M]``."""
    parts = []
    if mask is not None:
        parts.append(mask[:, None, :, None])
    if group_mask is not None:
        parts.append(group_mask[:, None, None, :])
    return functools.reduce(torch.logical_and, parts) if parts else None


def _logits(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """Returns ``[..., N, M]``, at least in float32, with `nothing` where a pair is not allowed."""
    logits = key @ query.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if allowed is None else logits.masked_fill_(~allowed, nothing(logits.dtype))


def _log_sum(logits: Tensor) -> Tensor:
    """Logarithm of the sum of exponentials over the tokens, ``[..., 1, M]``; `nothing` stays about that."""
    peak = logits.detach().amax(dim=-2, keepdim=True)  # on which no result depends
    return peak + exp_beside_one(logits - peak).sum(dim=-2, keepdim=True).log()


def _shares(logits: Tensor, log_sum: Tensor) -> Tensor:
    """Returns each token's shares in the groups, Ah transposed: ``[..., N, M]``, sums of 1 over the groups.

    Ah = A / (sum of A over the groups) is the softmax of log A over the groups, so that a token that no group looks at
    is shared out as exactly as any, where upstream's eps would take its share. A token without an allowed group has
    shares too: its value has to be zero.
    """
    # above what stands for zero, so that a group without tokens is far below any other
    return (logits - log_sum.clamp(min=nothing(logits.dtype) / 2)).softmax(dim=-1)


def _take(logits: Tensor, log_sum: Tensor, value: Tensor) -> Tensor:
    return _shares(logits, log_sum).to(value.dtype).mT @ value  # [..., M, d]


def _chunk_log_sum(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    return _log_sum(_logits(query, key, allowed))


def _chunk_take(query: Tensor, key: Tensor, allowed: Tensor | None, log_sum: Tensor, value: Tensor) -> Tensor:
    return _take(_logits(query, key, allowed), log_sum, value)


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
    steps, cells = _check_local(query, key, value, stride, window, mask, group_mask)
    return LocalGrouping.create(key, value, steps, cells, mask, group_mask).take(query)


class Grouping(Protocol):
    """Tokens that groups can take from."""

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""


class DenseGrouping(NamedTuple):
    """The tokens of a dense grouping: the arguments of `grouping_attention`, on grids.

    Attributes:
        key: ``[B, *fine, heads, d]``.
        value: Same shape.
        mask: ``[B, *fine]``.
        group_mask: ``[B, *coarse]``.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    group_mask: Tensor | None

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        coarse = query.shape[1:-2]
        query, key, value = (x.flatten(1, -3).transpose(1, 2) for x in (query, self.key, self.value))
        mask, group_mask = (None if m is None else m.flatten(1) for m in (self.mask, self.group_mask))
        return grouping_attention(query, key, value, mask, group_mask).transpose(1, 2).unflatten(1, coarse)


class LocalGrouping(NamedTuple):
    """The tokens of a sparse grouping in tiles, each with all the groups in reach: the same for every iteration.

    Attributes:
        tiles: Tokens as queries, groups as keys.
        key: ``[tiles, B, heads, tokens, d]``.
        value: Same shape; zero for a token without an allowed group, and where an earlier tile has the token.
        allowed: Which token and group interact, broadcastable to ``[tiles, B, heads, tokens, groups]``.
        coarse: The groups' grid.
    """

    tiles: tiling.Tiles
    key: Tensor
    value: Tensor
    allowed: Tensor
    coarse: tuple[int, ...]

    @classmethod
    def create(
        cls,
        key: Tensor,
        value: Tensor,
        stride: tuple[int, ...],
        window: tuple[int, ...],
        mask: Tensor | None,
        group_mask: Tensor | None,
    ) -> "LocalGrouping":
        """Takes tokens apart into tiles; see `local_grouping_attention`."""
        fine, batch, heads = tuple(key.shape[1:-2]), key.shape[0], key.shape[-2]
        tiles = _tiles(fine, stride, window, batch, heads, key.device)
        allowed = tiles.allowed()[:, None, None]  # [tiles, 1, 1, tokens, groups]
        if tiles.repeated is not None:
            allowed = allowed & ~tiles.repeated[:, None, None, :, None]
        if mask is not None:
            key = torch.where(mask[..., None, None], key, 0.0)
            allowed = allowed & tiles.queries.take_mask(mask)[:, :, None, :, None]
        if group_mask is not None:
            allowed = allowed & tiles.keys.take_mask(group_mask)[:, :, None, None, :]
        keys, values = tiles.queries.take(key), tiles.queries.take(value)
        if not (mask is None and group_mask is None and tiles.repeated is None):
            values = torch.where(allowed.any(dim=-1, keepdim=True), values, 0.0)
        coarse = tuple(-(-n // s) for n, s in zip(fine, stride, strict=True))
        return cls(tiles, keys, values, allowed, coarse)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        logits, log_sum = self._logits(query)
        return self.tiles.keys.add(_take(logits, log_sum, self.value), self.coarse)

    def assign(self, query: Tensor) -> Assignment:
        """Returns the matrices behind `take`."""
        logits, log_sum = self._logits(query)
        shares = torch.where(self.allowed, _shares(logits, log_sum), 0.0)
        attention = torch.where(self.allowed, (logits - log_sum).exp(), 0.0)
        return Assignment(shares.mT, attention.mT, self.tiles, self.coarse)

    def _logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``[tiles, B, heads, tokens, groups]``, and the logarithm of their sum over all tokens."""
        logits = _logits(self.tiles.keys.take(query), self.key, self.allowed)
        sums = _log_sum(logits).squeeze(-2)  # over one tile's tokens
        return logits, self.tiles.keys.log_sum_exp(sums).unsqueeze(-2)


@tiling.per_geometry
def _tiles(
    fine: tuple[int, ...],
    stride: tuple[int, ...],
    window: tuple[int, ...],
    batch: int,
    heads: int,
    device: torch.device,
) -> tiling.Tiles:
    axes = [_axis_tiles(n, s, w // 2, device) for n, s, w in zip(fine, stride, window, strict=True)]
    return tiling.Tiles.create(axes, batch, heads)


def _axis_tiles(tokens: int, stride: int, reach: int, device: torch.device) -> tiling.AxisTiles:
    groups = -(-tokens // stride)
    count = -(-groups // max(2, 2 * reach))
    size = min(-(-groups // count) * stride, tokens)
    queries = tiling.query_tiles(tokens, size, device)
    inside = (tokens - size) % stride > 0  # the last tile, moved inwards, starts inside a cell
    halo = reach if len(queries) == 2 else 2 * reach  # windows at the border reach inwards only
    cell = queries.div(stride, rounding_mode="floor")
    keys = tiling.key_tiles(cell[:, 0] - reach, -(-size // stride) + inside + halo, groups)
    distance = keys[:, None, :] - cell[:, :, None]  # [T, b, w]
    return tiling.AxisTiles(queries, keys, distance.abs() <= reach, tokens, groups)


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
    group_mask: Tensor | None,
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
    check_mask(group_mask, query.shape[:-2], "group_mask")
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

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> "Grouping":
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
        coarse = grid.conv(self.kernel_size, self.stride, self.padding)
        center = field_center([grid])
        key, value = self._split_heads(self.kv(x), 2)
        key = self.temp.to(key.dtype) * self.rose(key, grid.positions(center, self.unit))
        groups = self.norm1(channels_last(self.strider(channels_first(x))))
        group_mask = None if mask is None else pool_mask(mask, self.stride)
        rotation = self.rose.rotation(coarse.positions(center, self.unit), key.dtype)
        grouping = self.prepare(key, value, mask, group_mask)
        for _ in range(self.iters):
            (query,) = self._split_heads(self.q(groups), 1)
            query = query if rotation is None else rotation(query)
            groups = groups + self.norm2(grouping.take(query).flatten(-2))
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

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> "Grouping":
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

    def prepare(self, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> "Grouping":
        """See the base class."""
        window = self._window(key.shape[1:-2])
        return LocalGrouping.create(key, value, self.stride, window, mask, group_mask)

    def _window(self, coarse: Sequence[int]) -> tuple[int, ...]:
        return integers(self.neighborhood_kernel, "neighborhood_kernel", len(coarse))
