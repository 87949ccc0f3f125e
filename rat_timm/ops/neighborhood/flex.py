"""Neighbourhood attention by PyTorch's FlexAttention, compiled at the first call for each size."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ...geometry.plans import per_geometry
from ..windows import has_gradient
from . import backend
from .backend import Backend, Call

_SIZES = 256  # programs that FlexAttention is compiled to, one per size; beyond that it would hold all pairs


def _attend(call: Call) -> Tensor:
    mask, is_near = call.mask, _is_near(call.grid, call.kernel)
    device = call.query.device
    if mask is None:
        block_mask = _block_mask(call.grid, call.kernel, device)
    else:
        valid, count = mask.flatten(1), math.prod(call.grid)
        block_mask = create_block_mask(
            lambda b, h, i, j: is_near(b, h, i, j) & valid[b, j], len(mask), None, count, count, device=str(device)
        )
    key, value = call.key, call.value
    if mask is not None:
        key, value = torch.where(mask[..., None, None], key, 0.0), torch.where(mask[..., None, None], value, 0.0)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (call.query, key, value))  # [B, heads, N, d]
    change = None if call.bias is None else _add(call.bias, call.grid)
    if torch.compiler.is_compiling():
        out: Any = flex_attention(q, k, v, change, block_mask)
    else:
        with torch._dynamo.config.patch(recompile_limit=_SIZES):
            out = _compiled_flex_attention()(q, k, v, change, block_mask)
    return out.transpose(1, 2).reshape(call.query.shape)


def _obstacle(call: Call) -> str | None:
    query = call.query
    has_grad = has_gradient(query, call.key, call.value, *([] if call.bias is None else [call.bias]))
    reasons = [
        (call.dropout_p > 0.0, "it has no dropout"),
        (query.device.type not in ("cpu", "cuda"), f"it does not run on {query.device.type}"),
        (not query.is_cuda and has_grad, "it has no gradient on the CPU"),
        (query.is_cuda and query.dtype == torch.float64, "its kernels have no float64"),
        (query.is_cuda and not backend.is_installed("triton"), "triton is not installed"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


@per_geometry
def _block_mask(grid: tuple[int, ...], kernel: tuple[int, ...], device: torch.device) -> BlockMask:
    count = math.prod(grid)
    return create_block_mask(_is_near(grid, kernel), None, None, count, count, device=str(device))


def _is_near(grid: tuple[int, ...], kernel: tuple[int, ...]) -> Callable[..., Tensor]:
    """Returns the function of sample, head, query and key that tells whether the key is in the query's window."""
    sizes = [min(k, length) for k, length in zip(kernel, grid, strict=True)]
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]

    def is_near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = []
        for length, size, stride in zip(grid, sizes, strides, strict=True):
            place = j // stride % length - (i // stride % length - size // 2).clamp(0, length - size)
            inside.append((place >= 0) & (place < size))
        return functools.reduce(torch.logical_and, inside)

    return is_near


def _add(bias: Tensor, grid: tuple[int, ...]) -> Callable[..., Tensor]:
    """Returns the function of logit, sample, head, query and key that adds the bias of their relative position."""
    steps = bias.shape[1:]
    strides = [math.prod(grid[axis + 1 :]) for axis in range(len(grid))]
    table = bias.flatten(1)

    def add(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        entry = torch.zeros_like(i)
        for length, size, stride in zip(grid, steps, strides, strict=True):
            # what is out of the window has no entry, and no weight
            step = (j // stride % length - i // stride % length + size // 2).clamp(0, size - 1)
            entry = entry * size + step
        return score + table[h, entry]

    return add


BACKEND = Backend(_attend, _obstacle, best_on=())
