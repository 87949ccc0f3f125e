"""What depends on sizes alone is worked out once and kept: grids, positions, gather indices."""

import collections
import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .read import is_traced

_PLAN_BYTES = 1 << 28

P = ParamSpec("P")
R = TypeVar("R")


class _Kept:
    """What functions of geometry made, the last used at the end."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.plans: collections.OrderedDict[Hashable, tuple[Any, int]] = collections.OrderedDict()
        self.lock = threading.Lock()

    def find(self, key: Hashable, build: Callable[[], Any]) -> Any:
        with self.lock:
            if (kept := self.plans.get(key)) is not None:
                self.plans.move_to_end(key)
                return kept[0]
        plan = build()
        with self.lock:
            size = _bytes(plan)
            if key not in self.plans and size <= self.limit:
                self.plans[key] = plan, size
                self.size += size
                self.shrink()
        return plan

    def shrink(self) -> None:
        while self.size > self.limit:
            self.size -= self.plans.popitem(last=False)[1][1]


_kept = _Kept(_PLAN_BYTES)


def set_plan_limit(size: int) -> None:
    """Sets how many bytes of index plans are kept, 256 MiB by default; the least recently used go first.

    A plan that is larger is made anew at each call.

    Raises:
        ValueError: If ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    with _kept.lock:
        _kept.limit = size
        _kept.shrink()


def forget() -> None:
    """Drops all plans that are kept."""
    with _kept.lock:
        _kept.plans.clear()
        _kept.size = 0


def plan_bytes() -> int:
    """Returns how many bytes of index plans are kept."""
    return _kept.size


def keep(key: Hashable, build: Callable[[], R]) -> R:
    """Returns what ``build`` makes, or made when it was last asked for ``key``; tensors of a tracer are not kept."""
    if is_traced():
        return build()
    with torch.inference_mode(False):  # what is kept serves training too
        return _kept.find(key, build)


def per_geometry(build: Callable[P, R]) -> Callable[P, R]:
    """Keeps what a function of numbers, tuples and a device makes, but for tensors that belong to a tracer."""

    @functools.wraps(build)
    def find(*args: P.args, **kwargs: P.kwargs) -> R:
        return keep((build, args, tuple(sorted(kwargs.items()))), functools.partial(build, *args, **kwargs))

    return find


def _bytes(plan: Any) -> int:
    """Returns what the tensors of a plan take."""
    if isinstance(plan, Tensor):
        return plan.nbytes
    parts = plan if isinstance(plan, tuple) else getattr(plan, "__dict__", {}).values()
    return sum(map(_bytes, parts))
