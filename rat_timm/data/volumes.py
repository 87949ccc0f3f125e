"""Volumes as MONAI has them: MetaTensors, whose affine matrix follows every transform."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..optional import need
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
    return need("monai.data", "data").MetaTensor(pixels, affine=affine, meta={} if unit is None else {"unit": unit})


def metatensor_spacing(image: "MetaTensor", unit: str = "mm", assumed_unit: str | None = None) -> tuple[float, ...]:
    """Reads the spacing of a MONAI ``MetaTensor``, in the order of its own axes.

    MONAI's NIfTI reader keeps the array's axes as the file has them, (x, y, z): they are the tensor's, and so is the
    order here.

    Args:
        image: ``[channels, *grid]``.
        unit: The unit of what is returned.
        assumed_unit: The unit of an affine matrix of which the metadata do not say it (NIfTI's headers say it, others
            do not; a tensor without any metadata has the identity, which is no pixel size); None makes that an error.

    Raises:
        ValueError: If it has no affine matrix, or its unit is missing; with the file's name.
    """
    affine = getattr(image, "affine", None)
    file = str(getattr(image, "meta", {}).get("filename_or_obj", "MetaTensor"))
    if affine is None:
        raise ValueError(f"image must be a MetaTensor with an affine matrix, got {type(image).__name__}")
    axes = [f"axis {axis}" for axis in range(image.ndim - 1)]
    sizes = need("monai.data.utils", "data").affine_to_spacing(affine.double(), len(axes)).tolist()
    written = _written_unit(image.meta)
    return tuple(
        convert({a: Length(s, written) for a, s in zip(axes, sizes, strict=True)}, axes, unit, file, assumed_unit)
    )


def _written_unit(meta: dict[str, Any]) -> str | None:
    """Returns the unit that the metadata say: ours, or the code of a NIfTI header, whose low bits are for space."""
    code = meta.get("xyzt_units")
    return meta.get("unit") or (None if code is None else NIFTI_UNITS.get(int(code) & 7))
