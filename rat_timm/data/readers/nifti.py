"""NIfTI, on `nibabel`."""

import contextlib
import gzip
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from ...optional import import_optional
from ..errors import ReadError
from ..units import NIFTI_UNITS, Length
from .source import Format, Index, Source, StoredImage, opened

_SIZES = {348: "Nifti1Header", 540: "Nifti2Header"}  # a header's first number, its own length


def open_nifti(source: Source, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
    """Reads what a NIfTI file says; see `source.Opener`."""
    with _opened(source) as file:
        header, written = _headers(file, source.name)
        if not source.kind.endswith(".gz"):
            _check_length(header, file.seek(0, 2), source.name)
    shape, offset = tuple(map(int, header.get_data_shape())), int(header.get_data_offset())
    if not 1 <= len(shape) <= 5:
        raise ReadError(f"{source.name}: must have at most 5 axes (x, y, z, time, channel), got {len(shape)}")
    if min(shape) < 1 or offset < int(header["sizeof_hdr"]):
        raise ReadError(f"{source.name}: must have pixels behind its header, got {shape} at {offset}")
    unit = NIFTI_UNITS.get(int(header["xyzt_units"]) & 7)
    sizes = {axis: Length(size, unit) for axis, size in zip("xyz", _sizes(header, written, source.name), strict=True)}
    chunks = shape if source.kind.endswith(".gz") else (*shape[:2], *[1] * (len(shape) - 2))
    axes, dtype = "xyztc"[: len(shape)], _dtype(header)
    return StoredImage(axes, shape, dtype, chunks, chunks, sizes, lambda part: _load(source, header, part))


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    with opened(source) as file:
        if source.kind.endswith(".gz"):
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield unzipped  # type: ignore[misc]
        else:
            yield file


def _load(source: Source, header: Any, part: Index) -> np.ndarray:
    proxy = import_optional("nibabel.arrayproxy", "data").ArrayProxy
    with _opened(source) as file:
        pixels = np.asarray(proxy(file, header, mmap=False)[part])
        if source.kind.endswith(".gz"):
            file.seek(_end(header))
            file.read(1)  # at the end of the stream its checksum is compared
            _check_length(header, file.tell(), source.name)
    return pixels


def _end(header: Any) -> int:
    """Returns where the pixels end."""
    pixels = math.prod(map(int, header.get_data_shape())) * header.get_data_dtype().itemsize
    return int(header.get_data_offset()) + pixels


def _headers(file: BinaryIO, name: str) -> tuple[Any, Any]:
    """Reads the header, and as it is written: nibabel puts 1 for sizes of 0, and turns the sign of negative ones."""
    nibabel = import_optional("nibabel", "data")
    start = file.read(4)
    kind = next((_SIZES[size] for order in ("little", "big") if (size := int.from_bytes(start, order)) in _SIZES), None)
    if kind is None:
        raise ReadError(f"{name}: cannot be read: ValueError: must be a NIfTI file, begins with {start!r}")
    header = getattr(nibabel, kind)
    block = start + file.read(header.template_dtype.itemsize - 4)
    checked = header(block)
    if not bytes(checked["magic"]).startswith(b"n+"):
        raise ReadError(f"{name}: must have its pixels in the same file, its header says another")
    return checked, header(block, check=False)


def _check_length(header: Any, length: int, name: str) -> None:
    """Fails if the file does not end where the pixels do: its header is another file's, or the file is cut off."""
    if length != _end(header):
        raise ReadError(f"{name}: must have {_end(header)} bytes, as its header says, got {length} or more")


def _dtype(header: Any) -> np.dtype:
    """Returns the type of rescaled pixels."""
    scaling = import_optional("nibabel.volumeutils", "data").apply_read_scaling
    slope, offset = header.get_slope_inter()
    dtype = header.get_data_dtype()
    if slope is None or dtype.kind not in "buif":
        return dtype.newbyteorder("=")
    return scaling(np.zeros(1, dtype), slope, offset).dtype.newbyteorder("=")


def _sizes(header: Any, written: Any, name: str) -> list[float]:
    """Returns the sizes of the affine matrix, or those of the header as it is written."""
    if not int(header["sform_code"]):
        return written["pixdim"][1:4].tolist()
    affine = header.get_best_affine()
    turn, sizes = affine[:3, :3], import_optional("nibabel.affines", "data").voxel_sizes(affine)
    angles = turn.T @ turn - np.diag(sizes**2)
    if not abs(angles).max() <= 1e-3 * (sizes**2).max():
        raise ReadError(f"{name}: voxels must have right angles, the affine matrix shears them")
    return sizes.tolist()


NIFTI = Format("NIfTI", (".nii", ".nii.gz"), open_nifti)
