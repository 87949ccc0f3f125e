"""What a backend of neighbourhood attention is: the files beside this one have one each."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor

from ..windows import Tiles


class Call(NamedTuple):
    """One call of neighbourhood attention, checked.

    Attributes:
        query: ``[B, *grid, heads, head_dim]``.
        key: Same shape; zero where masked.
        value: Same shape; zero where masked.
        kernel: Window per axis; may be larger than the grid.
        mask: ``[B, *grid]``, bool, True = valid key.
        dropout_p: Probability of dropping an attention weight.
        plan: `Backend.plan` of the call's sizes, where the caller has it.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kernel: tuple[int, ...]
    mask: Tensor | None
    dropout_p: float
    plan: Tiles | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid."""
        return tuple(self.query.shape[1:-2])


class Backend(NamedTuple):
    """An implementation of neighbourhood attention.

    Attributes:
        attend: Attends.
        obstacle: Says why it cannot run a call; None if it can.
        is_best: Tells whether "auto" chooses it.
    """

    attend: Callable[[Call], Tensor]
    obstacle: Callable[[Call], str | None]
    is_best: Callable[[Call], bool]


# looked up at once: PyTorch 2.11 does not compile what searches for modules
_INSTALLED = {package: find_spec(package) is not None for package in ("natten", "triton")}


def is_installed(package: str) -> bool:
    """Tells whether "natten" or "triton" can be imported."""
    return _INSTALLED[package]
