"""The stem: overlapping convolutions that turn pixels into the first tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F

from ..geometry.types import MapOrMaps
from ..ops.masking import pool_mask
from .tracing import as_one_node

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Stem(nn.Module):
    """Convolutions with a norm after each and GELU between; a single convolution stands alone.

    Args:
        in_chans: Number of image channels.
        embed_dim: Width of the tokens; earlier convolutions have half of it.
        spatial_dims: Number of axes.
        kernel_size: Kernel size of each convolution, odd.
        stride: Total stride per axis, shared out among the convolutions from the first on.
        mask_token: Whether a learnable token stands at masked places, and is valid there.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If a kernel is even or the stride is more than the kernels can cover.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        spatial_dims: int = 2,
        kernel_size: Sequence[int] = (3, 3),
        stride: Sequence[int] = (4, 4),
        mask_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.strides = share_stride(stride, kernel_size)
        widths = [in_chans, *[embed_dim // 2] * (len(kernel_size) - 1), embed_dim]
        conv = _CONVS[spatial_dims]
        self.convs = nn.ModuleList(
            conv(a, b, kernel_size=k, stride=s, padding=k // 2, **dd)
            for a, b, k, s in zip(widths[:-1], widths[1:], kernel_size, self.strides, strict=True)
        )
        norms = widths[1:] if len(kernel_size) > 1 else []
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6, **dd) for width in norms)
        self.mask_token = nn.Parameter(torch.empty(embed_dim, **dd)) if mask_token else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: MapOrMaps, masks: Sequence[Tensor | None] | None = None) -> MapOrMaps:
        """Turns pixels into tokens.

        Args:
            x: Image ``[B, in_chans, *size]``, or a list of them.
            masks: ``[B, *size]``, True = valid, or None, for each image: what is masked influences nothing.

        Returns:
            ``[B, embed_dim, *ceil(size / stride)]``, or a list of them for a list.
        """
        if isinstance(x, Proxy):
            return as_one_node(self, x, masks)
        images = [x] if isinstance(x, Tensor) else x
        maps = [self._embed(*pair) for pair in zip(images, masks or [None] * len(images), strict=True)]
        return maps[0] if isinstance(x, Tensor) else maps

    def _embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for index, (conv, stride) in enumerate(zip(self.convs, self.strides, strict=True)):
            x = conv(x if mask is None else torch.where(mask.unsqueeze(1), x, 0.0)).movedim(1, -1)
            if self.norms:
                x = self.norms[index](x)
            if index < len(self.convs) - 1:
                x = F.gelu(x)
            x = x.movedim(-1, 1)
            mask = None if mask is None else pool_mask(mask, stride)
        if self.mask_token is None or mask is None:
            return x
        return torch.where(mask.unsqueeze(1), x, self.mask_token.view(-1, *[1] * (x.ndim - 2)))


def share_stride(stride: Sequence[int], kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits the total stride of each axis into one stride per convolution, none larger than its kernel allows."""
    if any(k < 1 or k % 2 == 0 for k in kernel_size):
        raise ValueError(f"stem_kernel_size must be odd, got {tuple(kernel_size)}")
    axes = []
    for total in stride:
        shares = _share_axis(total, kernel_size)
        if shares is None:
            raise ValueError(
                f"stem_stride {tuple(stride)} is not a product of {len(kernel_size)} strides "
                f"that kernels {tuple(kernel_size)} cover without gaps"
            )
        axes.append(shares)
    return list(zip(*axes, strict=True))


def _share_axis(total: int, kernel_size: Sequence[int]) -> tuple[int, ...] | None:
    if not kernel_size:
        return () if total == 1 else None
    for step in range(min(total, kernel_size[0]), 0, -1):
        if total % step == 0:
            rest = _share_axis(total // step, kernel_size[1:])
            if rest is not None:
                return step, *rest
    return None
