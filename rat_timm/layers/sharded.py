"""Modules whose parameters are sharded over processes, which have to pass through them equally often.

A batch of several pixel sizes is computed in parts, of which each process may have another number. Every pass gathers
parameters, in which all processes take part, so that one with fewer parts has to pass again, to no effect.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

P = TypeVar("P")
R = TypeVar("R")


def run_parts(module: nn.Module, run: Callable[[P], R], parts: Sequence[P], tie: Callable[[R, R], R]) -> list[R]:
    """Returns what ``run`` makes of each part, having passed as often as every other process does.

    Args:
        module: Whose parameters may be sharded (FSDP2, DeepSpeed's stage 3).
        run: Passes through the module.
        parts: At least one.
        tie: Returns the first of two results such that gradients pass through the second too, all of them zero.
    """
    most = _most(module, len(parts))  # before the first pass, where all processes meet
    done = [run(part) for part in parts]
    for _ in range(most - len(parts)):
        done[-1] = tie(done[-1], run(parts[-1]))
    return done


def tie(x: Tensor, other: Tensor) -> Tensor:
    """Returns ``x``, with a gradient to ``other`` that is zero."""
    return x + 0.0 * other.sum()


def _most(module: nn.Module, count: int) -> int:
    """Returns the largest ``count`` of all processes that share the parameters."""
    groups = _groups(module)
    if not groups:
        return count
    most = torch.tensor(count, device=next(module.parameters()).device)
    for group in groups:
        dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return int(most)


def _groups(module: nn.Module) -> list[dist.ProcessGroup | None]:
    """Returns the groups of processes over which parameters are sharded; none if they are not."""
    if not dist.is_available() or not dist.is_initialized() or torch.compiler.is_compiling():
        return []  # a compiled model has one part
    for parameter in module.parameters():
        if isinstance(parameter, DTensor):
            return list(parameter.device_mesh.get_all_groups())
        if hasattr(parameter, "ds_id"):  # DeepSpeed's stage 3
            return [None]
    return []
