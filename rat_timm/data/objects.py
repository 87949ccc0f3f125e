"""Pixel sizes from objects whose size is known, where files do not tell.

Tools such as cellpose ask for the diameter of objects in pixels. With their true size it is a pixel size:

```python
from rat_timm.data import spacing_from_objects

spacing_from_objects(pixels=30, length=12)  # (0.4, 0.4): um, if 12 are um
spacing_from_objects(pixels=30, length=12, axes=3, anisotropy=5)  # (2.0, 0.4, 0.4)
spacing_from_objects(pixels=(6, 30, 30), length=12)  # the same, measured along each axis
```
"""

from collections.abc import Sequence

from ..geometry.grid import axis_values


def spacing_from_objects(
    pixels: float | Sequence[float],
    length: float | Sequence[float],
    axes: int | None = None,
    anisotropy: float | None = None,
) -> tuple[float, ...]:
    """Returns the pixel size of images in which objects of a known size have so many pixels.

    It is as good as both numbers are: a diameter that is off by a fifth makes a pixel size that is. How much a model
    minds, `rat_timm.evaluation.spacing_sensitivity` tells.

    Args:
        pixels: Diameter of the objects in pixels; in volumes, in the plane (y, x), if it is one number. Or one number
            per axis, in array-axis order (z, y, x).
        length: Their true diameter, in the unit that the spacing is to have; one number or one per axis.
        axes: 2 for images, 3 for volumes. Default: as many as ``pixels`` has numbers, 2 if it is one number.
        anisotropy: How many times as large pixels are along z as in the plane, in volumes whose ``pixels`` is one
            number (cellpose's argument of that name). Default: 1.

    Returns:
        In array-axis order (z, y, x), as readers give it (`Scan.spacing`).

    Raises:
        ValueError: If a number is not positive and finite, or the arguments do not fit together.
    """
    measured = len(pixels) if isinstance(pixels, Sequence) else None
    count = axes or measured or 2
    if count not in (2, 3):
        raise ValueError(f"axes must be 2 or 3, got {count}")
    sizes, lengths = axis_values(pixels, "pixels", count), axis_values(length, "length", count)
    if anisotropy is None:
        ratio = 1.0
    elif measured or count == 2:
        raise ValueError("anisotropy goes with axes=3 and pixels that are one number, measured in the plane")
    else:
        ratio = axis_values(anisotropy, "anisotropy", 1)[0]
    ratios = (ratio, 1.0, 1.0)[-count:]
    return tuple(r * whole / n for r, whole, n in zip(ratios, lengths, sizes, strict=True))
