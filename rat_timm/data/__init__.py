"""Images and volumes with their pixel size: readers, transforms that keep the size right, batches.

Spacing is physical, in array-axis order (z, y, x), as everywhere in this package; masks are True = valid.
"""

from .errors import ReadError
from .readers import LazyScan, Scan, read, read_lazy, read_spacing
from .samples import Batch, Sample, collate
from .spacing import Spacing
from .transforms import evaluation_transform, training_transform
from .volumes import metatensor_spacing, to_metatensor

__all__ = [
    "Batch",
    "LazyScan",
    "ReadError",
    "Sample",
    "Scan",
    "Spacing",
    "collate",
    "evaluation_transform",
    "metatensor_spacing",
    "read",
    "read_lazy",
    "read_spacing",
    "to_metatensor",
    "training_transform",
]
