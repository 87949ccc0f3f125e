from fractions import Fraction
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from fuzzing import guarded
from hypothesis import strategies as st

from rat_timm.data.errors import ReadError
from rat_timm.data.units import Length, convert

METRES = {"nm": 1e-9, "nanometer": 1e-9, "angstrom": 1e-10, "Å": 1e-10, "µm": 1e-6, "micron": 1e-6, "um": 1e-6}
METRES |= {"millimeter": 1e-3, "mm": 1e-3, "cm": 1e-2, "inch": 0.0254}


@hypothesis.given(
    value=st.floats(0.01, 30), written=st.sampled_from(sorted(METRES)), asked=st.sampled_from(sorted(METRES))
)
def test_any_unit_to_any(value, written, asked):
    size = {"y": Length(value, written)}
    if value * METRES[written] > 0.1:  # metres: no pixel measures so much
        with pytest.raises(ReadError, match="file: a pixel cannot measure"):
            convert(size, "y", asked, "file", None)
    else:
        result = convert(size, "y", asked, "file", None)
        assert result == pytest.approx([value * METRES[written] / METRES[asked]], rel=1e-12)


OME = """Ym Zm Em Pm Tm Gm Mm km hm dam m dm cm mm \u00b5m nm pm fm am zm ym \u00c5 thou li in ft yd mi ua ly pc pt"""
OME_METRES = [10.0**power for power in (24, 21, 18, 15, 12, 9, 6, 3, 2, 1, 0, -1, -2, -3, -6, -9, -12, -15, -18, -21)]
OME_METRES += [1e-24, 1e-10, 2.54e-5, 0.0254 / 12, 0.0254, 0.3048, 0.9144, 1609.344, 149597870700, 9.4607304725808e15]
OME_METRES += [3.0856775814913673e16, 0.0254 / 72]
NAMES = {"attometer": 1e-18, "yottameter": 1e24, "foot": 0.3048, "parsec": 3.0856775814913673e16, "yard": 0.9144}
NAMES |= {"micrometer": 1e-6, "micrometre": 1e-6, "micron": 1e-6, "\u03bcm": 1e-6, "um": 1e-6, "angstrom": 1e-10}
NAMES |= {"\u212b": 1e-10, "meter": 1.0, "hectometer": 100.0, "mile": 1609.344, "exameter": 1e18, "inch": 0.0254}


@pytest.mark.parametrize(("name", "metres"), [*zip(OME.split(), OME_METRES, strict=True), *NAMES.items()], ids=ascii)
def test_names_of_ome_and_udunits(name, metres):
    size = 0.001 / metres  # a millimetre
    assert convert({"y": Length(size, name)}, "y", "mm", "file", None) == pytest.approx([1.0], rel=1e-12)


@pytest.mark.parametrize(
    "unit",
    [
        *("?m", "px", "pixel", "dot", "reference frame", "9**9**9**9*um", "(((um", "'um'", "2*um", "um ", "UM", ""),
        *("\ufffdm", "m" * 10**6, "furlong", "smoot", "[length]", "um/um*um", "1", 5, ["um"], {"um": 1}, True),
    ],
    ids=lambda unit: ascii(unit)[:20],
)
def test_expressions_and_other_names_are_no_units(unit):
    with guarded(Path(__file__).parent, seconds=1), pytest.raises(ReadError, match=r"^file: (unit along y|pixel size)"):
        convert({"y": Length(0.13, unit)}, "y", "um", "file", None)


@pytest.mark.parametrize(
    "value",
    ["true", True, False, "1_000", "0x10", "", " ", "1,5", "1.5.2", "--1", "\u0661", "1 2", b"1", [1.0], {}, 1j, None],
    ids=ascii,
)
def test_what_is_no_number(value):
    with pytest.raises(ReadError, match=r"^file: no pixel size along y, got"):
        convert({"y": Length(value, "um")}, "y", "um", "file", None)


@pytest.mark.parametrize(
    "value",
    [10**400, "1e9999", "1e400", "-inf", "NaN", np.float32("nan"), -1, "-0.5", 0, "1e-400"],
    ids=lambda value: repr(value)[:10],
)
def test_numbers_that_no_pixel_has(value):
    with pytest.raises(ReadError, match=r"^file: a pixel cannot measure"):
        convert({"y": Length(value, "um")}, "y", "um", "file", None)


@pytest.mark.parametrize("value", ["0.5", " 0.5\n", "+.5", "5e-1", "5.E-1", np.float32(0.5), 0.5, Fraction(1, 2)])
def test_what_is_a_number(value):
    assert convert({"y": Length(value, "um")}, "y", "um", "file", None) == [0.5]


def test_micrometres_that_are_taken_for_metres_are_no_pixel():
    with pytest.raises(ReadError, match=r"^file: a pixel cannot measure 0\.13 m along y"):
        convert({"y": Length(0.13, "m")}, "y", "um", "file", None)
    assert convert({"y": Length(0.09, "m")}, "y", "mm", "file", None) == pytest.approx([90])


def test_the_caller_names_a_length():
    with pytest.raises(ValueError, match=r"^assumed_unit must be a length, .* 'px'; allowed are") as caught:
        convert({"y": Length(1, "um")}, "y", "um", "file", "px")
    assert not isinstance(caught.value, ReadError)


def test_a_unit_may_be_assumed_where_there_is_none():
    sizes = {"y": Length("0.5", None), "x": Length(0.5, "nm")}
    assert convert(sizes, "yx", "um", "file", "mm") == pytest.approx([500, 0.0005])
    with pytest.raises(ValueError, match=r"file: pixel size 0\.5 along y has no unit"):
        convert(sizes, "yx", "um", "file", None)


@pytest.mark.parametrize(
    ("size", "asked", "message"),
    [
        (Length(None, "um"), "um", "file: no pixel size along y, got None"),
        (Length("wide", "um"), "um", "file: no pixel size along y, got 'wide'"),
        (Length(0, "um"), "um", "file: a pixel cannot measure 0 um along y"),
        (Length(float("inf"), "um"), "um", "cannot measure inf"),
        (Length(1, "second"), "um", "file: unit along y must be a length, got 'second'"),
        (Length(1, "furlongs per week"), "um", "file: unit along y must be a length"),
        (Length(1, "um"), "kg", "unit must be a length, got 'um' to be given in 'kg'"),
    ],
)
def test_what_cannot_be_a_pixels_size(size, asked, message):
    with pytest.raises(ValueError, match=message):
        convert({"y": size}, "y", asked, "file", None)
