"""A network of images teaches a network of volumes by slices of an MR volume, against a linear map of pixels.

    python examples/distill_slices.py --output FOLDER

**Question.** The volume is the MR series that nibabel ships (24 slices of 96 x 128 pixels, 2.2 x 2 x 2 mm). A network
of images is pretrained by masked-image modelling on three quarters of the slices; a network of volumes learns its maps
of these slices. Of the other slices, which nobody was taught, does the student explain more of the variance of the
teacher's maps than ridge regression does from the 8 x 8 pixels of a place, in its slice and in those above and below?
R2 is over places and channels, about the channels' means. It is an answer if the student's is larger with each of
three seeds.

**Answer**: yes, if not by much. R2 of the student and of ridge regression: 0.703 and 0.659, 0.739 and 0.699, 0.754 and
0.665. Each seed takes two minutes of a core. One volume proves little.

Results are rows of FOLDER/slices.csv; seconds are those of one core.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from rat_timm.geometry.grid import Grid
from rat_timm.pretrain import Distiller, Lesson, MaskedImageModel, Teacher, hide_blocks, lessons, masked_loss
from studies.head import head
from studies.layouts import FORMER
from studies.results import carry_out

SMALL: dict[str, Any] = {"embed_dim": 32, "depths": [1, 1, 2, 1], "in_chans": 1}
EVERY = 4  # of so many slices
HELD_OUT = 2  # the one that is not taught
CROP = (12, 48, 64)
CELL = 8  # pixels of a place of the maps that are compared
COLUMNS = ["seed", "student", "ridge", "teacher_loss", "seconds"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A teacher and its student.

    Attributes:
        seed: Of both.
    """

    seed: int


def train(model: nn.Module, steps: int, lr: float, loss: Any) -> float:
    """Trains with AdamW; returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    values = []
    model.train()
    for _ in range(steps):
        value = loss(model)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        values.append(value.item())
    model.eval()
    return float(np.mean(values[-max(1, steps // 10) :]))


def taught_slices(volume: Tensor) -> Tensor:
    """Returns the slices that are not held out, ``[N, 1, y, x]``."""
    chosen = [z for z in range(volume.shape[2]) if z % EVERY != HELD_OUT]
    return volume[0, 0, chosen].unsqueeze(1)


def pretrained(volume: Tensor, spacing: tuple[float, ...], steps: int) -> tuple[nn.Module, float]:
    """Pretrains a network of images by masked-image modelling; returns it and its last loss."""
    slices, plane = taught_slices(volume), spacing[1:]
    model = MaskedImageModel("rat_tiny", stem_stride=2, spacing=plane, **FORMER, **SMALL)
    grid = Grid.create(CROP[1:], plane)

    def loss(model: nn.Module) -> Tensor:
        crops = torch.stack([crop(slices[int(torch.randint(len(slices), ()))], CROP[1:])[0] for _ in range(8)])
        hidden = hide_blocks(grid, 16.0, 0.6, len(crops))
        return masked_loss(model(crops, hidden, spacing=plane), crops, hidden, 16.0, spacing=plane).mean()

    reached = train(model, steps, 1e-3, loss)
    return model.backbone, reached


def crop(image: Tensor, size: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """Cuts a random box out of ``[C, *grid]``; returns it and its first place."""
    start = [int(torch.randint(n - s + 1, ())) for n, s in zip(image.shape[1:], size, strict=True)]
    return image[(slice(None), *(slice(a, a + s) for a, s in zip(start, size, strict=True)))], start


def lessons_of(teacher: Teacher, volume: Tensor, spacing: tuple[float, ...], rest: int) -> Lesson:
    """Returns the teacher's maps of every fourth slice."""
    z, *plane = spacing
    (lesson,) = lessons(
        teacher,
        volume[:, :, rest::EVERY],
        spacing=(z * EVERY, *plane),
        origin=(z * (rest + 0.5), *(step / 2 for step in plane)),
        slices=volume.shape[2],
    )
    return lesson


def distilled(
    volume: Tensor, spacing: tuple[float, ...], teacher: Teacher, steps: int
) -> tuple[Distiller, list[Lesson]]:
    """Trains a network of volumes on crops; returns it and what it was taught."""
    student = Distiller("rat_tiny_3d", teacher.num_features, stem_stride=(1, 2, 2), spacing=spacing, **SMALL)
    taught = [lessons_of(teacher, volume, spacing, rest) for rest in range(EVERY) if rest != HELD_OUT]

    def loss(student: nn.Module) -> Tensor:
        part, start = crop(volume[0], CROP)
        origin = tuple((a + 0.5) * step for a, step in zip(start, spacing, strict=True))
        said = student(part[None], spacing=spacing, origin=origin)
        return torch.stack([lesson.loss(said) for lesson in taught]).mean()

    train(student, steps, 1e-3, loss)
    return student, taught


def explained(said: np.ndarray, true: np.ndarray) -> float:
    """Returns R2 over places and channels of ``[N, C]``."""
    return float(1 - ((said - true) ** 2).sum() / ((true - true.mean(0)) ** 2).sum())


def pixels_of(volume: Tensor, rest: int) -> np.ndarray:
    """Returns the pixels of each place of every fourth slice, of the slices above and below too, ``[N, 3 * 64]``."""
    padded = nn.functional.pad(volume[0], (0, 0, 0, 0, 1, 1), mode="replicate")[0]
    around = torch.stack([padded[z : volume.shape[2] + z] for z in range(3)])[:, rest::EVERY]  # [3, slices, y, x]
    cells = around.unfold(2, CELL, CELL).unfold(3, CELL, CELL)  # [3, slices, y', x', 8, 8]
    return cells.permute(1, 2, 3, 0, 4, 5).flatten(0, 2).flatten(1).numpy()


@torch.no_grad()
def compare(student: Distiller, volume: Tensor, spacing: tuple[float, ...], lesson: Lesson) -> float:
    """Returns the R2 of a student's maps of slices."""
    own, true, valid = lesson.compare(student.eval()(volume, spacing=spacing))
    return explained(own[valid].numpy(), true[valid].numpy())


def run(experiment: Run, quick: bool = False) -> pd.DataFrame:
    """Trains a teacher and its student; returns the figures of held-out slices."""
    torch.manual_seed(experiment.seed)
    began = time.process_time()
    image, spacing = head()
    volume = (image - image.mean()) / image.std()
    backbone, reached = pretrained(volume, spacing, 4 if quick else 200)
    teacher = Teacher(backbone, -2)
    student, taught = distilled(volume, spacing, teacher, 4 if quick else 250)
    held_out = lessons_of(teacher, volume, spacing, HELD_OUT)
    true = held_out.maps.x.flatten(0, -2).numpy()
    ridge = RidgeCV(np.logspace(-2, 5, 15)).fit(
        np.concatenate([pixels_of(volume, rest) for rest in range(EVERY) if rest != HELD_OUT]),
        np.concatenate([lesson.maps.x.flatten(0, -2).numpy() for lesson in taught]),
    )
    figures = {
        "student": compare(student, volume, spacing, held_out),
        "ridge": explained(ridge.predict(pixels_of(volume, HELD_OUT)), true),
        "teacher_loss": reached,
        "seconds": round(time.process_time() - began, 1),
    }
    return pd.DataFrame([{"seed": experiment.seed, **figures}])


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="some steps, to see that everything works")
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [Run(seed) for seed in range(given.seeds)]
    carry_out(wanted, functools.partial(run, quick=given.quick), given.output / "slices.csv", COLUMNS, 1)
    print(pd.read_csv(given.output / "slices.csv").round(3).to_string(index=False))


if __name__ == "__main__":
    main()
