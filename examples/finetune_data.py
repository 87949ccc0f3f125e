"""What `finetune.py` trains on: folders of images and volumes with their pixel size, and handwritten digits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pretrain_test_weights import digits, draw, poses, spacing_of
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from rat_timm.data import Sample, read
from rat_timm.data.readers import is_readable

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # formats that do not say how large a pixel is
SIMILAR = (3, 5, 8, 9)  # the digits that are told apart


class Settings(Protocol):
    """What is asked of `finetune.Config` here."""

    data: str
    model: str
    model_args: dict[str, Any]
    size: Sequence[int] | None
    spacing: Sequence[float] | None
    unit: str
    intensity: str
    seed: int
    quick: bool


class Folder(DatasetFolder):
    """A folder per class, with files of the formats that `rat_timm.data.read` knows, or pictures."""

    def __init__(self, root: Path, config: Settings) -> None:
        self.config = config
        super().__init__(str(root), loader=self.load, is_valid_file=self.is_valid)

    @staticmethod
    def is_valid(path: str) -> bool:
        """Tells whether a file is an image."""
        return path.lower().endswith(PICTURES) or is_readable(path)

    def load(self, path: str) -> Sample:
        """Reads a file."""
        if not path.lower().endswith(PICTURES):
            scan = read(path, self.config.unit)
            return Sample(scan.pixels, torch.tensor(scan.spacing))
        if self.config.spacing is None:
            raise ValueError(f"{path}: does not say how large a pixel is: give --spacing")
        return Sample(pil_to_tensor(Image.open(path)), torch.tensor(self.config.spacing))

    def __getitem__(self, index: int) -> Sample:
        sample, target = super().__getitem__(index)
        return sample._replace(target=target)


class Digits(Dataset):
    """Digits that are alike, of those that the shipped weights were not trained on: every other one, drawn large."""

    def __init__(self, axes: int, start: int) -> None:
        _, held_out = digits()
        chosen = torch.isin(held_out.labels, torch.tensor(SIMILAR)).nonzero()[start::2, 0]
        size = (16, 40, 40)[-axes:]
        pose = poses(len(chosen), axes, 0, 0, torch.Generator())
        self.images, self.spacing = draw(held_out.images[chosen], size, pose), torch.tensor(spacing_of(size))
        self.classes = [str(digit) for digit in SIMILAR]
        self.targets = [SIMILAR.index(int(label)) for label in held_out.labels[chosen]]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], self.spacing, None, self.targets[index])


def some(data: Dataset) -> Dataset:
    """Returns up to 32 samples, evenly chosen."""
    return Subset(data, np.linspace(0, len(data) - 1, min(32, len(data))).astype(int).tolist())


class Augmented(Dataset):
    """Samples as a model takes them; chance follows from the seed, the epoch and the sample alone."""

    def __init__(
        self, data: Dataset, transform: Callable[[Sample], Sample], model: nn.Module, config: Settings
    ) -> None:
        self.data, self.transform, self.epoch = data, transform, 0
        self.channels, self.seed, self.intensity = model.in_chans, config.seed, config.intensity
        self.mean, self.std = (torch.tensor(model.pretrained_cfg[name]) for name in ("mean", "std"))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        sample = self.data[index]
        seed = np.random.SeedSequence([self.seed, self.epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed[0]))
            return self.transform(sample._replace(image=self._scaled(sample.image)))

    def _scaled(self, image: Tensor) -> Tensor:
        if len(image) not in (1, self.channels):
            raise ValueError(f"images must have 1 channel or the model's {self.channels}, got {len(image)}")
        image = image.expand(self.channels, *image.shape[1:])
        if self.intensity == "sample":
            image = image.float()
            return (image - image.mean()) / image.std().clamp(min=1e-6)
        full = 1.0 if image.is_floating_point() else torch.iinfo(image.dtype).max
        shape = (-1, *[1] * (image.ndim - 1))
        return (image.float() / full - self.mean.view(shape)) / self.std.view(shape)


def open_data(config: Settings) -> tuple[Dataset, Dataset, list[str]]:
    """Returns the data to train on, those to validate on, and the names of the classes."""
    if config.data == "digits":
        axes = config.model_args.get("spatial_dims", 3 if config.model.endswith("_3d") else 2)
        training, validation = Digits(axes, 0), Digits(axes, 1)
    else:
        training, validation = (Folder(Path(config.data) / part, config) for part in ("train", "validation"))
        if training.classes != validation.classes:
            raise ValueError(f"data: train has the classes {training.classes}, validation {validation.classes}")
    classes = training.classes
    return (some(training), some(validation), classes) if config.quick else (training, validation, classes)
