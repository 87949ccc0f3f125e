"""What depends on sizes alone is worked out once and kept: grids, positions, gather indices."""

import collections
import functools
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .read import is_traced

_PLAN_BYTES = 1 << 28

P = ParamSpec("P")
R = TypeVar("R")


class Kept(NamedTuple):
    """A plan, and how many bytes its tensors take."""

    plan: Any
    size: int


KEPT: collections.OrderedDict[Hashable, Kept] = collections.OrderedDict()
"""What is kept, by key; what was asked of `keep` last stands at the end, and what stands in front is dropped first."""

_lock = threading.Lock()
_limit, _size = _PLAN_BYTES, 0


def set_plan_limit(size: int) -> None:
    """Sets how many bytes of plans are kept, 256 MiB by default; those that were asked for longest ago go first.

    A plan that is larger is made anew at each call.

    Raises:
        ValueError: If ``size`` is negative.
    """
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    global _limit
    with _lock:
        _limit = size
        _shrink()


def forget() -> None:
    """Drops all plans that are kept."""
    global _size
    with _lock:
        KEPT.clear()
        _size = 0


def plan_bytes() -> int:
    """Returns how many bytes of index plans are kept."""
    return _size


def keep(key: Hashable, build: Callable[[], R]) -> R:
    """Returns what ``build`` makes, or made when it was last asked for ``key``; tensors of a tracer are not kept."""
    if is_traced():
        return build()
    global _size
    with _lock:
        if (kept := KEPT.get(key)) is not None:
            KEPT.move_to_end(key)
            return kept.plan
    with torch.inference_mode(False):  # what is kept serves training too
        plan = build()
    with _lock:
        size = _bytes(plan)
        if key not in KEPT and size <= _limit:
            KEPT[key] = Kept(plan, size)
            _size += size
            _shrink()
    return plan


def _shrink() -> None:
    global _size
    while _size > _limit:
        _size -= KEPT.popitem(last=False)[1].size


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
