"""Pixel sizes in metadata: numbers and units that have to make sense, or an error that names the file.

Units are names from a fixed table, never expressions: those of OME's ``UnitsLength`` and of UDUNITS, which OME-NGFF
recommends.
"""

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import NamedTuple, TypeGuard

from .errors import ReadError

NIFTI_UNITS = {1: "m", 2: "mm", 3: "um"}  # of the lowest bits of a header's xyzt_units

SMALLEST = 1e-12  # metres: a hundredth of an angstrom, below what any microscope resolves
# Slices of a localiser lie some centimetres apart, and no scanner has larger pixels. Micrometres that are taken for
# metres are beyond this limit, if they are more than 0.1.
LARGEST = 0.1  # metres

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?\s*", re.ASCII)
_NOT_FINITE = re.compile(r"\s*[+-]?(nan|inf)\s*", re.ASCII | re.IGNORECASE)

_PREFIXES = {
    "yotta": ("Y", 24),
    "zetta": ("Z", 21),
    "exa": ("E", 18),
    "peta": ("P", 15),
    "tera": ("T", 12),
    "giga": ("G", 9),
    "mega": ("M", 6),
    "kilo": ("k", 3),
    "hecto": ("h", 2),
    "deca": ("da", 1),
    "deka": ("da", 1),
    "": ("", 0),
    "deci": ("d", -1),
    "centi": ("c", -2),
    "milli": ("m", -3),
    "micro": ("u", -6),
    "nano": ("n", -9),
    "pico": ("p", -12),
    "femto": ("f", -15),
    "atto": ("a", -18),
    "zepto": ("z", -21),
    "yocto": ("y", -24),
}
_OTHERS = {  # metres, and the names
    "1e-6": ("micron", "microns", "\u00b5m", "\u03bcm"),  # the micro sign, and the Greek letter
    "1e-10": ("angstrom", "angstroms", "\u00c5", "\u212b"),  # the letter, and the angstrom sign
    "0.0254e-3": ("thou", "mil"),
    "0.0254": ("in", "inch", "inches"),
    "0.3048": ("ft", "foot", "feet"),
    "0.9144": ("yd", "yard", "yards"),
    "1609.344": ("mi", "mile", "miles"),
    "149597870700": ("ua", "astronomical_unit"),
    "9460730472580800": ("ly", "light_year"),
    "3.0856775814913673e16": ("pc", "parsec", "parsecs"),
}


def _table() -> dict[str, Fraction]:
    """Returns the metres of each name."""
    table = {name: Fraction(metres) for metres, names in _OTHERS.items() for name in names}
    for prefix, (symbol, power) in _PREFIXES.items():
        names = (f"{symbol}m", *(f"{prefix}{stem}{plural}" for stem in ("meter", "metre") for plural in ("", "s")))
        table |= dict.fromkeys(names, Fraction(10) ** power)
    # OME's line is a twelfth of an inch, and its point a 72nd; a survey's link has the line's symbol.
    return table | {"li": Fraction("0.0254") / 12, "pt": Fraction("0.0254") / 72}


_METRES = _table()


class Length(NamedTuple):
    """A pixel's size along one axis, as a file has it.

    Attributes:
        value: The number; None where the file has none.
        unit: Its unit; None where the file has none.
    """

    value: object
    unit: str | None


def convert(sizes: Mapping[str, Length], axes: Sequence[str], unit: str, file: str, assumed: str | None) -> list[float]:
    """Returns the sizes along some axes in a unit.

    Args:
        sizes: What the file says, per axis.
        axes: Names of the axes.
        unit: The unit that is asked for, by its symbol or name ("um", "mm", "nanometer").
        file: Name of the file, for errors.
        assumed: The unit of numbers whose unit the file does not say; None makes that an error.

    Raises:
        ReadError: If a size or its unit is missing, is no length, or cannot be a pixel's; it names the file.
        ValueError: If ``unit`` or ``assumed`` is no length.
    """
    for name, asked in (("unit", unit), ("assumed_unit", assumed)):
        if not is_length(asked) and (name, asked) != ("assumed_unit", None):
            given = next((size.unit for size in sizes.values() if size.unit), assumed)
            raise ValueError(f"{name} must be a length, got {given!r:.80} to be given in {asked!r:.80}; {_ALLOWED}")
    return [_convert(sizes.get(axis, Length(None, None)), axis, unit, file, assumed) for axis in axes]


def _convert(size: Length, axis: str, unit: str, file: str, assumed: str | None) -> float:
    value, written = number(size.value), size.unit or assumed
    if value is None:
        raise ReadError(f"{file}: no pixel size along {axis}, got {size.value!r:.80}")
    if not written:
        raise ReadError(
            f"{file}: pixel size {value:g} along {axis} has no unit: say which with assumed_unit, or give spacing"
        )
    if not is_length(written):
        raise ReadError(f"{file}: unit along {axis} must be a length, got {written!r:.80}; {_ALLOWED}")
    metres = value * float(_METRES[written])
    if not math.isfinite(metres) or not SMALLEST <= metres <= LARGEST:
        raise ReadError(f"{file}: a pixel cannot measure {value:g} {written} along {axis}")
    return value * float(_METRES[written] / _METRES[unit])


def number(value: object) -> float | None:
    """Returns a number, or a text that is one; None for all else, such as True, or digits with underscores."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value) or _NOT_FINITE.fullmatch(value) else None
    try:
        return float(value) if isinstance(value, Real) else None
    except OverflowError:
        return math.inf


def metres_of(unit: str) -> float:
    """Returns the metres of a unit.

    Raises:
        ValueError: If it is no length.
    """
    if not is_length(unit):
        raise ValueError(f"unit must be a length, got {unit!r:.80}; {_ALLOWED}")
    return float(_METRES[unit])


def is_length(unit: object) -> TypeGuard[str]:
    """Tells whether a text is the name or symbol of a length."""
    return isinstance(unit, str) and unit in _METRES


_ALLOWED = "allowed are symbols and names such as 'um', '\u00b5m', 'micrometer', 'nm', 'mm', 'angstrom', 'inch'"
