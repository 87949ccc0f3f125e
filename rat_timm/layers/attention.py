"""The transformer block: pre-norm, attention inside a neighbourhood or over all tokens of all levels.

In inference what a token does alone is computed in slabs of a large grid. Of a million tokens each result of a norm, a
projection, a rotation or an MLP is hundreds of megabytes of fresh memory, which costs more time than the arithmetic; in
slabs, temporaries stay in the cache and results are written where they are wanted.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.grid import Positions
from ..ops.neighborhood import neighborhood_attention, neighborhood_plan, padded_grid
from ..ops.relative import pair_bias
from ..ops.windows import Tiles, attend_in_tiles, is_transformed, masked_attention
from .rose import RotarySpatialEmbedding
from .tracing import compiled_once, split_heads_in_export

_NUMBERS_CPU = 1 << 20  # of a temporary in a slab, per thread of a CPU
_NUMBERS = 1 << 26  # the same on other devices, where each launch costs time


class Slab(NamedTuple):
    """Some samples, or some rows of the first axis of one sample.

    Attributes:
        samples: Of the batch.
        rows: Of the first axis of the grid.
    """

    samples: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """Returns its part of ``[B, rows, ...]``."""
        return x[self.samples, self.rows]

    def positions(self, positions: Positions) -> Positions:
        """Returns where its tokens are."""
        return Positions(*(tuple(self._part(x) for x in part) for part in positions))

    def _part(self, x: Tensor) -> Tensor:
        x = x[self.samples] if x.shape[0] > 1 else x
        return x[:, self.rows] if x.shape[1] > 1 else x


def slabs(x: Tensor, width: int, module: nn.Module) -> list[Slab]:
    """Cuts a batch of grids; into one slab where it is small, or has to stay whole.

    It stays whole in training and in programs, and where hooks watch a part of the module, which expect all tokens at
    once.

    Args:
        x: ``[B, *grid, C]``.
        width: Numbers per token of the largest temporary.
        module: Runs on the slabs.
    """
    whole = [Slab(slice(None), slice(None))]
    if module.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return whole
    samples, rows = x.shape[:2]
    per_row = x.shape[2:-1].numel() * width
    limit = _NUMBERS_CPU * torch.get_num_threads() if x.device.type == "cpu" else _NUMBERS
    if samples * rows * per_row <= limit or _is_watched(module):
        return whole
    if rows * per_row <= limit:
        return [Slab(part, slice(None)) for part in _cut(samples, limit // (rows * per_row))]
    cuts = list(_cut(rows, max(1, limit // per_row)))
    return [Slab(slice(sample, sample + 1), part) for sample in range(samples) for part in cuts]


def _cut(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _is_watched(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Attention(nn.Module):
    """Multi-head self-attention with queries and keys rotated by position.

    Args:
        dim: Width.
        num_heads: Number of heads.
        rose: The rotary embedding, made for ``dim`` and ``num_heads``.
        kernel_size: Neighbourhood per axis for tokens on a grid; None: every token attends to every token.
        qkv_bias: Whether queries, keys and values have a bias.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout of the output.
        device: PyTorch's.
        dtype: PyTorch's.
        bias_kernel_size: Neighbourhood whose relative positions, counted in tokens, have a learnable bias each, for
            every head; where ``kernel_size`` is wider, it is interpolated between them. None for no bias.
        pad_windows: Whether a grid that is smaller than the neighbourhood is filled up with tokens of zeros behind its
            end, which take part; else the neighbourhood is cut to the grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rose: RotarySpatialEmbedding,
        kernel_size: Sequence[int] | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias_kernel_size: Sequence[int] | None = None,
        pad_windows: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_kernel_size = kernel_size  # not "kernel_size", which summaries take for a convolution's
        self.pad_windows = pad_windows and kernel_size is not None
        self.rpb = None
        if bias_kernel_size is not None:
            steps = [2 * k - 1 for k in bias_kernel_size]
            self.rpb = nn.Parameter(torch.empty(num_heads, *steps, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rose = rose
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None = None,
        tiles: Tiles | None = None,
        all_to_all: bool = False,
        entries: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: ``[B, *grid, C]``, or ``[B, N, C]`` without a neighbourhood.
            positions: Where the tokens are; with ``pad_windows`` those of `rat_timm.ops.neighborhood.padded_grid`.
            mask: ``[B, *grid]`` or ``[B, N]``, bool, True = valid: others are not attended to.
            tiles: What `plan` returned for the grid, so that it is not asked again; None: `neighborhood_attention`
                chooses what it runs on.
            all_to_all: Whether every token attends to every token in spite of a neighbourhood: ``x`` is a sequence.
            entries: Of such a sequence, the biases' entry of each pair, `rat_timm.ops.relative.pair_entries`.
        """
        size = x.shape[1:-1]
        if self.pad_windows and not all_to_all:
            x, mask = self._pad(x, mask)
        parts = slabs(x, 3 * x.shape[-1], self)
        heads = self._heads(x, positions) if len(parts) == 1 else self._heads_in_slabs(x, positions, parts)
        query, key, value = heads
        dropout_p = self.attn_drop if self.training else 0.0
        if all_to_all or self.attn_kernel_size is None:
            allowed = None if mask is None else mask[:, None, None, :]
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, N, d]
            bias = self._pair_bias(entries, query.dtype)
            out = masked_attention(query, key, value, allowed, dropout_p, bias).transpose(1, 2)
        elif tiles is not None:
            out = attend_in_tiles(query, key, value, tiles, mask, dropout_p, self._bias())
        else:
            out = neighborhood_attention(query, key, value, self.attn_kernel_size, mask, dropout_p, self._bias())
        if self.pad_windows and not all_to_all and out.shape[1:-2] != size:
            out = out[(slice(None), *map(slice, size))]
        out = out.flatten(-2)
        if len(parts) == 1:
            return self.proj_drop(self.proj(out))
        for part in parts:
            part.of(out).copy_(self.proj(part.of(out)))
        return out

    def _heads(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, ..., C]`` -> rotated queries and keys, and values, ``[B, ..., heads, d]``."""
        qkv = self.qkv(x)
        rotation = self.rose.rotation(positions, qkv.dtype)
        if rotation is None or rotation.other is None:
            query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        else:
            query, key, value = split_heads_in_export(qkv, 3, self.num_heads)
        return (query, key, value) if rotation is None else (rotation(query), rotation(key), value)

    def _heads_in_slabs(self, x: Tensor, positions: Positions, parts: Sequence[Slab]) -> tuple[Tensor, Tensor, Tensor]:
        """`_heads`, laid out in memory as gathers read it: ``[..., B, heads, d]``."""
        whole: list[Tensor] = []
        for part in parts:
            heads = self._heads(part.of(x), part.positions(positions))
            if not whole:
                shape = (*x.shape[1:-1], x.shape[0], *heads[0].shape[-2:])
                whole = [each.new_empty(shape).movedim(-3, 0) for each in heads]
            for each, piece in zip(whole, heads, strict=True):
                part.of(each).copy_(piece)
        query, key, value = whole
        return query, key, value

    def plan(self, grid: Sequence[int], device: torch.device) -> Tiles | None:
        """Returns how windows cut a grid; see `rat_timm.ops.neighborhood.neighborhood_plan`."""
        kernel = self.attn_kernel_size
        if kernel is None:
            return None
        grid = padded_grid(grid, kernel) if self.pad_windows else grid
        return neighborhood_plan(grid, kernel, device, self.rpb is not None)

    def _pad(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert self.attn_kernel_size is not None
        size = x.shape[1:-1]
        missing = [a - b for a, b in zip(padded_grid(size, self.attn_kernel_size), size, strict=True)]
        if not any(missing):
            return x, mask
        pads = [n for count in reversed(missing) for n in (0, count)]
        return F.pad(x, [0, 0, *pads]), None if mask is None else F.pad(mask, pads, value=True)

    def _pair_bias(self, entries: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        table = self._bias()
        return None if table is None or entries is None else pair_bias(table.to(dtype), entries)

    def _bias(self) -> Tensor | None:
        """Returns ``[heads, *(2 * kernel - 1)]``."""
        rpb, kernel = self.rpb, self.attn_kernel_size
        if rpb is None or kernel is None:
            return None
        steps = [2 * k - 1 for k in kernel]
        if list(rpb.shape[1:]) == steps:
            return rpb
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(steps)]
        return F.interpolate(rpb.unsqueeze(0), steps, mode=mode, align_corners=True).squeeze(0)

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"num_heads={self.num_heads}, kernel_size={self.attn_kernel_size}"


class Block(nn.Module):
    """Pre-norm transformer block; masked tokens pass through it and influence no other.

    Args:
        attn: The attention.
        dim: Width.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        proj_drop: Dropout in the MLP.
        drop_path: Stochastic depth rate.
        device: PyTorch's.
        dtype: PyTorch's.
        layer_scale: Factor per channel, when training starts, on what attention and MLP add; None for no such factors.
        norm_eps: What the norms add to variances.
    """

    def __init__(
        self,
        attn: Attention,
        dim: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, device=device, dtype=dtype)
            for _ in range(2)
        )

    def feed_forward(self, x: Tensor) -> Tensor:
        """Returns what the MLP adds to tokens ``[..., C]``."""
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None = None,
        tiles: Tiles | None = None,
        all_to_all: bool = False,
        entries: Tensor | None = None,
    ) -> Tensor:
        """See `Attention.forward`."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            if tiles is None and not all_to_all:
                tiles = self.attn.plan(x.shape[1:-1], x.device)
            return _compiled_block(self, x, positions, mask, tiles, all_to_all, entries)
        return _run_block(self, x, positions, mask, tiles, all_to_all, entries)


def _run_block(
    block: Block,
    x: Tensor,
    positions: Positions,
    mask: Tensor | None,
    tiles: Tiles | None,
    all_to_all: bool,
    entries: Tensor | None,
) -> Tensor:
    attended = block.drop_path1(block.ls1(block.attn(block.norm1(x), positions, mask, tiles, all_to_all, entries)))
    parts = slabs(x, block.mlp.fc1.out_features, block)
    if len(parts) == 1:
        x = x + attended
        return x + block.feed_forward(x)
    x = attended.add_(x) if attended.dtype == x.dtype else x + attended  # not the lower precision of autocast
    for part in parts:
        part.of(x).add_(block.feed_forward(part.of(x)))
    return x


_compiled_block = compiled_once(_run_block)
