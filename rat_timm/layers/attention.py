"""The transformer block: pre-norm, attention inside a neighbourhood or over all tokens of all levels."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ..geometry.grid import Positions
from ..ops.neighborhood import neighborhood_attention, neighborhood_plan
from ..ops.windows import Tiles, attend_in_tiles, masked_attention
from .rose import RotarySpatialEmbedding
from .tracing import compiled_once, split_heads_in_export


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

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None = None,
        tiles: Tiles | None = None,
        all_to_all: bool = False,
    ) -> Tensor:
        """Attends.

        Args:
            x: ``[B, *grid, C]``, or ``[B, N, C]`` without a neighbourhood.
            positions: Where the tokens are.
            mask: ``[B, *grid]`` or ``[B, N]``, bool, True = valid: others are not attended to.
            tiles: What `rat_timm.ops.neighborhood.neighborhood_plan` returned for the grid, so that it is not asked
                again; None: `neighborhood_attention` chooses what it runs on.
            all_to_all: Whether every token attends to every token in spite of a neighbourhood: ``x`` is a sequence.
        """
        qkv = self.qkv(x)
        rotation = self.rose.rotation(positions, qkv.dtype)
        if rotation is None or rotation.other is None:
            query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # [B, ..., heads, d]
        else:
            query, key, value = split_heads_in_export(qkv, 3, self.num_heads)
        if rotation is not None:
            query, key = rotation(query), rotation(key)
        dropout_p = self.attn_drop if self.training else 0.0
        if all_to_all or self.attn_kernel_size is None:
            allowed = None if mask is None else mask[:, None, None, :]
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, heads, N, d]
            out = masked_attention(query, key, value, allowed, dropout_p).transpose(1, 2)
        elif tiles is not None:
            out = attend_in_tiles(query, key, value, tiles, mask, dropout_p)
        else:
            out = neighborhood_attention(query, key, value, self.attn_kernel_size, mask, dropout_p)
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

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        mask: Tensor | None = None,
        tiles: Tiles | None = None,
        all_to_all: bool = False,
    ) -> Tensor:
        """See `Attention.forward`."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            kernel = self.attn.attn_kernel_size
            if tiles is None and kernel is not None and not all_to_all:
                tiles = neighborhood_plan(x.shape[1:-1], kernel, x.device)
            return _compiled_block(self, x, positions, mask, tiles, all_to_all)
        return _run_block(self, x, positions, mask, tiles, all_to_all)


def _run_block(
    block: Block, x: Tensor, positions: Positions, mask: Tensor | None, tiles: Tiles | None, all_to_all: bool
) -> Tensor:
    x = x + block.drop_path1(block.attn(block.norm1(x), positions, mask, tiles, all_to_all))
    return x + block.drop_path2(block.mlp(block.norm2(x)))


_compiled_block = compiled_once(_run_block)
