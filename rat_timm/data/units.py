"""Pixel sizes in metadata: numbers and units that have to make sense, or an error that names the file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..optional import need

NIFTI_UNITS = {1: "m", 2: "mm", 3: "um"}  # of the lowest bits of a header's xyzt_units
SMALLEST, LARGEST = 1e-12, 1.0  # metres: what a pixel of a microscope or a scanner can measure


class Length(NamedTuple):
    """A pixel's size along one axis, as a file has it.

    Attributes:
        value: The number; None where the file has none.
        unit: Its unit; None where the file has none.
    """

    value: Any
    unit: str | None


def convert(sizes: Mapping[str, Length], axes: Sequence[str], unit: str, file: str, assumed: str | None) -> list[float]:
    """Returns the sizes along some axes in a unit.

    Args:
        sizes: What the file says, per axis.
        axes: Names of the axes.
        unit: The unit that is asked for, any name of a length that `pint` knows ("um", "mm", "nanometer").
        file: Name of the file, for errors.
        assumed: The unit of numbers whose unit the file does not say; None makes that an error.

    Raises:
        ValueError: If a size or its unit is missing, is no length, or cannot be a pixel's.
    """
    return [_convert(sizes.get(axis, Length(None, None)), axis, unit, file, assumed) for axis in axes]


def _convert(size: Length, axis: str, unit: str, file: str, assumed: str | None) -> float:
    try:
        value = float(size.value)
    except (TypeError, ValueError):
        raise ValueError(f"{file}: no pixel size along {axis}, got {size.value!r}") from None
    written = size.unit or assumed
    if not written:
        raise ValueError(f"{file}: pixel size {value:g} along {axis} has no unit: say which with assumed_unit")
    metres = value * _factor(written, "metre", f"{file}: unit along {axis}")
    if not math.isfinite(metres) or not SMALLEST <= metres <= LARGEST:
        raise ValueError(f"{file}: a pixel cannot measure {value:g} {written} along {axis}")
    return value * _factor(written, unit, "unit")


def _factor(written: str, asked: str, name: str) -> float:
    pint = need("pint", "data")
    registry = pint.get_application_registry()
    try:
        return float(registry.Quantity(1.0, written).to(asked).magnitude)
    except (pint.PintError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a length, got {written!r} to be given in {asked!r}") from error
