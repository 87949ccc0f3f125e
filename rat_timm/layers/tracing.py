"""Symbolic tracing (``torch.fx``): what geometry steers is taken as a whole, by any tracer."""

from typing import Any

from torch import nn
from torch.fx import Proxy


def as_one_node(module: nn.Module, *args: Any) -> Proxy:
    """Makes a call of a module one node of a symbolically traced graph; for its ``forward``, called with proxies.

    Tracers step into modules that they do not know. timm's has a list of those to leave alone, torchvision's has none.

    Args:
        module: What is called.
        *args: What it is called with; the first is a proxy.
    """
    tracer: Any = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
