"""DICOM, a file or a folder with the slices of one series."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .. import dicom
from ..errors import ReadError
from ..units import Length
from .source import Found, Source, opened


def open_dicom(source: Source, level: int, image: int | None) -> Found:
    """Reads what a DICOM file or a folder of slices says, without its pixels."""
    with _on_disk(source) as path:
        series = dicom.open_series(path)
    shape = tuple(map(int, series.shape))
    sizes = {axis: Length(value, "mm") for axis, value in series.sizes.items()}
    load = series.load if isinstance(source.place, Path) else lambda: _load_copy(source)
    return Found(series.axes, shape, None, shape, sizes, lambda part: load()[part])


def _load_copy(source: Source) -> np.ndarray:
    with _on_disk(source) as path:
        return dicom.open_series(path).load()


@contextlib.contextmanager
def _on_disk(source: Source) -> Iterator[Path]:
    """Yields a path: of the file, or of a copy that is gone afterwards."""
    if isinstance(source.place, Path):
        yield source.place
        return
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "image.dcm"
        with opened(source) as file, copy.open("wb") as target:
            shutil.copyfileobj(file, target)
        try:
            yield copy
        except ReadError as error:
            raise ReadError(str(error).replace(str(copy), source.name)) from error
