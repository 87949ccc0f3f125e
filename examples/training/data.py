"""What `train.py` trains on: folders of images and volumes with their pixel size, and handwritten digits."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from rat_timm.data import Sample, read
from rat_timm.data.errors import ReadError, reading
from rat_timm.data.readers import is_readable
from training.config import BEGAN, Config, axes_of
from training.digits import digits, draw, poses, spacing_of
from training.processes import count, gather, on_first, rank

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # formats that do not say how large a pixel is
SIMILAR = (3, 5, 8, 9)  # the digits that are told apart


class Folder(DatasetFolder):
    """A folder per class, with files or folders of the formats that `rat_timm.data.read` knows, or pictures."""

    def __init__(self, root: Path, config: Config) -> None:
        self.config = config
        super().__init__(str(root), loader=self.load, is_valid_file=is_readable)

    @staticmethod
    def make_dataset(directory: str, class_to_idx: dict[str, int], *args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        """Lists what lies in the folders of the classes: an OME-Zarr image and a DICOM series are folders too."""
        found = []
        for name, index in class_to_idx.items():
            entries = sorted(path for path in Path(directory, name).iterdir() if not path.name.startswith("."))
            unknown = [path for path in entries if not (path.suffix.lower() in PICTURES or is_readable(path))]
            if unknown:
                raise ValueError(f"{unknown[0]}: is no image of a format that is read")
            found += [(str(path), index) for path in entries]
        return found

    def load(self, path: str) -> Sample:
        """Reads an image."""
        return load_image(path, self.config)

    def __getitem__(self, index: int) -> Sample:
        sample, target = super().__getitem__(index)
        return sample._replace(target=target)


class _Trial(Dataset):
    """Why each of a folder's files cannot be read; an empty string for those that can."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> str:
        try:
            self.folder[index]
        except ReadError as error:
            return str(error)
        return ""


def leave_out_unreadable(folders: Sequence[Folder], config: Config) -> None:
    """Leaves out what cannot be read, with a warning.

    What that is is decided once, before training begins, and kept in the output: a file that can be read again, or no
    longer, must not change which samples the steps have.
    """
    file = config.output / "unreadable.json"
    began = on_first(lambda: (config.output / BEGAN).exists())
    unreadable = on_first(lambda: _read_list(file)) if began else _try_all(folders, config.workers)
    if rank() == 0 and not began:
        file.write_text(json.dumps(unreadable, indent=2))
    if rank() == 0 and unreadable:
        warnings.warn("\n".join(["cannot be read and are left out:", *unreadable.values()]), stacklevel=2)
    for folder in folders:
        folder.samples = [sample for sample in folder.samples if sample[0] not in unreadable]


def _read_list(file: Path) -> dict[str, str]:
    with reading(file):
        return json.loads(file.read_text())


def _try_all(folders: Sequence[Folder], workers: int) -> dict[str, str]:
    """Reads all files, each in one of the processes; returns why some cannot be read."""
    failures = []
    for folder in folders:
        mine = range(rank(), len(folder), count())
        chance = torch.Generator()  # its own: weights are drawn after this
        reasons = DataLoader(_Trial(folder), None, sampler=mine, num_workers=workers, generator=chance)
        failures += [(folder.samples[index][0], reason) for index, reason in zip(mine, reasons, strict=True) if reason]
    return dict(sorted(failure for part in gather(failures) for failure in part))


def load_image(path: str, config: Config) -> Sample:
    """Reads an image with its pixel size."""
    if not path.lower().endswith(PICTURES):
        scan = read(path, config.unit, assumed_unit=config.assumed_unit)
        return Sample(scan.pixels, torch.tensor(scan.spacing))
    if config.spacing is None:
        raise ValueError(f"{path}: does not say how large a pixel is: give --spacing")
    with reading(path):
        picture = read_picture(path)
    return Sample(picture, torch.tensor(config.spacing, dtype=torch.float32))


def read_picture(path: str) -> Tensor:
    """Reads a picture in grey or in three colours, ``[channels, H, W]``."""
    picture = Image.open(path)
    if picture.mode.startswith("I"):  # 16 bits
        return torch.from_numpy(np.asarray(picture).astype(np.uint16))[None]
    return pil_to_tensor(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))


class SimilarDigits(Dataset):
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


def some(data: Dataset, most: int = 32) -> Dataset:
    """Returns up to so many samples, evenly chosen."""
    return Subset(data, np.linspace(0, len(data) - 1, min(most, len(data))).astype(int).tolist())


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Lets chance follow from numbers alone."""
    seed = np.random.SeedSequence(numbers).generate_state(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed[0]))
        yield


class Scaling:
    """Brings images to the numbers and channels that a model takes.

    Args:
        channels: The model's.
        mean: Of the channels, or of colours; with the intensity "data" in the images' own numbers.
        std: Likewise.
        intensity: See `Config`.
    """

    def __init__(self, channels: int, mean: Sequence[float], std: Sequence[float], intensity: str) -> None:
        self.channels, self.intensity = channels, intensity
        numbers = [torch.tensor(value) for value in (mean, std)]
        if len(mean) != channels:  # those of colours are no other channels'
            numbers = [value.mean().expand(channels) for value in numbers]
        self.mean, self.std = numbers

    def __call__(self, image: Tensor) -> Tensor:
        """Returns ``[channels, *grid]``."""
        if len(image) not in (1, self.channels):
            raise ValueError(f"images must have 1 channel or the model's {self.channels}, got {len(image)}")
        image = image.expand(self.channels, *image.shape[1:])
        if self.intensity == "sample":
            image = image.float()
            return (image - image.mean()) / image.std().clamp(min=1e-6)
        shape = (-1, *[1] * (image.ndim - 1))
        return (image.float() / self._one(image.dtype) - self.mean.view(shape)) / self.std.view(shape)

    def intensities(self, dtype: torch.dtype) -> tuple[float, float] | None:
        """Returns which values of a type become 0 and 1; None if channels or images differ in it."""
        if self.intensity == "sample" or len({*zip(self.mean.tolist(), self.std.tolist(), strict=True)}) > 1:
            return None
        low, step = (self._one(dtype) * float(values[0]) for values in (self.mean, self.std))
        return low, low + step

    def _one(self, dtype: torch.dtype) -> float:
        """Returns the pixel value that mean and deviation take for 1."""
        as_they_are = self.intensity == "data" or dtype.is_floating_point or dtype == torch.bool
        return 1.0 if as_they_are else float(torch.iinfo(dtype).max)


class Intensities:
    """Mean and deviation of pixels, image after image; of all channels together, since they are one scale."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0, 0.0]

    def add(self, image: Tensor) -> None:
        """Looks at an image."""
        values = image.double()
        for index, value in enumerate((values.numel(), values.sum(), values.square().sum())):
            self._sums[index] += float(value)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Returns them as `Scaling` takes them."""
        count, total, squares = self._sums
        mean = total / count
        return [mean], [max(squares / count - mean**2, 1e-12) ** 0.5]


def warn_of_signed(image: Tensor, config: Config) -> None:
    """Warns where pixels are signed integers, such as Hounsfield units, which a type's largest number makes tiny."""
    if config.intensity == "model" and image.dtype in (torch.int16, torch.int32, torch.int64) and rank() == 0:
        warnings.warn(
            f"pixels are {image.dtype}, and are divided by {torch.iinfo(image.dtype).max}: --intensity data scales "
            "them by what the training images have",
            stacklevel=2,
        )


class Augmented(Dataset):
    """Samples as a model takes them; chance follows from the seed, the epoch and the sample alone."""

    def __init__(self, data: Dataset, transform: Callable[[Sample], Sample], model: nn.Module, config: Config) -> None:
        self.data, self.transform, self.seed, self.epoch = data, transform, config.seed, 0
        mean, std = (model.pretrained_cfg[name] for name in ("mean", "std"))
        self.scaling = Scaling(model.in_chans, mean, std, config.intensity)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        sample = self.data[index]
        with seeded(self.seed, self.epoch, index):
            return self.transform(sample._replace(image=self.scaling(sample.image)))


def open_data(config: Config) -> tuple[Dataset, Dataset, list[str]]:
    """Returns the data to train on, those to validate on, and the names of the classes."""
    if config.data == "digits":
        training, validation = (SimilarDigits(axes_of(config), start) for start in (0, 1))
    else:
        folders = [Path(config.data) / part for part in ("train", "validation")]
        if not all(folder.is_dir() for folder in folders):
            raise ValueError(
                f"data: {config.data} must have the folders train and validation, each with a folder per class"
            )
        training, validation = (Folder(folder, config) for folder in folders)
        if training.classes != validation.classes:
            raise ValueError(f"data: train has the classes {training.classes}, validation {validation.classes}")
        if config.skip_unreadable:
            leave_out_unreadable([training, validation], config)
    classes = training.classes
    return (some(training), some(validation), classes) if config.quick else (training, validation, classes)
