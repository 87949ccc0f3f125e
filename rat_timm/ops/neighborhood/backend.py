"""What a backend of neighbourhood attention is: the files beside this one have one each."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor, device


class Call(NamedTuple):
    """One call of neighbourhood attention, checked.

    Attributes:
        query: ``[B, *grid, heads, head_dim]``.
        key: Same shape; anything, NaN included, where masked.
        value: Likewise.
        kernel: Window per axis; may be larger than the grid.
        mask: ``[B, *grid]``, bool, True = valid key.
        dropout_p: Probability of dropping an attention weight.
        bias: What is added to the logits of every relative position, ``[heads, *(2 * kernel - 1)]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kernel: tuple[int, ...]
    mask: Tensor | None
    dropout_p: float
    bias: Tensor | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        """Sizes of the grid."""
        return tuple(self.query.shape[1:-2])


class Backend(NamedTuple):
    """An implementation of neighbourhood attention.

    Attributes:
        attend: Attends.
        obstacle: Says why it cannot run a call; None if it can.
        best_on: The types of device on which "auto" chooses it where it can run; None for all.
        package: What has to be installed for it.
    """

    attend: Callable[[Call], Tensor]
    obstacle: Callable[[Call], str | None]
    best_on: tuple[str, ...] | None
    package: str | None = None

    def is_best_on(self, device: device) -> bool:
        """Tells whether "auto" asks it for tensors on a device."""
        return self.best_on is None or device.type in self.best_on


# looked up at once: PyTorch 2.11 does not compile what searches for modules
_INSTALLED = {package: find_spec(package) is not None for package in ("natten", "triton")}


def is_installed(package: str) -> bool:
    """Tells whether "natten" or "triton" can be imported."""
    return _INSTALLED[package]
