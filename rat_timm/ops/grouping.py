"""Grouping: tokens share themselves out among groups, which take their values.

Ah = A / (sum of A over the groups) is the softmax of log A over the groups, and A that of the logits over the tokens:
two softmaxes along the two sides of one matrix. Dense grouping, in which every group takes from every token, holds no
more than a part of it at a time. In local (sparse) grouping groups take from the tokens around them: each tile holds
tokens that no other has, and all the groups that these reach. Shares are complete inside a tile, and what overlaps
between tiles, the groups, is little.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..geometry import plans
from ..geometry.grid import exact_dtype, integers
from ..geometry.read import is_traced
from .assignment import Assignment
from .masking import check_mask
from .tiling import AxisTiles
from .windows import Overlaps, Tiles, has_gradient, is_plain

MASK_VALUE = torch.finfo(torch.float32).min / 4
"""The logarithm that stands for zero: finite, so that no difference of two of them is NaN."""

_CHUNK_ELEMENTS = 1 << 22  # logits that dense grouping holds at a time
_FEW = 1 << 14  # pairs of a token and a group up to which one tile, most of whose pairs are left out, is faster


def grouping_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    group_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Dense grouping: every group takes from every token, each token shares itself out among the groups.

    Where the M x N matrix does not fit one chunk, it is made in chunks of tokens, twice: first for what each group's
    attention sums to, then for the tokens' shares; and again in the backward pass. Without gradients PyTorch's fused
    attention on the CPU holds still less of it.

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
    return _take_dense(query, key, value, mask, group_mask, chunk_size)


def _take_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    group_mask: Tensor | None,
    chunk_size: int | None = None,
    near: Tensor | None = None,
) -> Tensor:
    """Does `grouping_attention`; with ``near`` ``[1, 1, N, M]`` a token and a group interact only where it is True."""
    allowed = None
    if mask is not None or group_mask is not None:
        allowed = _dense_pairs(mask, group_mask, near)
        value = torch.where(allowed.any(dim=-1, keepdim=True), value, 0.0)
    elif near is not None:
        allowed = near
    if mask is not None:
        key = torch.where(mask[:, None, :, None], key, 0.0)
    chunk_size = chunk_size or _chunk_size(query)
    if chunk_size >= key.shape[2]:
        attention = logits_of(query, key, allowed).log_softmax(dim=-2)  # log A transposed
        if allowed is not None:
            attention = attention.masked_fill(~allowed, MASK_VALUE)
        return attention.softmax(dim=-1).to(value.dtype).mT @ value
    if near is None and _fused_can_run(query, key, value):
        lower = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if lower else value.dtype  # as of the products below
        return _fused(query, key, value, mask, group_mask).to(dtype)
    keys, values = key.split(chunk_size, dim=2), value.split(chunk_size, dim=2)
    pairs = [None] * len(keys) if allowed is None else allowed.expand(-1, -1, key.shape[2], -1).split(chunk_size, dim=2)
    again = functools.partial(checkpoint, use_reentrant=False)
    sums = [again(_chunk_log_sum, query, k, p) for k, p in zip(keys, pairs, strict=True)]
    log_sum = log_sum_exp(torch.cat(sums, dim=-2), -2, keepdim=True)
    parts = (again(_chunk_take, query, k, p, log_sum, v) for k, p, v in zip(keys, pairs, values, strict=True))
    return functools.reduce(torch.add, parts)


def _chunk_size(query: Tensor) -> int:
    """Returns the number of tokens whose logits fill a chunk."""
    sizes = query.shape[1:3] if torch.compiler.is_exporting() else query.shape[:3]  # any batch is to fit
    return max(1, _CHUNK_ELEMENTS // max(1, math.prod(sizes)))


def _fused_can_run(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tells whether PyTorch's fused attention on the CPU can do it; its logarithms of sums have no gradient."""
    return query.device.type == "cpu" and not has_gradient(query, key, value) and not is_traced()


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> Tensor:
    """Dense grouping as three passes of fused attention, which hold no part of the M x N matrix.

    With r_m the logarithm of what group m's exponentials sum to and c_n that of token n's column of A, the result is
    ``sum over n of exp(s_mn - r_m - c_n) v_n``: attention with the bias -c_n, up to a factor per group.
    """
    dtype = exact_dtype(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if group_mask is not None:
        query = torch.where(group_mask[:, None, :, None], query, 0.0)
    none = torch.zeros_like(key[..., 0])
    tokens = torch.ones_like(none, dtype=torch.bool) if mask is None else mask[:, None].expand_as(none)
    rows = _attend(query, key, key, none, tokens)[1]  # r, [B, heads, M]
    groups = rows > MASK_VALUE / 2
    if group_mask is not None:
        groups = groups & group_mask[:, None]
    columns = _attend(key, query, query, rows, groups)[1]  # c, [B, heads, N]
    out, sums = _attend(query, key, value, columns, tokens & (columns > MASK_VALUE / 2))
    factor = torch.where(groups, sums - rows, MASK_VALUE).exp()
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
    bias = torch.where(valid, -less, MASK_VALUE).unsqueeze(-1)
    query = F.pad(torch.cat((query, torch.ones_like(query[..., :1])), dim=-1), (0, pad))
    key = F.pad(torch.cat((key, bias), dim=-1), (0, pad))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, sums = attend(query, key, F.pad(value, (0, pad + 1)), scale=1.0)
    return out[..., :width], sums


def _dense_pairs(mask: Tensor | None, group_mask: Tensor | None, near: Tensor | None) -> Tensor:
    """Returns which token and group may interact, broadcastable to ``[B, 1, N, M]``."""
    parts = [] if near is None else [near]
    if mask is not None:
        parts.append(mask[:, None, :, None])
    if group_mask is not None:
        parts.append(group_mask[:, None, None, :])
    return functools.reduce(torch.logical_and, parts)


def log_sum_exp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Logarithm of the sum of exponentials along a dimension; of many `MASK_VALUE` it is about that."""
    peak = x.detach().amax(dim, keepdim=True)  # on which no result depends
    # PyTorch's exponential takes ten times as long on the CPU where its result is subnormal or zero. Beside the peak's
    # one, results do not show that are lifted to about 1e-37
    least = math.log(torch.finfo(x.dtype).tiny) + 1
    total = peak + (x - peak).clamp_(min=least).exp_().sum(dim, keepdim=True).log()
    return total if keepdim else total.squeeze(dim)


def logits_of(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """Returns ``[..., N, M]``, at least in float32, with `MASK_VALUE` where a pair is not allowed."""
    logits = key @ query.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if allowed is None else logits.masked_fill_(~allowed, MASK_VALUE)


def shares_of(logits: Tensor, log_sum: Tensor) -> Tensor:
    """Returns each token's shares in the groups, Ah transposed: ``[..., N, M]``, sums of 1 over the groups.

    Ah = A / (sum of A over the groups) is the softmax of log A over the groups, so that a token that no group looks at
    is shared out as exactly as any, where upstream's eps would take its share. A token without an allowed group has
    shares too: its value has to be zero.
    """
    # above what stands for zero, so that a group without tokens is far below any other
    return (logits - log_sum.clamp(min=MASK_VALUE / 2)).softmax(dim=-1)


def _chunk_log_sum(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    return log_sum_exp(logits_of(query, key, allowed), -2, keepdim=True)


def _chunk_take(query: Tensor, key: Tensor, allowed: Tensor | None, log_sum: Tensor, value: Tensor) -> Tensor:
    return shares_of(logits_of(query, key, allowed), log_sum).to(value.dtype).mT @ value  # [..., M, d]


class DenseGrouping(NamedTuple):
    """The tokens of a dense grouping, the arguments of `grouping_attention`; or of a sparse one that is one tile.

    Attributes:
        key: ``[B, heads, N, d]``.
        value: Same shape.
        mask: ``[B, N]``.
        group_mask: ``[B, M]``.
        near: Which token and group interact, ``[1, 1, N, M]``; None if all do.
    """

    key: Tensor
    value: Tensor
    mask: Tensor | None
    group_mask: Tensor | None
    near: Tensor | None = None

    @classmethod
    def create(
        cls,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        group_mask: Tensor | None,
        near: Tensor | None = None,
    ) -> "DenseGrouping":
        """Takes tokens ``[B, *fine, heads, d]``; masks ``[B, *fine]`` and ``[B, *coarse]``."""
        mask = None if mask is None else mask.flatten(1)
        group_mask = None if group_mask is None else group_mask.flatten(1)
        return cls(key.flatten(1, -3).transpose(1, 2), value.flatten(1, -3).transpose(1, 2), mask, group_mask, near)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        groups = query.flatten(1, -3).transpose(1, 2)
        taken = _take_dense(groups, self.key, self.value, self.mask, self.group_mask, near=self.near)
        return taken.transpose(1, 2).unflatten(1, query.shape[1:-2])


def _check_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> None:
    same = key.shape == value.shape and query.ndim == key.ndim == 4
    if not same or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query must be [B, heads, M, d] and key, value [B, heads, N, d], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    check_mask(mask, (key.shape[0], key.shape[2]))
    check_mask(group_mask, (query.shape[0], query.shape[2]), "group_mask")


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
    tiles = local_tiles(key.shape[1:-2], steps, cells, key.device)
    return sparse_grouping(key, value, tiles, mask, group_mask).take(query)


def sparse_grouping(
    key: Tensor, value: Tensor, tiles: Tiles, mask: Tensor | None, group_mask: Tensor | None
) -> "DenseGrouping | LocalGrouping | ExportedGrouping":
    """Makes tokens ready for sparse grouping in `local_tiles`; see `local_grouping_attention`."""
    if tiles.queries.tiles == 1:  # tokens and groups as they lie
        return DenseGrouping.create(key, value, mask, group_mask, tiles.allowed().unsqueeze(1))
    grouping = LocalGrouping if tiles.once.order is not None else ExportedGrouping
    return grouping.create(key, value, tiles, mask, group_mask)


class LocalGrouping(NamedTuple):
    """The tokens of a sparse grouping in tiles, each with all the groups in reach: the same for every iteration.

    Attributes:
        tiles: Tokens as queries, groups as keys.
        overlaps: Where groups stand in several tiles.
        key: ``[tiles, B, heads, tokens, d]``.
        value: Same shape; zero for a token without an allowed group, and where an earlier tile has the token.
        allowed: Which token and group interact, broadcastable to ``[tiles, B, heads, tokens, groups]``.
    """

    tiles: Tiles
    overlaps: Overlaps
    key: Tensor
    value: Tensor
    allowed: Tensor

    @classmethod
    def create(
        cls,
        key: Tensor,
        value: Tensor,
        tiles: Tiles,
        mask: Tensor | None,
        group_mask: Tensor | None,
    ) -> "LocalGrouping":
        """Takes tokens apart into `local_tiles`; see `local_grouping_attention`."""
        allowed = tiles.allowed()[:, None, None]  # [tiles, 1, 1, tokens, groups]
        if tiles.repeated is not None:
            allowed = allowed & ~tiles.repeated[:, None, None, :, None]
        if mask is not None:
            key = torch.where(mask[..., None, None], key, 0.0)
            allowed = allowed & tiles.queries.take_mask(mask)[:, :, None, :, None]
        if group_mask is not None:
            allowed = allowed & tiles.keys.take_mask(group_mask)[:, :, None, None, :]
        keys, values = tiles.queries.take(key).contiguous(), tiles.queries.take(value).contiguous()
        if not (mask is None and group_mask is None and tiles.repeated is None):
            values = torch.where(allowed.any(dim=-1, keepdim=True), values, 0.0)
        assert tiles.overlaps is not None
        return cls(tiles, tiles.overlaps, keys, values, allowed)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        logits, log_sum = self._logits(query)
        taken = shares_of(logits, log_sum).to(self.value.dtype).mT @ self.value  # [tiles, B, heads, groups, d]
        return self.overlaps.add(taken) if is_plain(taken) else self.tiles.keys.add(taken)

    def assign(self, query: Tensor) -> Assignment:
        """Returns the matrices behind `take`."""
        logits, log_sum = self._logits(query)
        shares = torch.where(self.allowed, shares_of(logits, log_sum), 0.0)
        attention = torch.where(self.allowed, (logits - log_sum).exp(), 0.0)
        return Assignment(shares.mT, attention.mT, self.tiles, self.tiles.keys.shape)

    def _logits(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``[tiles, B, heads, tokens, groups]``, and the logarithm of their sum over all tokens."""
        logits = logits_of(self.tiles.keys.take(query), self.key, self.allowed)
        sums = log_sum_exp(logits, -2)  # over one tile's tokens
        per_tile = self.overlaps.take(sums.unsqueeze(-1), MASK_VALUE)  # [groups, tiles that have one, C]
        total = self.tiles.keys.rows.take(log_sum_exp(per_tile, 1))  # [tiles * groups, B * heads], over all tiles
        return logits, total.view(*sums.movedim(-1, 1).shape).movedim(1, -1).unsqueeze(-2)


class ExportedGrouping(NamedTuple):
    """`LocalGrouping` in few operations, for exports: converting a program takes time that grows with their number.

    Attributes:
        tiles: Tokens as queries, groups as keys.
        overlaps: Where groups stand in several tiles.
        key: ``[B * tiles, heads, tokens, d]``.
        value: Same shape; zero for a token without an allowed group, and where an earlier tile has the token.
        forbidden: Which token and group do not interact, ``[B * tiles, 1, tokens, groups]``.
    """

    tiles: Tiles
    overlaps: Overlaps
    key: Tensor
    value: Tensor
    forbidden: Tensor

    @classmethod
    def create(
        cls, key: Tensor, value: Tensor, tiles: Tiles, mask: Tensor | None, group_mask: Tensor | None
    ) -> "ExportedGrouping":
        """Takes tokens apart into `local_tiles`; see `local_grouping_attention`."""
        allowed = tiles.allowed()
        if tiles.repeated is not None:
            allowed = allowed & ~tiles.repeated[:, :, None]
        allowed = allowed.expand(key.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1)
        if mask is not None:
            key = torch.where(mask[..., None, None], key, 0.0)
            allowed = allowed & tiles.queries.take_in_program(mask[..., None, None])
        if group_mask is not None:
            allowed = allowed & tiles.keys.take_in_program(group_mask[..., None, None]).mT
        keys, values = tiles.queries.take_in_program(key), tiles.queries.take_in_program(value)
        if not (mask is None and group_mask is None and tiles.repeated is None):
            values = torch.where(allowed.any(dim=-1, keepdim=True), values, 0.0)
        assert tiles.overlaps is not None
        return cls(tiles, tiles.overlaps, keys, values, ~allowed)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        logits = self.key @ self.tiles.keys.take_in_program(query).mT
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        logits = logits.masked_fill(self.forbidden, MASK_VALUE)  # [B * tiles, heads, tokens, groups]
        sums = logits.logsumexp(-2).unsqueeze(-1)  # over one tile's tokens
        total = self.overlaps.take_in_export(sums, MASK_VALUE).logsumexp(2)  # [B, groups, heads], over all tiles
        shares = shares_of(logits, self.tiles.keys.take_in_program(total.unsqueeze(-1)).mT)
        shares = shares if shares.dtype == self.value.dtype else shares.to(self.value.dtype)
        taken = self.overlaps.take_in_export(shares.mT @ self.value, 0.0).sum(2)
        return taken.reshape(-1, *self.overlaps.shape, *self.value.shape[1::2])


def local_tiles(fine: Sequence[int], stride: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tiles:
    """Cuts a grid of tokens into tiles with the groups that these reach; see `rat_timm.geometry.plans`.

    Args:
        fine: The tokens' grid.
        stride: Size of a cell in tokens, per axis.
        window: Size of the window in cells, odd, per axis.
        device: Where tokens are.
    """
    return _tiles(tuple(map(operator.index, fine)), stride, window, device)


@torch.compiler.assume_constant_result
@plans.per_geometry
def _tiles(fine: tuple[int, ...], stride: tuple[int, ...], window: tuple[int, ...], device: torch.device) -> Tiles:
    coarse = [-(-n // s) for n, s in zip(fine, stride, strict=True)]
    is_small = math.prod(fine) * math.prod(coarse) <= _FEW
    axes = [_axis_tiles(n, s, w // 2, is_small) for n, s, w in zip(fine, stride, window, strict=True)]
    return Tiles.create(axes, device, with_overlaps=True)


def _axis_tiles(tokens: int, stride: int, reach: int, is_one: bool) -> AxisTiles:
    groups = -(-tokens // stride)
    count = 1 if is_one else -(-groups // max(2, 2 * reach))
    cell = np.arange(tokens) // stride
    first, last = np.maximum(cell - reach, 0), np.minimum(cell + reach, groups - 1)
    return AxisTiles.create(first, last, -(-groups // count) * stride)


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
