"""Files that stand for the reader's own, on the pages for users of other tools."""

from pathlib import Path

import nibabel
import numpy as np
import torch
from torchvision.utils import save_image

from training.digits import digits, draw, poses

SHORT = {
    "balls": "model: test_rat_3d\npretrained: false\nsize: [8, 16, 16]\nwidth: 16\ncrops: 20\nbatch_size: 2\nepochs: 1\n"
    "warmup_epochs: 0\nema_decay: 0.5\nlr: 0.005\nworkers: 0\n",
    "pictures": "size: [32, 32]\nscale: [1.0, 1.0]\nbatch_size: 8\nepochs: 2\nlr: 0.003\nwarmup_epochs: 0\nema_decay: 0.5\nworkers: 0\n",
}
KINDS = (2, 7)


def make_balls(folder: str) -> None:
    """Writes NIfTI volumes with a ball of 24 mm, in voxels of three sizes, with labels, and settings `short_volumes.yaml`."""
    spacings = {"train/a": (4, 3, 3), "train/b": (6, 2, 2), "validation/c": (3, 3, 3), "test/mine": (5, 3, 3)}
    chance = np.random.default_rng(0)
    for name, spacing in spacings.items():
        part, case = name.split("/")
        size = [round(48 / step) for step in spacing]
        places = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(size, spacing)), indexing="ij"), -1)
        ball = np.linalg.norm(places - chance.uniform(18, 30, 3), axis=-1) < 12
        arrays = {"images": (ball + chance.normal(0, 0.2, size)).astype(np.float32), "labels": ball.astype(np.uint8)}
        for kind, array in arrays.items():
            file = Path(folder, part, kind, f"{case}.nii.gz")
            file.parent.mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1]))
            image.header.set_xyzt_units("mm")
            nibabel.save(image, file)
    Path("short_volumes.yaml").write_text(SHORT["balls"])


def make_pictures(folder: str) -> None:
    """Writes PNG files of two digits, a folder for each, one with fewer pixels beside them, and `short_pictures.yaml`."""
    for part, data in zip(("train", "validation"), digits(), strict=True):
        for kind in KINDS:
            images = data.images[data.labels == kind][:24]
            pose = poses(len(images), 2, 0, 0, torch.Generator())
            Path(folder, part, str(kind)).mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(draw(images, (64, 64), pose)):
                save_image(picture, Path(folder, part, str(kind), f"{index}.png"))
    coarse = draw(images[-1:], (40, 40), poses(1, 2, 0, 0, torch.Generator()))
    save_image(coarse, f"{folder}.png")
    Path("short_pictures.yaml").write_text(SHORT["pictures"])
