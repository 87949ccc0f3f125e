"""Dense grouping: every group takes from every token.

Ah = A / (sum of A over the groups) is the softmax of log A over the groups, and A that of the logits over the tokens:
two softmaxes along the two sides of one matrix, of which no more than a part is held at a time.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..geometry import plans
from ..geometry.grid import exact_dtype
from .masking import check_mask, has_gradient, log_sum_exp, mask_value

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
    allowed = _dense_pairs(mask, group_mask)
    if mask is not None:
        key = torch.where(mask[:, None, :, None], key, 0.0)
    if allowed is not None:
        value = torch.where(allowed.any(dim=-1, keepdim=True), value, 0.0)
    chunk_size = chunk_size or _chunk_size(query)
    if chunk_size >= key.shape[2]:
        attention = logits_of(query, key, allowed).log_softmax(dim=-2)  # log A transposed
        if allowed is not None:
            attention = attention.masked_fill(~allowed, mask_value(attention.dtype))
        return attention.softmax(dim=-1).to(value.dtype).mT @ value
    if _fused_can_run(query, key, value):
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
    return query.device.type == "cpu" and not has_gradient(query, key, value) and not plans.is_traced()


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
    groups = rows > mask_value(dtype) / 2
    if group_mask is not None:
        groups = groups & group_mask[:, None]
    columns = _attend(key, query, query, rows, groups)[1]  # c, [B, heads, N]
    out, sums = _attend(query, key, value, columns, tokens & (columns > mask_value(dtype) / 2))
    factor = torch.where(groups, sums - rows, mask_value(dtype)).exp()
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
    bias = torch.where(valid, -less, mask_value(less.dtype)).unsqueeze(-1)
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


def logits_of(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    """Returns ``[..., N, M]``, at least in float32, with `mask_value` where a pair is not allowed."""
    logits = key @ query.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if allowed is None else logits.masked_fill_(~allowed, mask_value(logits.dtype))


def shares_of(logits: Tensor, log_sum: Tensor) -> Tensor:
    """Returns each token's shares in the groups, Ah transposed: ``[..., N, M]``, sums of 1 over the groups.

    Ah = A / (sum of A over the groups) is the softmax of log A over the groups, so that a token that no group looks at
    is shared out as exactly as any, where upstream's eps would take its share. A token without an allowed group has
    shares too: its value has to be zero.
    """
    # above what stands for zero, so that a group without tokens is far below any other
    return (logits - log_sum.clamp(min=mask_value(logits.dtype) / 2)).softmax(dim=-1)


def take_shares(logits: Tensor, log_sum: Tensor, value: Tensor) -> Tensor:
    """Takes values ``[..., N, d]`` into groups by the tokens' shares."""
    return shares_of(logits, log_sum).to(value.dtype).mT @ value  # [..., M, d]


def _chunk_log_sum(query: Tensor, key: Tensor, allowed: Tensor | None) -> Tensor:
    return log_sum_exp(logits_of(query, key, allowed), -2, keepdim=True)


def _chunk_take(query: Tensor, key: Tensor, allowed: Tensor | None, log_sum: Tensor, value: Tensor) -> Tensor:
    return take_shares(logits_of(query, key, allowed), log_sum, value)


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


def _check_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, group_mask: Tensor | None) -> None:
    same = key.shape == value.shape and query.ndim == key.ndim == 4
    if not same or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query must be [B, heads, M, d] and key, value [B, heads, N, d], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    check_mask(mask, (key.shape[0], key.shape[2]))
    check_mask(group_mask, (query.shape[0], query.shape[2]), "group_mask")
