"""Neighbourhood attention by the package NATTEN, whose CUDA kernels are the fastest there are."""

import functools
import warnings

import torch
from torch import Tensor

from . import backend
from .backend import Backend, Call


def _attend(call: Call) -> Tensor:
    import natten

    run = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(call.kernel)]
    size = tuple(min(k, length) for k, length in zip(call.kernel, call.grid, strict=True))
    return run(call.query, call.key, call.value, kernel_size=size)


def _obstacle(call: Call) -> str | None:
    on_gpu, width = call.query.is_cuda, call.query.shape[-1]
    reasons = [
        (not backend.is_installed("natten"), "natten is not installed: pip install 'rat-timm[natten]'"),
        (call.mask is not None, "it has no masks"),
        (call.bias is not None, "it has no bias per relative position"),
        (call.dropout_p > 0.0, "it has no dropout"),
        (torch.compiler.is_compiling(), "torch.compile cannot look into it"),
        (len(call.kernel) > 3, f"it takes up to 3 axes, not {len(call.kernel)}"),
        (
            min(*call.kernel, *call.grid) < 2,
            f"it needs windows and axes longer than 1, not {call.kernel} on {call.grid}",
        ),
        (on_gpu and call.query.dtype == torch.float64, "its kernels have no float64"),
        (on_gpu and width % 8 > 0, f"its kernels need head_dim divisible by 8, not {width}"),
    ]
    reason = next((reason for holds, reason in reasons if holds), None)
    if reason is None and on_gpu and not _has_kernels():
        return "natten is installed without its CUDA kernels (libnatten)"
    return reason


@functools.cache
def _has_kernels() -> bool:
    import natten

    if not natten.HAS_LIBNATTEN:
        warnings.warn(
            "natten is installed without its CUDA kernels (libnatten); neighbourhood attention does not use it",
            stacklevel=2,
        )
    return natten.HAS_LIBNATTEN


BACKEND = Backend(_attend, _obstacle, best_on=("cuda",), package="natten")
