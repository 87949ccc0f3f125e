"""Neighbourhood attention: every query attends to a window of exactly prod(kernel_size) keys around it.

NATTEN's definition (arXiv 2204.07143) and layout, in 1D, 2D and 3D. A backend is one file here and one line of the
table `BACKENDS`.
"""

import os
from collections.abc import Sequence

from torch import Tensor, compiler, device  # not torch itself: a module of this package has its name

from ...geometry.grid import integers
from ...geometry.plans import forget
from ..masking import check_mask
from ..windows import Tiles
from . import flex, natten
from . import torch as tiled
from .backend import Backend, Call, is_installed

BACKENDS: dict[str, Backend] = {
    "natten": natten.BACKEND,
    "torch": tiled.BACKEND,
    "flex": flex.BACKEND,
}
"""By name, in the order in which "auto" asks them."""

VARIABLE = "RAT_TIMM_ATTENTION"


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Attends from every place to the window of places around it, with scale ``head_dim ** -0.5``.

    At a border the window is moved inwards, so that every query sees the same number of keys; a kernel larger than the
    grid is clamped to it. What it runs on is chosen by `rat_timm.set_attention_backend`.

    Args:
        query: ``[B, *grid, heads, head_dim]``.
        key: Same shape.
        value: Same shape.
        kernel_size: Window, one number or one per axis.
        mask: ``[B, *grid]``, bool, True = valid key. Masked keys and values may hold anything, NaN included.
        dropout_p: Probability of dropping an attention weight.
        bias: What is added to the logits, for every relative position, ``[heads, *(2 * kernel - 1)]``: along each axis
            the key's place less the query's, from ``1 - kernel`` on, at the border too.

    Returns:
        ``[B, *grid, heads, head_dim]``; zero for a query whose window has no valid key.

    Raises:
        ValueError: If shapes, the kernel or the mask's dtype do not fit, or the chosen backend cannot run.
    """
    kernel = _check(query, key, value, kernel_size, mask)
    _check_bias(bias, query.shape[-2], kernel)
    call = Call(query, key, value, kernel, mask, dropout_p, bias)
    return _backend(call).attend(call)


def neighborhood_plan(
    grid: Sequence[int], kernel_size: Sequence[int], device: device, biased: bool = False
) -> Tiles | None:
    """Returns how PyTorch alone cuts a grid, for `rat_timm.ops.windows.attend_in_tiles`.

    Args:
        grid: Shape of the grid.
        kernel_size: Window per axis.
        device: Where queries are.
        biased: Whether there is a bias for every relative position.

    Returns:
        The tiles; None where another backend may be chosen for a call, which is then one of `neighborhood_attention`.
    """
    name = _chosen
    if name == "auto":
        name = next(n for n, backend in BACKENDS.items() if backend.is_best_on(device) and _is_there(backend))
    return tiled.make_plan(tuple(grid), tuple(kernel_size), device, biased) if name == "torch" else None


def padded_grid(grid: Sequence[int], kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of a grid that is filled up where it is smaller than a window."""
    return tuple([max(n, k) for n, k in zip(grid, kernel_size, strict=True)])


def _is_there(backend: Backend) -> bool:
    """Tells whether a backend can run at all; compilers look into no package."""
    return backend.package is None or (not compiler.is_compiling() and is_installed(backend.package))


def set_attention_backend(name: str) -> None:
    """Chooses what neighbourhood attention runs on, for the whole process.

    Args:
        name: "auto": NATTEN's kernels where they are built for the tensors' GPU and take the call, PyTorch elsewhere;
            "torch": tiles through PyTorch's fused attention, on every device; "natten": the package NATTEN; "flex":
            PyTorch's FlexAttention, compiled at the first call for each size. The environment variable
            ``RAT_TIMM_ATTENTION`` sets it before the package is imported. A call that the chosen one cannot run is an
            error that says why.

    Raises:
        ValueError: If there is no such backend.
    """
    global _chosen
    _chosen = _check_name(name, "name")
    forget()  # plans are of the other


def attention_backend() -> str:
    """Returns what `set_attention_backend` or the environment variable chose."""
    return _chosen


def _check_name(name: str, source: str) -> str:
    names = ("auto", *BACKENDS)
    if name not in names:
        raise ValueError(f"{source} must be one of {names}, got {name!r}")
    return name


def _backend(call: Call) -> Backend:
    if _chosen == "auto":
        asked = (backend for backend in BACKENDS.values() if backend.is_best_on(call.query.device))
        return next(backend for backend in asked if backend.obstacle(call) is None)
    backend = BACKENDS[_chosen]
    obstacle = backend.obstacle(call)
    if obstacle is not None:
        raise ValueError(
            f"attention backend {_chosen!r} cannot run here: {obstacle}; "
            f"choose another by rat_timm.set_attention_backend or the environment variable {VARIABLE}"
        )
    return backend


def _check(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], mask: Tensor | None
) -> tuple[int, ...]:
    if query.ndim < 4 or query.shape != key.shape or query.shape != value.shape:
        raise ValueError(
            "query, key and value must have one shape [B, *grid, heads, head_dim], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    axes = query.ndim - 3
    kernel = integers(kernel_size, "kernel_size", axes)
    check_mask(mask, query.shape[:-2])
    return kernel


def _check_bias(bias: Tensor | None, heads: int, kernel: Sequence[int]) -> None:
    shape = (heads, *(2 * k - 1 for k in kernel))
    if bias is not None and tuple(bias.shape) != shape:
        raise ValueError(f"bias must be {list(shape)}, heads and relative positions, got {list(bias.shape)}")


_chosen = _check_name(os.environ.get(VARIABLE, "auto"), VARIABLE)
