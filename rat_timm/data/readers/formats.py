"""The table of formats. A new one is a file with its reader, and a row here."""

from pathlib import Path

from .dicom import DICOM
from .nifti import NIFTI
from .ome_tiff import OME_TIFF
from .ome_zarr import OME_ZARR
from .source import Format, Source

FORMATS = (OME_TIFF, OME_ZARR, NIFTI, DICOM)  # a folder is of the first that has it


def format_of(source: Source) -> Format | None:
    """Returns the format of an image, None if it has none of these."""
    path = source.place if isinstance(source.place, Path) else None
    return next((form for form in FORMATS if source.kind.endswith(form.endings)), None) or next(
        (form for form in FORMATS if path is not None and form.is_folder(path)), None
    )
