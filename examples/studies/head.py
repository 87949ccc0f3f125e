"""A real volume: the MR images of a head that nibabel ships."""

from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from torch import Tensor


class Volume(NamedTuple):
    """A volume ``[1, 1, z, y, x]`` between 0 and 1, and its voxel size in mm."""

    image: Tensor
    spacing: tuple[float, ...]


def head() -> Volume:
    """Loads the first frame of the MR series, axes (z, y, x), anterior side up."""
    series = nibabel.load(Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz")
    voxels = torch.from_numpy(series.get_fdata(dtype=np.float32)[..., 0].T.copy())[None, None].flip(-2)
    spacing = tuple(round(float(size), 3) for size in series.header.get_zooms()[2::-1])
    return Volume((voxels / voxels.quantile(0.995)).clamp(0, 1), spacing)
