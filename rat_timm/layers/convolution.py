"""The convolution block: what is near a token, by a kernel in tokens, in place of attention (arXiv 2201.03545)."""

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from ..geometry.grid import fill
from .attention import slabs
from .grouping import CONVS, extent_and_padding
from .tracing import compiled_once


class ConvBlock(nn.Module):
    """A depthwise convolution, a norm and an MLP, added to the tokens: the block of ConvNeXt.

    Masked tokens are zero for the convolution, as what is beyond the border is.

    Args:
        dim: Width.
        kernel_size: Taps per axis, odd.
        dilation: Distance of the taps in tokens, per axis.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        proj_drop: Dropout in the MLP.
        drop_path: Stochastic depth rate.
        device: PyTorch's.
        dtype: PyTorch's.
        layer_scale: Factor per channel, when training starts, on what is added; None for no such factors.
        norm_eps: What the norm adds to variances.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: Sequence[int],
        dilation: Sequence[int],
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
        _, padding = extent_and_padding(kernel_size, dilation)
        self.conv = CONVS[len(kernel_size)](
            dim, dim, tuple(kernel_size), 1, padding, tuple(dilation), groups=dim, device=device, dtype=dtype
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.ls = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def feed_forward(self, x: Tensor) -> Tensor:
        """Returns what the block adds, of what the convolution made, ``[..., C]``."""
        return self.drop_path(self.ls(self.mlp(self.norm(x))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, *grid, C]`` -> the same; ``mask`` ``[B, *grid]``, True = valid: what is masked influences no other."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return _compiled_block(self, x, mask)
        return _run_block(self, x, mask)


def _run_block(block: ConvBlock, x: Tensor, mask: Tensor | None) -> Tensor:
    seen = x if mask is None else fill(x, mask)
    near = block.conv(seen.movedim(-1, 1)).movedim(1, -1)
    parts = slabs(x, block.mlp.fc1.out_features, block)
    if len(parts) == 1:
        return x + block.feed_forward(near)
    out = torch.empty_like(x)
    for part in parts:
        torch.add(part.of(x), block.feed_forward(part.of(near)), out=part.of(out))
    return out


_compiled_block = compiled_once(_run_block)
