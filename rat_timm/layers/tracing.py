"""Symbolic tracing (``torch.fx``): what geometry steers is taken as a whole, by any tracer."""

import functools
from collections.abc import Callable
from typing import Any

from torch.fx import Proxy


def traced_as_whole(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a module one node of a symbolically traced graph; decorates its ``forward``.

    Tracers step into modules that they do not know. timm's has a list of those to leave alone, torchvision's has none.
    """

    @functools.wraps(forward)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        if proxy is None:
            return forward(module, *args, **kwargs)
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)

    return call
