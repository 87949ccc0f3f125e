"""What a trained model is evaluated under: pixel sizes that it was not trained at, or is told wrongly."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rat_timm.data import Sample
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.resample import resample
from training.config import Config, saved_config
from training.crops import Box, Scenes, at_pixel_size, collate_scenes, whole
from training.frames import open_frames
from training.tasks import Measured, task_class
from training.tasks.labelled import Labelled


@dataclasses.dataclass(frozen=True)
class Condition:
    """How an image is shown to a model.

    Attributes:
        factor: By which its pixels are larger than the file's.
        wrong: By which the pixel size that is told is wrong.
        resized: Whether images are brought to the training images' pixel size before the model gets them.
    """

    factor: float = 1.0
    wrong: float = 1.0
    resized: bool = False


def conditions(factors: Sequence[float], wrong: Sequence[float], resized: bool) -> list[Condition]:
    """Returns each factor with the right pixel size and each wrong one at the factor 1; with and without resizing."""
    for name, values in (("factors", factors), ("wrong", wrong)):
        if any(not 0 < value < float("inf") for value in values):
            raise ValueError(f"{name} must be positive numbers, got {list(values)}")
    told = [(factor, 1.0) for factor in factors] + [(1.0, value) for value in wrong]
    pairs = itertools.product(dict.fromkeys(told), (False, True) if resized else (False,))
    return [Condition(factor, value, control) for (factor, value), control in pairs]


def view(frame: Sample, condition: Condition, levels: Sequence[float], training: Sequence[float]) -> Scenes:
    """Returns what a model is given, which is asked for the pixels of the file.

    Args:
        frame: The file's image.
        condition: How it is shown.
        levels: Of the pyramid.
        training: Pixel size of the training images.
    """
    size = list(frame.image.shape[1:])
    image = at_pixel_size(frame._replace(target=None), Box([0] * len(size), size), condition.factor).sample
    image = image._replace(spacing=image.spacing * condition.wrong)
    if condition.resized:
        image = at_spacing(image, training)
    scenes = collate_scenes([whole(image, levels)])
    if list(image.image.shape[1:]) == size and condition.factor == 1:
        return scenes  # pixels are the file's
    return scenes._replace(out=Grid.create(size, (frame.spacing.double() * condition.wrong).tolist()))


def at_spacing(sample: Sample, spacing: Sequence[float]) -> Sample:
    """Brings an image without a target to a pixel size."""
    mask = None if sample.mask is None else sample.mask.expand(len(sample.image), *sample.image.shape[1:])
    grid = Grid.create(sample.image.shape[1:], sample.spacing.tolist())
    done = resample(Tokens(sample.image.unsqueeze(-1), grid, mask), spacing)
    valid = None if done.mask is None else done.mask[0]
    return Sample(done.x.squeeze(-1), torch.tensor(spacing, dtype=sample.spacing.dtype), valid)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A trained model on images.

    Attributes:
        trained: What train.py wrote.
        data: As in `Config`. Default: the training's.
        part: Of the data.
        conditions: Each is measured on every image.
        device: Where the model is.
        tile: As in `Config`. Default: the training's.
        spacing: As in `Config`. Default: the training's.
    """

    trained: Path
    data: str | None
    part: str
    conditions: tuple[Condition, ...]
    device: str = "cpu"
    tile: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None

    @functools.cached_property
    def config(self) -> Config:
        """The training's, but for the data."""
        config = saved_config(self.trained)
        if config.task in ("classification", "masked", "distillation"):
            raise ValueError(
                f"trained must be a model of labelled images, got one of {config.task} (rat_timm.evaluation is for "
                "classifiers)"
            )
        changed: dict[str, Any] = {"quick": False}
        for name in ("data", "tile", "spacing"):
            value = getattr(self, name)
            if value is not None:
                changed[name] = list(value) if isinstance(value, tuple) else value
        return dataclasses.replace(config, **changed)

    @functools.cached_property
    def frames(self) -> Any:
        """The images with their labels."""
        return open_frames(self.config, self.part)

    @functools.cached_property
    def loaded(self) -> tuple[Labelled, nn.Module]:
        """The task and the model."""
        task, model = task_class(self.config).load(self.config, self.trained / "model")
        return task, model.to(self.device)

    @torch.no_grad()
    def measure(self, index: int) -> list[Measured]:
        """Returns how good the model is on an image under each of the conditions."""
        frame = self._frame(index)
        native = collate_scenes([whole(frame, [1])])
        return [self.loaded[0].measure(self._predict(frame, each), native, 0) for each in self.conditions]

    @torch.no_grad()
    def picture(self, index: int, condition: Condition) -> np.ndarray:
        """Draws the prediction for an image."""
        frame = self._frame(index)
        drawn: Tensor = self.loaded[0].picture(self._predict(frame, condition), collate_scenes([whole(frame, [1])]), 0)
        return (255 * drawn.clamp(0, 1)).byte().movedim(0, -1).cpu().numpy()

    def _frame(self, index: int) -> Sample:
        frame = self.frames[index]
        return frame._replace(image=self.loaded[0].scaling(frame.image))

    def _predict(self, frame: Sample, condition: Condition) -> Any:
        task, model = self.loaded
        scenes = view(frame, condition, self.config.levels, task.facts.spacing)
        (prediction,) = task.predict(lambda batch: task.outputs(model, batch), scenes.to(self.device))
        if isinstance(prediction, Tensor):
            return prediction.cpu()
        return {name: part.cpu() for name, part in prediction.items()}
