"""A step of training, and the loop over steps that all programs here have in common."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from rat_timm.data import Batch

Schedule = Callable[[int], None]  # sets the learning rates of a step, counted from 0
Output: TypeAlias = Tensor | dict[str, Tensor] | list[dict[str, Tensor]]


class Labelled(Protocol):
    """Samples with their classes."""

    @property
    def target(self) -> Tensor:
        """The classes, ``[B]``."""


B = TypeVar("B", bound=Labelled)


class Steps(Protocol[B]):
    """What takes a step: an engine of `engines`."""

    def step(self, batch: B) -> Tensor:
        """Trains on a batch; returns the loss."""


def with_geometry(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the logits of a model that is told the spacing and the mask."""
    return model(batch.image, spacing=batch.spacing, mask=batch.mask)


def image_alone(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the logits of a model that is told neither."""
    return model(batch.image)


def cross_entropy(logits: Tensor, batch: Labelled, label_smoothing: float = 0.1) -> Tensor:
    """Returns the cross entropy of classes."""
    return F.cross_entropy(logits, batch.target, label_smoothing=label_smoothing)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step is.

    Attributes:
        outputs: How a model is called on a batch: logits, or, as detectors do, dicts of tensors.
        loss: What is made of the outputs and the batch, and falls.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        ema_decay: Decay of the moving average of weights; 0 for none.
        precision: "fp32", or "bf16" or "fp16" by autocast.
    """

    outputs: Callable[[nn.Module, B], Output] = with_geometry
    loss: Callable[[Output, B], Tensor] = cross_entropy
    clip_grad: float = 1.0
    ema_decay: float = 0.0
    precision: str = "fp32"


def in_float(outputs: Output) -> Output:
    """Returns outputs of half precision in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_float(part) for name, part in outputs.items()}
    return [in_float(part) for part in outputs]


def fit(
    engine: Steps[B],
    batches: Iterable[B],
    before: Schedule,
    after: Callable[[int, Tensor], None] = lambda step, loss: None,
    start: int = 0,
) -> None:
    """Takes a step on each batch.

    Args:
        engine: Takes them.
        batches: Are drawn one by one, each right before its step.
        before: Is given the step's number before the step.
        after: Is given the step's number and loss after it.
        start: Number of the first step.
    """
    for step, batch in enumerate(batches, start):
        before(step)
        after(step, engine.step(batch))


def one_cycle(optimizer: Optimizer, lr: float | Sequence[float], steps: int, warmup: float) -> Schedule:
    """Returns PyTorch's one-cycle schedule, which rises to ``lr`` in a share ``warmup`` of the steps and falls then."""
    scheduler = OneCycleLR(optimizer, lr if isinstance(lr, float) else list(lr), steps, pct_start=warmup)

    def update(step: int) -> None:
        if step:  # the first step's are set
            scheduler.step()

    return update


@torch.inference_mode()
def answers(predict: Callable[[B], Tensor], batches: Iterable[B]) -> Tensor:
    """Returns which samples are told right, ``[N]``, bool."""
    return torch.cat([predict(batch).argmax(-1) == batch.target for batch in batches])
