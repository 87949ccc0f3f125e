"""Files that stand for the reader's own, on the pages for users of other tools."""

from pathlib import Path

import nibabel
import numpy as np
import torch
from torchvision.utils import save_image

from training.digits import digits, draw, poses

SHORT_BALLS = """
model: test_rat_3d
pretrained: false
size: [8, 16, 16]
width: 16
crops: 20
batch_size: 2
epochs: 1
warmup_epochs: 0
ema_decay: 0.5
lr: 0.005
workers: 0
"""
SHORT_PICTURES = """
size: [32, 32]
scale: [1.0, 1.0]
batch_size: 8
epochs: 2
lr: 0.003
warmup_epochs: 0
ema_decay: 0.5
workers: 0
"""
KINDS = (2, 7)


def make_balls(folder: str) -> None:
    """Writes NIfTI volumes of a ball, 24 mm wide, in voxels of several sizes, `mine.nii.gz` and `short.yaml`.

    Like many files, they do not say that their numbers are millimetres.
    """
    spacings = {"train/a": (4, 3, 3), "train/b": (6, 2, 2), "validation/c": (3, 3, 3), "mine": (5, 3, 3)}
    chance = np.random.default_rng(0)
    for name, spacing in spacings.items():
        part, _, case = name.rpartition("/")
        size = [round(48 / step) for step in spacing]
        axes = [(np.arange(n) + 0.5) * step for n, step in zip(size, spacing, strict=True)]
        places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        ball = np.linalg.norm(places - chance.uniform(18, 30, 3), axis=-1) < 12
        arrays = {"images": (ball + chance.normal(0, 0.2, size)).astype(np.float32), "labels": ball.astype(np.uint8)}
        for kind, array in arrays.items():
            file = Path(folder, part, kind, f"{case}.nii.gz") if part else Path(f"{case}.nii.gz")
            if part or kind == "images":
                file.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1])), file)
    Path("short.yaml").write_text(SHORT_BALLS)


def make_pictures(folder: str) -> None:
    """Writes PNG files of two digits, a folder for each, a coarser one beside them, and `short.yaml`."""
    for part, data in zip(("train", "validation"), digits(), strict=True):
        for kind in KINDS:
            images = data.images[data.labels == kind][:24]
            pose = poses(len(images), 2, 0, 0, torch.Generator())
            Path(folder, part, str(kind)).mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(draw(images, (64, 64), pose)):
                save_image(picture, Path(folder, part, str(kind), f"{index}.png"))
    coarse = draw(images[-1:], (32, 32), poses(1, 2, 0, 0, torch.Generator()))
    save_image(coarse, "mine.png")
    Path("short.yaml").write_text(SHORT_PICTURES)
