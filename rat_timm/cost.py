"""What a model costs to run, counted without running it."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, x: Tensor | Sequence[Tensor]) -> int:
    """Counts the multiplications of matrix products and convolutions in a forward pass.

    Args:
        model: Any network, on any device.
        x: Its input, a tensor or a list of tensors. Nothing is computed with it.
    """
    shapes = copy.deepcopy(model).to("meta").requires_grad_(False)  # the counter asks for the gradients of views
    inputs = x.to("meta") if isinstance(x, Tensor) else [level.to("meta") for level in x]
    # fused attention is not counted on every device
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shapes(inputs)
    return counter.get_total_flops() // 2
