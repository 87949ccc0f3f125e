"""Classes of whole images and volumes."""

from collections.abc import Sequence
from pathlib import Path

import timm
from torch import Tensor, nn
from torch.utils.data import Dataset

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import hub
from rat_timm.data import Batch, collate, evaluation_transform, training_transform
from training.config import Config
from training.data import Augmented, open_data
from training.networks import check_weights
from training.steps import cross_entropy, with_geometry
from training.tasks.base import Call, Measured, SpacingRange


class Classification:
    """See `training.tasks.base.Task`."""

    score = "accuracy"
    at_once = None

    def __init__(self, config: Config) -> None:
        if config.intensity == "data":
            raise ValueError("intensity must be 'model' or 'sample' for classification, got 'data'")
        self.config, self.collate = config, collate
        self.training, self.validation, self.classes = open_data(config)

    def create_model(self) -> nn.Module:
        """See `Task`."""
        config = self.config
        check_weights(config)
        return timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=len(self.classes), **config.model_args
        )

    def samples(self, model: nn.Module) -> tuple[Dataset, Dataset]:
        """See `Task`."""
        config = self.config
        size = config.size or model.pretrained_cfg["input_size"][1:]
        transform = training_transform(size, config.scale, config.flip, config.factors, p=config.p_factors)
        return (
            Augmented(self.training, transform, model, config),
            Augmented(self.validation, evaluation_transform(size), model, config),
        )

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`."""
        return with_geometry(model, batch)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Task`."""
        return cross_entropy(outputs, batch, self.config.label_smoothing)

    def predict(self, call: Call, batch: Batch) -> list[Tensor]:
        """See `Task`."""
        return list(call(batch))

    def measure(self, prediction: Tensor, batch: Batch, index: int) -> Measured:
        """See `Task`."""
        right = float(prediction.argmax() == batch.target[index])
        return Measured({"accuracy": right}, right)

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        return {"accuracy": sum(one.evidence for one in measured) / len(measured)}

    def picture(self, prediction: Tensor, batch: Batch, index: int) -> None:
        """See `Task`."""

    def save(self, weights: dict[str, Tensor], folder: Path, spacing_range: SpacingRange) -> None:
        """See `Task`."""
        model = timm.create_model(self.config.model, num_classes=len(self.classes), **self.config.model_args)
        model.load_state_dict(weights)
        hub.save(model, folder, label_names=self.classes, spacing_range=spacing_range)
