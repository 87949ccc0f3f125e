"""The transformer block: pre-norm, attention inside a neighbourhood or over all tokens of all levels."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ..geometry.grid import Positions
from ..ops.masking import masked_attention
from ..ops.neighborhood import neighborhood_attention, neighborhood_plan
from ..ops.windows import Tiles
from .rose import RotarySpatialEmbedding
from .tracing import compiled_once, split_heads


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
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_kernel_size = kernel_size  # not "kernel_size", which summaries take for a convolution's
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rose = rose
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def plan(self, x: Tensor) -> Tiles | None:
        """Returns what attention over the grid of ``x`` ``[B, *grid, C]`` needs that depends on sizes alone.

        For programs, where several modules are to share it; None elsewhere, where it is kept.
        """
        if self.attn_kernel_size is None or not torch.compiler.is_compiling():
            return None
        exported = x if torch.compiler.is_exporting() else None
        return neighborhood_plan(x.shape[1:-1], self.attn_kernel_size, x.device, exported)

    def forward(self, x: Tensor, positions: Positions, mask: Tensor | None = None, plan: Tiles | None = None) -> Tensor:
        """Attends.

        Args:
            x: ``[B, *grid, C]``, or ``[B, N, C]`` without a neighbourhood.
            positions: Where the tokens are.
            mask: ``[B, *grid]`` or ``[B, N]``, bool, True = valid: others are not attended to.
            plan: See `plan`; None makes or finds it.
        """
        query, key, value = split_heads(self.qkv(x), 3, self.num_heads)  # [B, ..., heads, d]
        rotation = self.rose.rotation(positions, query.dtype)
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        dropout_p = self.attn_drop if self.training else 0.0
        if self.attn_kernel_size is not None:
            out = neighborhood_attention(query, key, value, self.attn_kernel_size, mask, dropout_p, plan)
        else:
            allowed = None if mask is None else mask[:, None, None, :]
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [B, heads, N, d]
            out = masked_attention(query, key, value, allowed, dropout_p).transpose(1, 2)
        return self.proj_drop(self.proj(out.flatten(-2)))

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
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, positions: Positions, mask: Tensor | None = None, plan: Tiles | None = None) -> Tensor:
        """See `Attention.forward`."""
        return _run_block(self, x, positions, mask, self.attn.plan(x) if plan is None else plan)


@compiled_once
def _run_block(block: Block, x: Tensor, positions: Positions, mask: Tensor | None, plan: Tiles | None) -> Tensor:
    x = x + block.drop_path1(block.attn(block.norm1(x), positions, mask, plan))
    return x + block.drop_path2(block.mlp(block.norm2(x)))
