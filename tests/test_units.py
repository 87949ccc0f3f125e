import hypothesis
import pytest
from hypothesis import strategies as st

from rat_timm.data.units import Length, convert

METRES = {"nm": 1e-9, "nanometer": 1e-9, "angstrom": 1e-10, "Å": 1e-10, "µm": 1e-6, "micron": 1e-6, "um": 1e-6}
METRES |= {"millimeter": 1e-3, "mm": 1e-3, "cm": 1e-2, "inch": 0.0254}


@hypothesis.given(
    value=st.floats(0.01, 30), written=st.sampled_from(sorted(METRES)), asked=st.sampled_from(sorted(METRES))
)
def test_any_unit_to_any(value, written, asked):
    result = convert({"y": Length(value, written)}, "y", asked, "file", None)
    assert result == pytest.approx([value * METRES[written] / METRES[asked]], rel=1e-12)


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
