"""Volumes as MONAI has them: MetaTensors, whose affine matrix follows every transform."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optional import import_optional
from .units import NIFTI_UNITS, Length, convert

if TYPE_CHECKING:
    from monai.data import MetaTensor


def to_metatensor(pixels: Tensor, spacing: Sequence[float] | Tensor, unit: str | None = None) -> "MetaTensor":
    """Makes a MONAI ``MetaTensor`` ``[channels, *grid]`` with an affine matrix of the spacing, per axis of the grid.

    Args:
        pixels: ``[channels, *grid]``.
        spacing: Per axis of the grid, in array-axis order.
        unit: The spacing's unit, which `metatensor_spacing` will then know.
    """
    scale = torch.as_tensor(spacing, dtype=torch.float64)
    affine = torch.diag(torch.cat((scale, scale.new_ones(1))))
    meta = {} if unit is None else {"unit": unit}
    return import_optional("monai.data", "data").MetaTensor(pixels, affine=affine, meta=meta)


def metatensor_spacing(
    image: "MetaTensor", unit: str = "mm", assumed_unit: str | None = None
) -> tuple[float, ...] | Tensor:
    """Reads the spacing of a MONAI ``MetaTensor``, or of a batch, in the order of its own axes.

    MONAI's NIfTI reader keeps the array's axes as the file has them, (x, y, z): they are the tensor's, and so is the
    order here.

    Args:
        image: ``[channels, *grid]``; or a batch ``[B, channels, *grid]`` of MONAI's ``list_data_collate``, which has an
            affine matrix for each of its samples.
        unit: The unit of what is returned.
        assumed_unit: The unit of an affine matrix of which the metadata do not say it (NIfTI's headers say it, others
            do not; a tensor without any metadata has the identity, which is no pixel size); None makes that an error.

    Returns:
        One number per axis; of a batch, a tensor ``[B, axes]``.

    Raises:
        ValueError: If it has no affine matrix, fewer axes in it than in the grid, or its unit is missing; with the
            file's name.
    """
    affine = getattr(image, "affine", None)
    if affine is None:
        raise ValueError(f"image must be a MetaTensor with an affine matrix, got {type(image).__name__}")
    if affine.ndim == 3:
        return torch.tensor([metatensor_spacing(one, unit, assumed_unit) for one in image])
    file = str(image.meta.get("filename_or_obj", "MetaTensor"))
    axes = [f"axis {axis}" for axis in range(image.ndim - 1)]
    if image.is_batch or len(axes) >= len(affine):
        raise ValueError(
            f"{file}: image must be [channels, *grid], or a batch with an affine matrix for each sample, "
            f"got {list(image.shape)} with one matrix {list(affine.shape)}"
        )
    # of images too with all their three components: they may be slices that are turned out of the plane
    measure = import_optional("monai.data.utils", "data").affine_to_spacing
    sizes = measure(affine.double(), len(affine) - 1).tolist()[: len(axes)]
    written = _written_unit(image.meta)
    return tuple(
        convert({a: Length(s, written) for a, s in zip(axes, sizes, strict=True)}, axes, unit, file, assumed_unit)
    )


def _written_unit(meta: dict[str, Any]) -> str | None:
    """Returns the unit that the metadata say: ours, or the code of a NIfTI header, whose low bits are for space."""
    code = meta.get("xyzt_units")
    return meta.get("unit") or (None if code is None else NIFTI_UNITS.get(int(code) & 7))
