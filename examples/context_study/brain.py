"""A real volume: the ICBM152 template of the human brain, of which every scene is a distorted copy.

T1 and the probabilities of grey and white matter, 1 x 1 x 1 mm (ICBM 2009a nonlinear symmetric; Fonov et al. 2009,
2011), lie in the wheel of nilearn 0.14.1 (BSD-3; it calls the template's own licence unknown), which is an archive here
(see `training.wheels`). The class of a voxel is its tissue and in which octant of the brain it lies. The template is
symmetric, so that nothing but the place in the head tells left from right.

Scenes are affine maps and changes of brightness, small ones to train on and larger ones to test on: no parameter of
one is in the other's range. All of them are one template, the mean of 152 heads: what is right here is right for no
patient.
"""

import functools
import gzip
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from context_study.scenes import Field
from training.wheels import fetch_wheel

WHEEL = "nilearn-0.14.1-py3-none-any.whl"
SHA256 = "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a"
FILE = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
MIDDLE = (10.0, -18.0, 0.0)  # z, y, x in mm: planes through it part the octants; about the middle of the brain
TISSUES = ("grey", "white")
OCTANTS = tuple(f"{a} {b} {c}" for a in ("lower", "upper") for b in ("back", "front") for c in ("left", "right"))
CLASSES = ("background", *(f"{tissue}, {octant}" for octant in OCTANTS for tissue in TISSUES))
ROTATION, SCALE, SHIFT = 15.0, 0.12, 8.0  # degrees about each axis, of the length along each, mm along each; at most
GAMMA, SLOPE = 0.35, 0.003  # exponent's logarithm, and brightness per mm along each axis; at most
TRAINED = 0.6  # share of these ranges for training; the rest is for tests


class Template(NamedTuple):
    """The template in array-axis order (z, y, x), ``[3, *size]``: T1, grey and white matter, float32, 0 to 1.

    Attributes:
        maps: These three.
        origin: Position of the first voxel's centre, mm.
    """

    maps: np.ndarray
    origin: tuple[float, ...]


@functools.lru_cache(maxsize=1)
def template(wheel: Path | None = None) -> Template:
    """Reads the template.

    Args:
        wheel: Where it lies. Default: it is fetched.

    Raises:
        training.wheels.UnavailableError: If pip cannot fetch it.
        ValueError: If it is another.
    """
    file = fetch_wheel("nilearn==0.14.1", WHEEL, SHA256) if wheel is None else wheel
    with zipfile.ZipFile(file) as archive:
        images = [
            nibabel.Nifti1Image.from_bytes(gzip.decompress(archive.read(FILE.format(name))))
            for name in ("t1", "gm", "wm")
        ]
    if any(not np.array_equal(image.affine[:3, :3], np.eye(3)) for image in images):
        raise ValueError(f"{file}: voxels must be 1 x 1 x 1 mm along the axes of the head")
    maps = np.stack([np.asarray(image.dataobj).T for image in images]).astype(np.float32) / 255
    return Template(maps, tuple(images[0].affine[:3, 3][::-1].tolist()))


def render(
    seed: int, train: bool, size: Sequence[int], spacing: Sequence[float], source: Template | None = None
) -> Field:
    """Renders a scene: the field of view is centred on the brain before it is moved.

    Args:
        seed: Which scene.
        train: Whether it is to be trained on.
        size: Voxels.
        spacing: Their size in mm.
        source: Default: `template`.
    """
    known = template() if source is None else source
    rng = np.random.default_rng([seed, train])
    draw = functools.partial(_amount, rng, train)
    turn = Rotation.from_euler("xyz", ROTATION * draw(3), degrees=True).as_matrix()
    matrix, shift = turn * (1 + SCALE * draw(3)), SHIFT * draw(3)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(size, spacing, strict=True)]
    seen = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # mm from the field's middle
    head = (seen - shift) @ matrix.T + MIDDLE  # mm in the head
    index = np.moveaxis(head - known.origin, -1, 0)
    t1, *parts = (map_coordinates(each, index, order=1) for each in known.maps)
    tissue = np.argmax([1 - sum(parts), *parts], axis=0)  # 0: neither
    octant = sum(2**place * (head[..., axis] >= MIDDLE[axis]) for place, axis in enumerate((2, 1, 0)))
    labels = np.where(tissue == 0, 0, len(TISSUES) * octant + tissue).astype(np.uint8)
    bright = t1 ** np.exp(GAMMA * draw(1)) * (1 + seen @ (SLOPE * draw(3)))
    return Field(bright.clip(0, 1).astype(np.float32), labels)


def _amount(rng: np.random.Generator, train: bool, count: int) -> np.ndarray:
    """Shares of a range to both sides, ``[count]``: up to `TRAINED` for training, beyond it for tests."""
    low, high = (0.0, TRAINED) if train else (TRAINED, 1.0)
    return rng.uniform(low, high, count) * rng.choice([-1, 1], count)
