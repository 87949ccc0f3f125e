"""What models take and give, by name: one place for the forms in which images and their geometry come."""

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from .grid import Scalars

ImageOrPyramid: TypeAlias = Tensor | Sequence[Tensor]
"""An image ``[B, C, *size]``, or a pyramid: a list of images of one scene."""

MapOrMaps: TypeAlias = Tensor | list[Tensor]
"""What a model makes of an image, or a list with one such per level of a pyramid."""

SpacingLike: TypeAlias = Scalars | Sequence[Scalars | None] | None
"""Physical pixel size in array-axis order (z, y, x): a number, one value per axis, ``[B, axes]`` with one row per
sample, or a list with one of these per level of a pyramid. None: not said."""

MaskLike: TypeAlias = Tensor | Sequence[Tensor | None] | None
"""``[B, *size]``, True = valid, or a list with one such per level of a pyramid. None: all is valid."""

OriginLike: TypeAlias = SpacingLike
"""Physical position of the first pixel's centre, in the forms of `SpacingLike`."""
