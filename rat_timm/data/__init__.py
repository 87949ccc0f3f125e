"""Images and volumes with their pixel size: readers, transforms that keep the size right, batches (extra ``data``).

Spacing is physical, in array-axis order (z, y, x), as everywhere in this package; masks are True = valid.

    scan = data.read("cells.ome.tif", unit="um")  # pixels [channels, z, y, x], spacing (z, y, x)
    sample = data.Sample(scan.pixels / 255, torch.tensor(scan.spacing), target=1)
    transform = data.training_transform((224, 224))  # three numbers for volumes
    loader = DataLoader([transform(sample)], collate_fn=data.collate)  # spacings and sizes may differ
    for batch in loader:
        logits = model(batch.image, spacing=batch.spacing, mask=batch.mask)

- `read` takes OME-TIFF, OME-Zarr, NIfTI and DICOM: paths, file objects (with ``format=".nii.gz"``), addresses of fsspec
  and ``zarr.Group``; ``region`` reads a part, and `read_lazy` gives a Dask array.
- A pixel size that is missing, has no unit or cannot be true is an error, and so is a file that is damaged or larger
  than ``max_bytes``: `ReadError`, a ``ValueError`` that begins with the file's name. In a folder of DICOM slices,
  hidden files, texts and files of other kinds are left out; every other file must be a readable slice.
- Targets that are maps or boxes are transformed along. `Spacing` follows images through torchvision's transforms (v2)
  as key points do; `metatensor_spacing` reads what MONAI's transforms did to a ``MetaTensor``.
- Pixel sizes at random in training: ``training_transform(size, factors=(0.5, 2.0))``, or `resolution_transform` by
  itself. `spacing_from_objects` where files do not tell, but the size of an object is known.
- `read_levels` opens the levels of a large image, and `crop_levels` cuts a crop with overviews around it out of them:
  a pyramid with spacings, origins and masks (`rat_timm.data.pyramid`).
- Images too large for one call: `rat_timm.evaluation.sliding_window`. What a wrong pixel size does:
  `rat_timm.evaluation.spacing_sensitivity`.
"""

from .errors import ReadError
from .objects import spacing_from_objects
from .pyramid import Crop, CropBatch, Level, collate_crops, crop_levels, levels_of, read_levels
from .readers import LazyScan, Scan, read, read_grids, read_lazy, read_spacing
from .resolution import resolution_transform
from .samples import Batch, Sample, collate
from .spacing import Spacing
from .transforms import evaluation_transform, training_transform
from .volumes import metatensor_spacing, to_metatensor

__all__ = [
    "Batch",
    "Crop",
    "CropBatch",
    "LazyScan",
    "Level",
    "ReadError",
    "Sample",
    "Scan",
    "Spacing",
    "collate",
    "collate_crops",
    "crop_levels",
    "evaluation_transform",
    "levels_of",
    "metatensor_spacing",
    "read",
    "read_grids",
    "read_lazy",
    "read_levels",
    "read_spacing",
    "resolution_transform",
    "spacing_from_objects",
    "to_metatensor",
    "training_transform",
]
