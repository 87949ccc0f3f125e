"""What a task is to the programs that train and evaluate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from training.steps import Output

SpacingRange = list[list[float]] | None
Call = Callable[[Any], Output]  # a model, called on a batch


class Measured(NamedTuple):
    """How good the prediction of a sample is.

    Attributes:
        values: Figures of the sample.
        evidence: What figures of many samples are made of.
    """

    values: dict[str, float]
    evidence: Any


class Task(Protocol):
    """Data, a model, and what is good.

    Attributes:
        score: The figure among those of `summarize` that tells how good a model is.
        at_once: Samples in a batch of validation. None: those of a step.
        collate: Makes a batch of samples.
    """

    score: str
    at_once: int | None
    collate: Callable[[Sequence[Any]], Any]

    def create_model(self) -> nn.Module:
        """Returns the model to be trained."""

    def samples(self, model: nn.Module) -> tuple[Dataset, Dataset]:
        """Returns what is trained on, which has an ``epoch`` to be set, and what is validated on."""

    def outputs(self, model: nn.Module, batch: Any) -> Output:
        """Calls the model."""

    def loss(self, outputs: Output, batch: Any) -> Tensor:
        """Returns what training makes smaller."""

    def predict(self, call: Call, batch: Any) -> list[Any]:
        """Returns a prediction for each sample of a batch, by calls of the model on it or on parts."""

    def measure(self, prediction: Any, batch: Any, index: int) -> Measured:
        """Compares the prediction for a sample with what a batch says of it."""

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """Returns the figures of many samples, in whatever order they are."""

    def picture(self, prediction: Any, batch: Any, index: int) -> Tensor | None:
        """Draws a prediction, ``[3, H, W]`` between 0 and 1, if there is something to draw."""

    def save(self, weights: dict[str, Tensor], folder: Path, spacing_range: SpacingRange) -> None:
        """Saves the trained model."""
