import math

import pytest

from rat_timm.data import spacing_from_objects


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"pixels": 30, "length": 12}, (0.4, 0.4)),
        ({"pixels": 30, "length": 12, "axes": 3}, (0.4, 0.4, 0.4)),
        ({"pixels": 30, "length": 12, "axes": 3, "anisotropy": 2.5}, (1.0, 0.4, 0.4)),
        ({"pixels": (12, 30, 30), "length": 12}, (1.0, 0.4, 0.4)),
        ({"pixels": [30, 20], "length": 12}, (0.4, 0.6)),
        ({"pixels": 30, "length": (6, 12)}, (0.2, 0.4)),
        ({"pixels": 17.5, "length": 7e-3, "axes": 2}, (4e-4, 4e-4)),
    ],
)
def test_objects_tell_the_pixel_size(given, expected):
    assert spacing_from_objects(**given) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "30", None, (1, 2, 3), (1, 0)])
def test_sizes_that_are_not_allowed(value):
    for name in ("pixels", "length"):
        with pytest.raises(ValueError, match=f"{name} must be a positive number or 2"):
            spacing_from_objects(**{"pixels": 30, "length": 12, "axes": 2, name: value})


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="axes must be 2 or 3, got 4"):
        spacing_from_objects(30, 12, axes=4)
    with pytest.raises(ValueError, match="anisotropy must be a positive number"):
        spacing_from_objects(30, 12, axes=3, anisotropy=-1)
    for given in ({"pixels": 30}, {"pixels": (6, 30, 30)}):
        with pytest.raises(ValueError, match="anisotropy goes with axes=3 and pixels that are one number"):
            spacing_from_objects(**given, length=12, anisotropy=5)
