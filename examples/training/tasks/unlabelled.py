"""What tasks on images without labels have in common: their data, and the backbone that is saved."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from rat_timm import hub
from rat_timm.data import Batch, Sample
from training.config import Config
from training.crops import Crops, Level, Scenes, collate_scenes
from training.data import Intensities, Scaling, seeded, warn_of_signed
from training.frames import Images, Kept, open_frames
from training.networks import mean_and_std, spread
from training.tasks.base import SpacingRange

SIZES = {2: [128, 128], 3: [16, 64, 64]}  # of crops


class Unlabelled:
    """See `training.tasks.base.Task`; validation is on crops too, the same ones every time.

    Args:
        config: What to train.
    """

    at_once = None
    description: str
    """What the model card says of how the backbone was trained."""

    def __init__(self, config: Config) -> None:
        self.config, self.collate = config, collate_scenes
        self.training, self.validation = (open_frames(config, part, folder=Images) for part in ("train", "validation"))
        first = self.training[0]
        warn_of_signed(first.image, config)
        self.channels = len(first.image)
        self.spacing = tuple(round(step, 6) for step in first.spacing.tolist())

    @property
    def axes(self) -> int:
        """Of the images."""
        return len(self.spacing)

    @property
    def size(self) -> list[int]:
        """Pixels of a crop."""
        return self.config.size or SIZES[self.axes]

    def network(self) -> Any:
        """Returns a new model, which has a ``backbone``."""
        raise NotImplementedError

    def targets(self, levels: Sequence[Level], with_labels: bool) -> list[Any]:
        """Returns what is to be learned, or hidden, of each level of a crop; chance is PyTorch's."""
        raise NotImplementedError

    def create_model(self) -> nn.Module:
        """See `Task`."""
        return self.network()

    def samples(self, model: nn.Module) -> tuple[Dataset, Dataset]:
        """See `Task`."""
        mean, std = mean_and_std(model)
        if self.config.intensity == "data":
            intensities = Intensities()
            for index in range(len(self.training)):
                intensities.add(self.training[index].image)
            mean, std = intensities.mean_and_std()
        scaling = Scaling(self.channels, mean, std, self.config.intensity)
        training, validation = (Kept(frames, scaling) for frames in (self.training, self.validation))
        if self.config.quick:
            training, validation = (Subset(kept, range(min(8, len(kept)))) for kept in (training, validation))
        return _Crops(training, self, False), _Crops(validation, self, True)

    def save(self, weights: dict[str, Tensor], folder: Path, spacing_range: SpacingRange) -> None:
        """See `Task`: the backbone alone is saved."""
        model = spread(self.network(), weights)
        hub.save(model.backbone, folder, spacing_range=spacing_range, description=self.description)


class _Crops(Dataset):
    """Random crops with what is to be learned of them, which follows from the seed, the epoch and the crop alone."""

    def __init__(self, frames: Dataset, task: Unlabelled, with_labels: bool) -> None:
        config = dataclasses.replace(task.config, foreground=0.0)
        self.crops = Crops(frames, task.size, lambda crop: crop.target, config)
        self.task, self.with_labels, self.epoch, self.seed = task, with_labels, 0, config.seed

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, index: int) -> list[Level]:
        self.crops.epoch = self.epoch
        levels = self.crops[index]
        with seeded(self.seed, self.epoch, index, 1):
            targets = self.task.targets(levels, self.with_labels)
        return [
            level._replace(sample=level.sample._replace(target=target))
            for level, target in zip(levels, targets, strict=True)
        ]


def sample_of(scenes: Scenes, index: int) -> Scenes:
    """Returns one sample of a batch as a batch."""
    here = slice(index, index + 1)
    levels = [Batch(*(None if part is None else part[here] for part in batch)) for batch in scenes.levels]
    return Scenes(levels, [origin[here] for origin in scenes.origins])


def images_told(scenes: Scenes) -> dict[str, Any]:
    """Returns images and what is said of them, as a model is called with them."""
    told = scenes.told()
    told.pop("out")
    return told


def labels_of(sample: Sample) -> Tensor:
    """Returns a crop's labels ``[*grid]``, int64; -1 where there are none."""
    if sample.target is None:
        return torch.full(sample.image.shape[1:], -1)
    return torch.as_tensor(sample.target).long()


def row(planes: Sequence[Tensor]) -> Tensor:
    """Puts pictures ``[H, W]`` or ``[3, H, W]`` between 0 and 1 side by side, ``[3, H, W]``."""
    return torch.cat([plane.expand(3, *plane.shape[-2:]) for plane in planes], dim=-1).clamp(0, 1)
