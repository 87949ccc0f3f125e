"""Images with labels of their pixels: folders, real cells, and drawn discs."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rat_timm.data import Sample, read
from rat_timm.data.errors import reading
from rat_timm.data.readers import is_readable
from rat_timm.data.samples import IGNORED
from training.cells import MOVIES, Cells
from training.config import Config, axes_of
from training.data import PICTURES, load_image

PLAIN = (".tif", ".tiff")  # without OME's metadata
ENDINGS = (".ome.tif", ".ome.tiff", ".ome.zarr", ".nii.gz")  # of two parts
KEPT = 64  # images that a process keeps in memory
DISCS = {"train": 8, "validation": 4, "test": 4}


class FrameFolder(Dataset):
    """``images/*`` and ``labels/*`` of the same name, but for its ending.

    Args:
        root: The folder of both.
        config: Says what files do not.
    """

    def __init__(self, root: Path, config: Config) -> None:
        self.config = config
        images, labels = (_by_name(root / part) for part in ("images", "labels"))
        alone = sorted(images.keys() ^ labels.keys())
        if alone or not images:
            raise ValueError(f"{root}: must hold as many images as labels, of the same names, got {alone[:3]} alone")
        self.names = sorted(images)
        self.pairs = [(images[name], labels[name]) for name in self.names]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return _load_pair(*self.pairs[index], self.config)


class Images(Dataset):
    """``images/*``, or all that lies in the folder, and ``labels/*`` of the same name for those that have some.

    Args:
        root: The folder.
        config: Says what files do not.
    """

    def __init__(self, root: Path, config: Config) -> None:
        self.config = config
        inside = (root / "images").is_dir()
        images = _by_name(root / "images" if inside else root)
        labels = _by_name(root / "labels") if inside and (root / "labels").is_dir() else {}
        if not images or not labels.keys() <= images.keys():
            alone = sorted(labels.keys() - images.keys())
            raise ValueError(f"{root}: must hold images, and labels of the same names alone, got {alone[:3]}")
        self.names = sorted(images)
        self.pairs = [(images[name], labels.get(name)) for name in self.names]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        image, labels = self.pairs[index]
        if labels is None:
            return _load(image, self.config)
        return _load_pair(image, labels, self.config)


def _load_pair(image: Path, labels: Path, config: Config) -> Sample:
    sample, target = _load(image, config), _load_labels(labels, config)
    if target.shape != sample.image.shape[1:]:
        raise ValueError(
            f"{labels}: must have the image's {list(sample.image.shape[1:])} pixels, got {list(target.shape)}"
        )
    return sample._replace(target=target)


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {folder}")
    named = {}
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if not (path.suffix.lower() in PICTURES + PLAIN or is_readable(path)):
            raise ValueError(f"{path}: is no image of a format that is read")
        ending = next((end for end in ENDINGS if path.name.lower().endswith(end)), path.suffix)
        named[path.name[: len(path.name) - len(ending)]] = path
    return named


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() in PLAIN and not path.name.lower().endswith(ENDINGS)


def _load(path: Path, config: Config) -> Sample:
    if not _is_plain(path):
        return load_image(str(path), config)
    if config.spacing is None:
        raise ValueError(f"{path}: does not say how large a pixel is: give --spacing")
    with reading(path):
        pixels = tifffile.imread(path)
    if pixels.ndim == len(config.spacing):
        pixels = pixels[..., None]
    if pixels.ndim != len(config.spacing) + 1:
        raise ValueError(f"{path}: must have the {len(config.spacing)} axes of --spacing, got {pixels.shape}")
    return Sample(torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()), torch.tensor(config.spacing))


def _load_labels(path: Path, config: Config) -> Tensor:
    """Returns labels ``[*grid]``, int32."""
    if path.suffix.lower() in PICTURES:
        with reading(path):
            pixels = np.asarray(Image.open(path))
    elif _is_plain(path):
        with reading(path):
            pixels = tifffile.imread(path)
    else:
        pixels = read(path, config.unit, assumed_unit=config.assumed_unit).pixels.numpy()
        pixels = pixels[0] if len(pixels) == 1 else pixels
    labels = torch.from_numpy(pixels.astype(np.int32))
    if config.ignored is not None:
        labels[labels == config.ignored] = IGNORED
    return labels


class Discs(Dataset):
    """Discs, or balls, of a radius of 6 to 12 units on a noisy ground: their labels tell them apart.

    Args:
        part: "train", "validation" or "test".
        axes: 2 or 3.
    """

    length = 8.0

    def __init__(self, part: str, axes: int) -> None:
        self.spacing = (1.0, 1.0) if axes == 2 else (2.0, 1.0, 1.0)
        self.size = (96, 96) if axes == 2 else (16, 64, 64)
        self.seed = list(DISCS).index(part)
        self.names = [f"{part}-{index}" for index in range(DISCS[part])]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chance = np.random.default_rng([self.seed, index])
        places = np.stack(np.meshgrid(*(np.arange(n) + 0.5 for n in self.size), indexing="ij"), -1) * self.spacing
        labels = np.zeros(self.size, np.int32)
        image = chance.normal(0.25, 0.08, self.size)
        for number in range(1, 13):
            center = chance.uniform(0, 1, len(self.size)) * self.size * self.spacing
            inside = (np.linalg.norm(places - center, axis=-1) < chance.uniform(6, 12)) & (labels == 0)
            labels[inside] = number
            image[inside] += chance.uniform(0.3, 0.6)
        pixels = torch.from_numpy(image.astype(np.float32))[None]
        return Sample(pixels, torch.tensor(self.spacing), target=torch.from_numpy(labels))


class _NamedCells(Cells):
    """Frames of a movie, with names."""

    def __init__(self, name: str, part: str) -> None:
        super().__init__(name, part)
        self.names = [f"{part}-{index:02}" for index in range(len(self))]
        self.length = self.movie.scale


class Kept(Dataset):
    """Samples that were read and prepared once stay in memory, up to `KEPT`.

    Args:
        frames: Of samples.
        prepare: What is done with each image.
    """

    def __init__(self, frames: Dataset, prepare: Callable[[Tensor], Tensor] = lambda image: image) -> None:
        self.frames, self.prepare = frames, prepare
        self.kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Sample:
        if index not in self.kept:
            if len(self.kept) == KEPT:
                self.kept.pop(next(iter(self.kept)))
            sample = self.frames[index]
            self.kept[index] = sample._replace(image=self.prepare(sample.image))
        return self.kept[index]


def open_frames(
    config: Config, part: str, data: str | None = None, folder: Callable[[Path, Config], Dataset] = FrameFolder
) -> Dataset:
    """Returns whole images with their labels, ``Sample(..., target=labels [*grid])``, and their ``names``.

    Args:
        config: Whose data they are.
        part: "train", "validation" or "test".
        data: Other data than the config's.
        folder: What a folder is read as: `Images` where there need not be labels.
    """
    data = data or str(config.data)
    if data == "discs":
        return Discs(part, axes_of(config))
    return _NamedCells(data, part) if data in MOVIES else folder(Path(data) / part, config)


def are_objects(data: str) -> bool:
    """Tells whether labels of built-in data number objects; those of a folder are what the task wants."""
    return data == "discs" or data in MOVIES


def typical_length(labels: Tensor, spacing: Tensor) -> list[float]:
    """Returns half the side of a cube of each object's size, a length of the spacing's unit."""
    counts = torch.bincount(labels[labels > 0].flatten().long())
    pixel = math.prod(spacing.tolist())
    return [0.5 * (int(count) * pixel) ** (1 / len(spacing)) for count in counts if count]
