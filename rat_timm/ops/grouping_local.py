"""Local (sparse) grouping: groups take from the tokens around them.

Each tile holds tokens that no other has, and all the groups that these reach: shares are complete inside a tile, and
what overlaps between tiles, the groups, is little.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry import plans
from ..geometry.grid import integers
from . import windows
from .assignment import Assignment
from .grouping_dense import logits_of, shares_of, take_shares
from .masking import check_mask, log_sum_exp, mask_value


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


class LocalGrouping(NamedTuple):
    """The tokens of a sparse grouping in tiles, each with all the groups in reach: the same for every iteration.

    Attributes:
        tiles: Tokens as queries, groups as keys.
        key: ``[tiles, B, heads, tokens, d]``.
        value: Same shape; zero for a token without an allowed group, and where an earlier tile has the token.
        allowed: Which token and group interact, broadcastable to ``[tiles, B, heads, tokens, groups]``.
    """

    tiles: windows.Tiles
    key: Tensor
    value: Tensor
    allowed: Tensor

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
        fine = tuple(map(operator.index, key.shape[1:-2]))
        tiles = _tiles(fine, stride, window, key.device)
        allowed = tiles.allowed()[:, None, None]  # [tiles, 1, 1, tokens, groups]
        if tiles.repeated is not None:
            allowed = allowed & ~tiles.repeated[:, None, None, :, None]
        if mask is not None:
            key = torch.where(mask[..., None, None], key, 0.0)
            allowed = allowed & tiles.queries.take_mask(mask)[:, :, None, :, None]
        if group_mask is not None:
            allowed = allowed & tiles.keys.take_mask(group_mask)[:, :, None, None, :]
        keys, values = (tiles.queries.take(x).contiguous() for x in (key, value))
        if not (mask is None and group_mask is None and tiles.repeated is None):
            values = torch.where(allowed.any(dim=-1, keepdim=True), values, 0.0)
        return cls(tiles, keys, values, allowed)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        logits, log_sum = self._logits(query)
        return self.tiles.add_keys(take_shares(logits, log_sum, self.value))

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
        return logits, self.tiles.log_sum_exp(sums).unsqueeze(-2)


class ExportedGrouping(NamedTuple):
    """`LocalGrouping` in few operations, for exports: converting a program takes time that grows with their number.

    Attributes:
        tiles: Tokens as queries, groups as keys.
        key: ``[B * tiles, heads, tokens, d]``.
        value: Same shape; zero for a token without an allowed group, and where an earlier tile has the token.
        forbidden: Which token and group do not interact, ``[B * tiles, 1, tokens, groups]``.
    """

    tiles: windows.Tiles
    key: Tensor
    value: Tensor
    forbidden: Tensor

    @classmethod
    def create(
        cls,
        key: Tensor,
        value: Tensor,
        stride: tuple[int, ...],
        window: tuple[int, ...],
        mask: Tensor | None,
        group_mask: Tensor | None,
    ) -> "ExportedGrouping":
        """Takes tokens apart into tiles; see `local_grouping_attention`."""
        tiles = _tiles(tuple(map(operator.index, key.shape[1:-2])), stride, window, key.device)
        allowed = tiles.allowed()
        if tiles.repeated is not None:
            allowed = allowed & ~tiles.repeated[:, :, None]
        allowed = allowed.expand(key.shape[0], -1, -1, -1).flatten(0, 1).unsqueeze(1)
        if mask is not None:
            key = torch.where(mask[..., None, None], key, 0.0)
            allowed = allowed & tiles.queries.take_in_program(mask[..., None, None])
        if group_mask is not None:
            allowed = allowed & tiles.keys.take_in_program(group_mask[..., None, None]).mT
        keys, values = (tiles.queries.take_in_program(x) for x in (key, value))
        if not (mask is None and group_mask is None and tiles.repeated is None):
            values = torch.where(allowed.any(dim=-1, keepdim=True), values, 0.0)
        return cls(tiles, keys, values, ~allowed)

    def take(self, query: Tensor) -> Tensor:
        """Takes values into groups ``[B, *coarse, heads, d]``."""
        logits = self.key @ self.tiles.keys.take_in_program(query).mT
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        logits = logits.masked_fill(self.forbidden, mask_value(logits.dtype))  # [B * tiles, heads, tokens, groups]
        log_sum = self.tiles.log_sum_exp_in_program(log_sum_exp(logits, -2)).unsqueeze(-2)
        shares = shares_of(logits, log_sum)
        shares = shares if shares.dtype == self.value.dtype else shares.to(self.value.dtype)
        return self.tiles.add_keys_in_program(shares.mT @ self.value)


@torch.compiler.assume_constant_result
@plans.per_geometry
def _tiles(
    fine: tuple[int, ...], stride: tuple[int, ...], window: tuple[int, ...], device: torch.device
) -> windows.Tiles:
    axes = [_axis_tiles(n, s, w // 2) for n, s, w in zip(fine, stride, window, strict=True)]
    return windows.Tiles.create(axes, device, with_overlaps=True)


def _axis_tiles(tokens: int, stride: int, reach: int) -> windows.AxisTiles:
    groups = -(-tokens // stride)
    count = -(-groups // max(2, 2 * reach))
    cell = np.arange(tokens) // stride
    first, last = np.maximum(cell - reach, 0), np.minimum(cell + reach, groups - 1)
    return windows.AxisTiles.create(first, last, -(-groups // count) * stride)


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
