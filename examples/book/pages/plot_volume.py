"""
A CT volume
===========

The voxels of a CT are longer across slices than within them, and every scanner has its own. Here files of three voxel
sizes train a network that finds bones, which is then asked about a fourth.
"""

# %%
# What a DICOM series says
# ------------------------
# ``read`` takes a folder with the slices of a series, sorts them by their position, and returns Hounsfield units and
# the voxel size in the order of the array's axes (z, y, x). This series is a piece of a real head CT that pydicom
# ships, the picture another real slice of its: no package has a whole CT.

from pathlib import Path

import pydicom
from matplotlib import pyplot as plt

from rat_timm import data

folder = Path(pydicom.__file__).parent / "data/test_files"
series = data.read(folder / "dicomdirtests/98892001/CT5N", unit="mm")
print("a series of five slices:", list(series.pixels.shape), "spacing", series.spacing, "mm")

scan = data.read(folder / "CT_small.dcm", unit="mm")
figure, axes = plt.subplots(figsize=(4.4, 3.6))
height, width = (n * step for n, step in zip(scan.pixels.shape[-2:], scan.spacing[-2:], strict=True))
shown = axes.imshow(scan.pixels.squeeze(), extent=(0, width, height, 0), vmin=-1000, vmax=1000)
axes.set(title="A slice of a real CT, in its own units", xlabel="mm", ylabel="mm")
figure.colorbar(shown, label="Hounsfield units")

# %%
# Volumes with labels
# -------------------
# No package ships a labelled CT either, so these are drawn: a body with two bones, and noise. The training program
# wants folders ``images`` and ``labels``; with ``--intensity data`` it scales Hounsfield units by the training volumes'
# mean and deviation.

import nibabel
import numpy as np


def save(array, spacing, file):
    """Writes a volume (z, y, x) as NIfTI, which has its axes the other way round."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, file)


def make_patient(part, name, spacing, seed):
    """Writes a volume of 96 x 144 x 192 mm, and which of its voxels are bone."""
    chance = np.random.default_rng(seed)
    size = [round(length / step) for length, step in zip((96, 144, 192), spacing, strict=True)]
    place = np.stack(np.meshgrid(*((np.arange(n) + 0.5) * s for n, s in zip(size, spacing)), indexing="ij"), -1)
    middle = np.array([48, 72, 96]) + chance.uniform(-6, 6, 3)

    def ball(shift, radii):
        return (((place - middle - shift) / radii) ** 2).sum(-1) < 1

    body = ball((0, 0, 0), (200, 60, 84))
    bones = ball((0, 0, -38), (60, 18, 16)) | ball((0, 0, 38), (58, 16, 18))
    density = np.where(bones, 500, np.where(body, 40, -1000)) + chance.normal(0, 100, size)
    save(density.astype(np.int16), spacing, Path("patients", part, "images", name))
    save(bones.astype(np.uint8), spacing, Path("patients", part, "labels", name))


for seed, spacing in enumerate([(8, 4, 4), (4, 6, 6), (6, 4, 4)]):
    make_patient("train", f"{seed}.nii.gz", spacing, seed)
make_patient("validation", "3.nii.gz", (6, 5, 5), 3)
make_patient("test", "4.nii.gz", (3, 4, 4), 4)

# %%
# Train, and predict from a file to a file
# ----------------------------------------
# (``run`` does what a shell does with the command.) Networks are given intensities as in training: which of the file's
# become 0 and 1 is in ``facts.json``, beside the model, where ``predict`` reads it.

from book import pick, run

run(
    "python examples/train.py --task segmentation --data patients --output runs/bones --model test_rat_3d --unit mm "
    f"--pretrained false --size '[12, 24, 24]' --crops 16 --batch_size 2 --epochs {pick(2, 40)} --warmup_epochs 0 "
    "--intensity data --width 16 --lr 5e-3 --ema_decay 0.7 --workers 0 "
    "--model_args '{embed_dim: 16, num_heads: 1, depths: [1, 1, 1]}'"
)
run(
    "python -m rat_timm predict patients/test/images/4.nii.gz --model runs/bones/model --output bones.nii.gz "
    "--unit mm --quiet"
)

# %%
# The answer has the grid and the affine matrix of the file that was asked about: its voxels were not in the training.

image, true = (nibabel.load(f"patients/test/{part}/4.nii.gz") for part in ("images", "labels"))
found = nibabel.load("bones.nii.gz")
assert np.allclose(found.affine, image.affine)
bones, right = (np.asarray(volume.dataobj) == 1 for volume in (found, true))
dice = 2 * (bones & right).sum() / (bones.sum() + right.sum())
print(f"voxels of {[float(step) for step in found.header.get_zooms()]} mm (x, y, z): Dice {dice:.1%}")

figure, row = plt.subplots(1, 2, figsize=(9, 3.2))
zooms, middle = image.header.get_zooms(), image.shape[1] // 2
place = {"extent": (0, image.shape[0] * zooms[0], 0, image.shape[2] * zooms[2]), "origin": "lower"}
coronal = image.get_fdata()[:, middle].T
for axes, labels, title in ((row[0], right, "drawn bones"), (row[1], bones, "predicted bones")):
    axes.imshow(coronal, **place)
    axes.imshow(np.ma.masked_equal(labels[:, middle].T, 0), cmap="autumn", alpha=0.5, **place)
    axes.set(title=f"{title}, a coronal plane", xlabel="x (mm)", ylabel="z (mm)")

# %%
# A network for cubic voxels would have to be given resampled volumes; nnU-Net does that, and ``rat_timm`` works in it
# (:doc:`/tools/nnunet`). What real volumes of nuclei give is in :doc:`what was measured </measured/cells/README>`; no
# patients were measured.
#
# Next: :doc:`plot_slide`. Reference: :api:`rat_timm.data`, :api:`rat_timm.predict`.
