"""How compilers and tracers see the package: repeated parts as one program, parts that geometry steers as a whole."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

P = ParamSpec("P")
R = TypeVar("R")


def compiled_once(function: Callable[P, R]) -> Callable[P, R]:
    """Returns a function for `torch.compile`, which compiles it once for all calls with inputs of the same sizes.

    Modules, tensors, numbers and (named) tuples of them can be given to it. Constant tensors that it needs have to be
    given to it too. Exports want the function itself, and so do calls without a compiler.
    """
    mark = torch.compiler.nested_compile_region
    # by default more than 8 sizes, as a pyramid in four stages has, are an error
    has_limit = "max_reuse_entries" in inspect.signature(mark).parameters
    limit: dict[str, Any] = {"max_reuse_entries": 1 << 10} if has_limit else {}
    region: Callable[P, R] = mark(function, **limit)
    return region


def split_heads_in_export(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """``[B, ..., parts * heads * d]`` -> ``parts`` tensors ``[B, ..., heads, d]``.

    ONNX makes five operations of a part that is unbound, two of one that is selected.
    """
    split = x.reshape(-1, *x.shape[1:-1], parts, heads, x.shape[-1] // (parts * heads))
    return tuple([split.select(-3, part) for part in range(parts)])


def as_one_node(module: nn.Module, *args: Any) -> Proxy:
    """Makes a call of a module one node of a symbolically traced graph; for its ``forward``, called with proxies.

    Tracers step into modules that they do not know. timm's has a list of those to leave alone, torchvision's has none.

    Args:
        module: What is called.
        *args: What it is called with; the first is a proxy.
    """
    tracer: Any = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
