"""Operations that honour a validity mask, True = valid, exactly: what is masked has no weight, not a small one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 1 << 20  # logits up to which PyTorch's fused attention takes longer on the CPU, forward and backward


def mask_value(dtype: torch.dtype) -> float:
    """Returns the logarithm that stands for zero: finite, so that no difference of two of them is NaN."""
    return torch.finfo(dtype).min / 4


def exp_clamped(x: Tensor) -> Tensor:
    """``x.exp()`` for ``x <= 0`` to be added to a one, beside which results do not show that are lifted to about 1e-37.

    PyTorch's exponential takes ten times as long on the CPU where its result is subnormal or zero.
    """
    return x.clamp(min=math.log(torch.finfo(x.dtype).tiny) + 1).exp_()


def log_sum_exp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Logarithm of the sum of exponentials along a dimension; of many `mask_value` it is about that."""
    if torch.compiler.is_exporting():
        return x.logsumexp(dim, keepdim)
    peak = x.detach().amax(dim, keepdim=True)  # on which no result depends
    total = peak + exp_clamped(x - peak).sum(dim, keepdim=True).log()
    return total if keepdim else total.squeeze(dim)


def has_gradient(*tensors: Tensor) -> bool:
    """Tells whether a result of these tensors will have a gradient."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: ``[B, heads, M, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``.
        bias: What is added to the logits, broadcastable to ``[B, heads, M, N]``.
        dropout_p: Probability of dropping an attention weight.
    """
    if dropout_p > 0.0 or not _explicit_is_best(query, key):
        # its default, which ONNX would work out of sizes
        scale = query.shape[-1] ** -0.5 if torch.compiler.is_exporting() else None
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    logits = logits if bias is None else logits + bias
    return logits.softmax(dim=-1) @ value


def _explicit_is_best(query: Tensor, key: Tensor) -> bool:
    """Tells whether to make the weights: few, on the CPU, for training, in a precision that products keep."""
    if query.device.type != "cpu" or not query.requires_grad or torch.compiler.is_compiling():
        return False
    exact = query.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return exact and query.shape[:3].numel() * key.shape[2] <= _FEW


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Scaled dot-product attention; a query without an allowed key gives zeros.

    Args:
        query: ``[B, heads, M, d]``.
        key: ``[B, heads, N, d]``.
        value: ``[B, heads, N, d]``; finite also where it is not allowed.
        allowed: Bool, broadcastable to ``[B, heads, M, N]``; None allows all.
        dropout_p: Probability of dropping an attention weight.
    """
    if allowed is None:
        return attention(query, key, value, dropout_p=dropout_p)
    reached = allowed.any(dim=-1, keepdim=True)  # [B, heads, M, 1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | ~reached, dropout_p=dropout_p)
    return torch.where(reached, out, 0.0)


def check_mask(mask: object, shape: Sequence[int], name: str = "mask") -> None:
    """Raises ``ValueError`` unless ``mask`` is None or a bool tensor of ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a bool tensor {list(shape)}, got {type(mask).__name__}")
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")


def pool_mask(mask: Tensor, stride: Sequence[int]) -> Tensor:
    """Returns the mask of the coarse grid: a cell is valid if any place under it is.

    Args:
        mask: ``[B, *grid]``, bool, True = valid.
        stride: Cell size per axis; the last cell of an axis may be cut off.
    """
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(stride)]
    size = tuple(stride)
    return pool(mask.float().unsqueeze(1), kernel_size=size, stride=size, ceil_mode=True).squeeze(1) > 0


def join_masks(masks: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> Tensor | None:
    """Joins the levels' masks into ``[B, N]``; None if no level has one."""
    if all(mask is None for mask in masks):
        return None
    device = next(mask.device for mask in masks if mask is not None)
    flat = [
        torch.ones(tuple(shape), dtype=torch.bool, device=device).flatten(1) if mask is None else mask.flatten(1)
        for mask, shape in zip(masks, shapes, strict=True)
    ]
    return torch.cat(flat, dim=1)
