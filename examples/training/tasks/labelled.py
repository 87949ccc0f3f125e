"""What tasks on labelled images have in common: their data, what is known of it, and prediction of whole images."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage.segmentation import mark_boundaries
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from rat_timm.data import Batch, Sample
from rat_timm.evaluation import sliding_window
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.sample import sample_at
from rat_timm.predict.facts import FACTS
from training.config import Config
from training.crops import Box, Crops, Level, Scenes, Wholes, collate_scenes, overview
from training.data import Intensities, Scaling, some, warn_of_signed
from training.frames import Kept, are_objects, open_frames, typical_length
from training.networks import create_network, load_network, mean_and_std, save_network, spread
from training.tasks.base import Call, Measured, SpacingRange

SIZES = {2: [128, 128], 3: [16, 64, 64]}  # of crops
OVERLAP = 0.25  # of neighbouring windows


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of labelled data once training images were looked at.

    Attributes:
        channels: Of the images.
        classes: Largest label and 1.
        spacing: Pixel size of the first image.
        length: See `Config`.
        tolerance: See `Config`.
        mean: See `Scaling`.
        std: See `Scaling`.
        spacing_range: Smallest and largest pixel size per axis in training and validation, once it is over.
        intensities: Pixel values of the first image's type that become 0 and 1, which `python -m rat_timm predict`
            takes; None where channels or images have their own.
        task: See `Config`.
    """

    channels: int
    classes: int
    spacing: tuple[float, ...]
    length: float
    tolerance: float
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    spacing_range: SpacingRange = None
    intensities: tuple[float, float] | None = None
    task: str | None = None


def look_at(frames: Dataset, config: Config) -> Facts:
    """Returns the facts of training images, all of which are read."""
    first = frames[0]
    warn_of_signed(first.image, config)
    lengths, largest, intensities = [], 0, Intensities()
    for index in range(len(frames)):
        sample = frames[index]
        if len(sample.image) != len(first.image) or sample.image.ndim != first.image.ndim:
            raise ValueError(
                f"data: images must have the same channels and axes, got {list(first.image.shape)} and "
                f"{list(sample.image.shape)}"
            )
        largest = max(largest, int(sample.target.max()))
        lengths += typical_length(sample.target, sample.spacing)
        if config.intensity == "data":
            intensities.add(sample.image)
    if not largest:
        raise ValueError("data: no training image has a label above 0")
    spacing = tuple(round(step, 6) for step in first.spacing.tolist())
    length = config.length or getattr(frames, "length", None) or float(np.median(lengths))
    mean, std = intensities.mean_and_std() if config.intensity == "data" else ((), ())
    tolerance = config.tolerance or 2 * max(spacing)
    return Facts(len(first.image), largest + 1, spacing, length, tolerance, mean, std, task=config.task)


class Labelled:
    """See `training.tasks.base.Task`; a task says what its targets, outputs and losses are.

    Args:
        config: What to train.
        facts: Of data that training had, where nothing is trained.
    """

    at_once = 1

    def __init__(self, config: Config, facts: Facts | None = None) -> None:
        self.config, self.collate = config, collate_scenes
        if facts is None:
            self.training, self.validation = (open_frames(config, part) for part in ("train", "validation"))
            if config.images is not None:
                self.training = some(self.training, config.images)
            facts = look_at(self.training, config)
        self.facts = facts

    @classmethod
    def load(cls, config: Config, folder: Path) -> tuple["Labelled", nn.Module]:
        """Returns the task and the model that `save` saved."""
        task = cls(config, Facts(**json.loads((folder / FACTS).read_text())))
        return task, task.load_model(folder)

    @property
    def axes(self) -> int:
        """Of the images."""
        return len(self.facts.spacing)

    @property
    def out_channels(self) -> int:
        """Of the network."""
        raise NotImplementedError

    def target(self, crop: Sample) -> Any:
        """Returns what is to be learned of a crop with its labels."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """Returns a new model."""
        return create_network(self.config, self.facts.channels, self.out_channels, self.facts.spacing)

    def create_model(self) -> nn.Module:
        """See `Task`."""
        model = self.network()
        if self.config.intensity != "data":
            mean, std = mean_and_std(model)
            self.facts = dataclasses.replace(self.facts, mean=list(mean), std=list(std))
        return model

    def load_model(self, folder: Path) -> nn.Module:
        """Loads a trained model."""
        return load_network(self.config, folder)

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """Saves a trained model."""
        save_network(model, folder)

    def samples(self, model: nn.Module) -> tuple[Dataset, Dataset]:
        """See `Task`."""
        size = self.config.size or SIZES[self.axes]
        training, validation = (Kept(frames, self.scaling) for frames in (self.training, self.validation))
        if self.config.quick:
            training, validation = (Subset(kept, range(min(8, len(kept)))) for kept in (training, validation))
        return Crops(training, size, self.target, self.config), Wholes(validation, self.config.levels)

    @property
    def scaling(self) -> Scaling:
        """What is done with the numbers of images."""
        return Scaling(self.facts.channels, self.facts.mean, self.facts.std, self.config.intensity)

    def outputs(self, model: nn.Module, batch: Scenes) -> Tensor:
        """See `Task`."""
        return model(**batch.told())

    def predict(self, call: Call, batch: Scenes) -> list[Any]:
        """See `Task`; the batch is of one scene."""
        tile = self.config.tile
        if tile is None or all(n <= most for n, most in zip(batch.levels[0].image.shape[2:], tile, strict=True)):
            return list(call(batch))
        return list(in_windows(call, batch, tile, self.config.levels))

    def save(self, weights: dict[str, Tensor], folder: Path, spacing_range: SpacingRange) -> None:
        """See `Task`."""
        model = spread(self.network(), weights)
        self.save_model(model, folder)
        intensities = self.scaling.intensities(self.training[0].image.dtype)
        facts = dataclasses.replace(self.facts, spacing_range=spacing_range, intensities=intensities)
        (folder / FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=2))

    def objects(self, labels: Tensor) -> Tensor:
        """Returns labels whose objects, in data where they are numbered, are all one class."""
        return labels.clamp(max=1) if are_objects(str(self.config.data)) else labels


def in_windows(call: Call, scenes: Scenes, tile: Sequence[int], levels: Sequence[float]) -> Tensor:
    """Predicts one image in overlapping windows, each with overviews of its own surroundings.

    Returns:
        ``[1, C, *size]`` on the image's pixels, or the places that are asked for.
    """
    first, origin = scenes.levels[0], scenes.origins[0]
    frame = Sample(first.image[0], first.spacing[0], None if first.mask is None else first.mask[0])
    size = frame.image.shape[1:]
    # where a window lies is written into channels of its own: MONAI hands on nothing else of it
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    image = torch.cat([first.image.double(), torch.stack(places)[None].to(first.image)], dim=1).double()

    def predict(windows: Tensor, spacing: Tensor, mask: Tensor | None) -> Tensor:
        starts = windows[:, -len(size) :].flatten(2)[..., 0].round().long()
        pyramids = []
        for start in starts.tolist():
            stop = [a + n for a, n in zip(start, windows.shape[2:], strict=True)]
            box = Box(start, stop)
            cut = Level(box.cut(frame), origin[0] + starts.new_tensor(start) * frame.spacing)
            pyramids.append([cut, *(overview(frame, box, level, 1) for level in levels[1:])])
        return call(collate_scenes(pyramids))

    logits = sliding_window(
        predict, image, tile, spacing=first.spacing, mask=first.mask, sw_batch_size=1, overlap=OVERLAP, mode="gaussian"
    ).float()
    if scenes.out is None:
        return logits
    grid = Grid.create(size, first.spacing, origin, 1, first.image.device)
    return sample_at(Tokens(logits.movedim(1, -1), grid, first.mask), scenes.out, reach=1.0).x.movedim(-1, 1)


def middle(batch: Batch, index: int, *maps: Tensor) -> list[np.ndarray]:
    """Returns the first channel of an image between 0 and 1, and maps ``[*grid]``; of volumes the middle plane."""
    image = batch.image[index, 0].float().cpu()
    low, high = torch.quantile(image.flatten()[:: max(1, image.numel() // 100_000)], torch.tensor([0.01, 0.998]))
    planes = [((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1), *(each.cpu() for each in maps)]
    return [plane[len(plane) // 2].numpy() if plane.ndim == 3 else plane.numpy() for plane in planes]


def outlines(batch: Batch, index: int, predicted: Tensor, true: Tensor) -> Tensor:
    """Draws the outlines of true labels in green and of predicted ones in red, ``[3, H, W]``."""
    image, predicted_plane, true_plane = middle(batch, index, predicted, true)
    drawn = mark_boundaries(image, true_plane.clip(0), color=(0, 0.9, 0), mode="inner")
    drawn = mark_boundaries(drawn, predicted_plane.clip(0), color=(1, 0.1, 0.1), mode="inner")
    return torch.from_numpy(drawn).movedim(-1, 0).float()


def mean_of(measured: Sequence[Measured], name: str) -> float:
    """Returns the mean of a figure over the samples that have it."""
    values = [one.values[name] for one in measured if not math.isnan(one.values[name])]
    return sum(values) / len(values) if values else math.nan
