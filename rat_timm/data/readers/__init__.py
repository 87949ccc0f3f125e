"""Readers of images and volumes with their pixel size, on the packages that own the formats.

    scan = read("cells.ome.tif", unit="um")
    scan.pixels.shape, scan.spacing  # [channels, z, y, x], (0.5, 0.1, 0.1)

Read are OME-TIFF (tifffile), OME-Zarr (zarr), NIfTI (nibabel) and DICOM (pydicom), a file or a folder with the
slices of one series. Whatever the order of axes in the file, arrays come as ``[channels, z, y, x]`` or
``[channels, y, x]``, and spacing in the order (z, y, x). Metadata that are missing or cannot be true are errors.

A file is open only while it is read, and what was read does not change with the file. Reading works in forked workers
of a ``DataLoader``.
"""

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...geometry.grid import Grid, pyramid_grids
from ...optional import import_optional
from ..errors import ReadError, reading
from ..units import convert, number
from .formats import FORMATS, format_of
from .source import SPACE, Format, Index, Readable, Source, StoredImage, is_file_object, locate

if TYPE_CHECKING:
    import dask.array
    import zarr

    _Array = TypeVar("_Array", np.ndarray, dask.array.Array)

MAX_BYTES = 16 * 2**30  # as much memory as machines of today have: whoever wants more has to say so
_CHUNK_BYTES = 1024  # what it takes to keep account of a chunk, however small it is


class Scan(NamedTuple):
    """An image or volume with its pixel size.

    Attributes:
        pixels: ``[channels, *grid]``, rescaled where the format says so (NIfTI, DICOM).
        spacing: Size of a pixel per axis of the grid, in array-axis order (z, y, x), in the unit that was asked for.
    """

    pixels: Tensor
    spacing: tuple[float, ...]


class LazyScan(NamedTuple):
    """An image or volume whose pixels are not read yet, with its pixel size.

    Attributes:
        pixels: ``[channels, *grid]``, a Dask array.
        spacing: Size of a pixel per axis of the grid, in array-axis order (z, y, x), in the unit that was asked for.
    """

    pixels: "dask.array.Array"
    spacing: tuple[float, ...]


def read(
    source: Readable,
    unit: str = "um",
    *,
    level: int = 0,
    image: int | None = None,
    time: int | None = None,
    region: Sequence[slice] | None = None,
    assumed_unit: str | None = None,
    format: str | None = None,
    max_bytes: int | None = MAX_BYTES,
    spacing: Sequence[float] | None = None,
) -> Scan:
    """Reads an image or a volume and its pixel size.

    Args:
        source: A file ``.ome.tif``, ``.ome.tiff``, ``.nii``, ``.nii.gz`` or ``.dcm``, a folder with an OME-Zarr image,
            or a folder with the DICOM slices of one series. Besides paths: file objects that can seek, which stay
            open; addresses of `fsspec` (``"s3://bucket/cells.ome.zarr"``), but for folders of DICOM slices;
            ``zarr.Group``s.
        unit: The unit of the spacing that is returned, such as "um" or "mm".
        level: Level of a pyramid (OME-TIFF, OME-Zarr), 0 is the finest.
        image: Index of an OME-TIFF's image, needed where there are several.
        time: Index on the time axis, needed where there are several times.
        region: The part that is read, one slice of pixels per axis of the grid, (z, y, x) or (y, x); of OME-TIFF,
            OME-Zarr and ``.nii`` nothing else is read. None is the whole.
        assumed_unit: The unit of sizes whose unit the file does not say; None makes that an error.
        format: The ending that tells the format (``".nii.gz"``), or a name with that ending, if the source's own name
            does not: a file object often has none.
        max_bytes: What the pixels that are read may take in memory, as the file's metadata promise it, before any are
            read; None is no limit. Rearranged and rescaled pixels take twice as much for a while. With a limit, chunks
            of OME-Zarr have to have codecs whose output can be limited too: those that zarr itself brings are.
        spacing: The pixel size of the level, per axis in ``unit``, in place of what the file says or does not say.

    Raises:
        ReadError: If the file cannot be read, the pixel size is missing or absurd, or pixels take more memory; a
            ``ValueError`` that begins with the file's name.
        ValueError: If the format is another, or ``unit`` is no length.
        FileNotFoundError: If there is no such file.
        ImportError: If the format's package is not installed; with the extra that installs it.
    """
    place, form = _locate(source, format)
    stored = _open(place, form, level, image, max_bytes)
    size = _spacing(stored, place.name, unit, assumed_unit) if spacing is None else tuple(map(float, spacing))
    index = _index(stored, place.name, time, region)
    _check_size(_selected(index), stored, place.name, max_bytes)
    _check_size(stored.chunks, stored, place.name, max_bytes)
    pixels = _arrange(_load(stored, index, place.name), stored)
    return Scan(torch.from_numpy(np.require(pixels, requirements=["C", "W"])), size)


def read_lazy(
    source: "str | PathLike | zarr.Group",
    unit: str = "um",
    *,
    level: int = 0,
    image: int | None = None,
    time: int | None = None,
    assumed_unit: str | None = None,
    format: str | None = None,
    max_bytes: int | None = MAX_BYTES,
) -> LazyScan:
    """Reads the pixel size of an image or a volume, and its pixels when and where they are computed.

    Blocks are read from OME-TIFF, OME-Zarr and ``.nii``, a ``.nii.gz`` is one block; DICOM is not read lazily. A block
    has one or several chunks of the file, up to ``array.chunk-size`` of Dask's configuration. The file is opened anew
    for each block. In forked workers compute with ``scheduler="synchronous"``: Dask's pool of threads does not survive
    a fork.

    Args:
        source: See `read`; no file object.
        unit: See `read`.
        level: See `read`.
        image: See `read`.
        time: See `read`.
        assumed_unit: See `read`.
        format: See `read`.
        max_bytes: What a block may take in memory, and so may the account of all blocks.

    Raises:
        ReadError: As `read` does; errors of pixels come when they are computed.
    """
    place, form = _locate(source, format)
    if not form.in_parts or is_file_object(place.place):
        allowed = ", ".join(form.name for form in FORMATS if form.in_parts)
        raise ValueError(f"{place.name}: read_lazy reads paths of {allowed}")
    stored = _open(place, form, level, image, max_bytes)
    spacing = _spacing(stored, place.name, unit, assumed_unit)
    index = _index(stored, place.name, time, None)
    _check_size(stored.chunks, stored, place.name, max_bytes)
    return LazyScan(_arrange(_blocks(stored, place.name, max_bytes)[index], stored), spacing)


def read_spacing(
    source: Readable,
    unit: str = "um",
    *,
    level: int = 0,
    image: int | None = None,
    assumed_unit: str | None = None,
    format: str | None = None,
) -> tuple[float, ...]:
    """Reads the pixel size alone, (z, y, x) or (y, x); see `read`."""
    place, form = _locate(source, format)
    return _spacing(_open(place, form, level, image, None), place.name, unit, assumed_unit)


def read_grids(
    source: Readable,
    unit: str = "um",
    *,
    image: int | None = None,
    assumed_unit: str | None = None,
    format: str | None = None,
    spacing: Sequence[float] | None = None,
) -> list[Grid]:
    """Reads where the pixels of each level of a pyramid are, level 0 first: shape, spacing and origin; see `read`.

    Origins are those of the file (the translations of OME-Zarr) if one of its levels has one; else levels share their
    outer corner, at zero. ``spacing`` is level 0's pixel size in ``unit``, in place of what the file says or does not
    say: levels share their field of view then, and its outer corner is at zero.
    """
    place, form = _locate(source, format)
    levels = [_open(place, form, 0, image, None)]
    levels += [_open(place, form, level, image, None) for level in range(1, levels[0].levels)]
    if spacing is not None:
        shapes = [_shape(stored) for stored in levels]
        if len(spacing) != len(shapes[0]):
            raise ReadError(f"{place.name}: spacing must have {len(shapes[0])} values, one per axis, got {spacing}")
        return pyramid_grids(shapes, tuple(map(float, spacing)), reference=[1.0] * len(spacing))
    placed = any(stored.offsets is not None for stored in levels)
    return [_grid(stored, _spacing(stored, place.name, unit, assumed_unit), placed) for stored in levels]


def _shape(stored: StoredImage) -> tuple[int, ...]:
    sizes = dict(zip(stored.axes, stored.shape, strict=True))
    return tuple(sizes[axis] for axis in _space(stored))


def _grid(stored: StoredImage, spacing: tuple[float, ...], placed: bool) -> Grid:
    space = _space(stored)
    origin = None
    if placed:
        offsets = stored.offsets or {}
        steps = [float(number(stored.sizes[axis].value) or 1) for axis in space]
        parts = zip(space, spacing, steps, strict=True)
        origin = [offsets.get(axis, 0.0) * (here / there) for axis, here, there in parts]  # in the unit asked for
    return Grid.create(_shape(stored), spacing, origin)


def is_readable(path: str | PathLike) -> bool:
    """Tells whether a file's name is that of a format which `read` reads; any folder may be one of DICOM slices."""
    return format_of(Source(str(path), Path(path).name.lower(), Path(path))) is not None


def _blocks(stored: StoredImage, file: str, max_bytes: int | None) -> "dask.array.Array":
    """Returns the array as it is in the file, in blocks of Dask's size or of the file's own larger chunks."""
    array = import_optional("dask.array", "data")
    utils, config = import_optional("dask.utils", "data"), import_optional("dask.config", "data")
    block = utils.parse_bytes(config.get("array.chunk-size"))
    blocks = math.prod(stored.shape) * _itemsize(stored) // block
    _check_bytes(blocks * _CHUNK_BYTES, stored.shape, file, max_bytes)
    chunks = stored.chunks if math.prod(stored.chunks) * _itemsize(stored) > block else "auto"
    meta = np.empty((0,) * len(stored.shape), stored.dtype)
    return array.from_array(_Blocks(stored, file), chunks=chunks, name=False, meta=meta, inline_array=True)


class _Blocks:
    """What Dask slices: an array that is read from its file again with each access."""

    def __init__(self, stored: StoredImage, name: str):
        self.shape, self.chunks, self.ndim = stored.shape, stored.chunks, len(stored.shape)
        self.dtype = stored.dtype
        self._stored, self._name = stored, name

    def __getitem__(self, index: Index) -> np.ndarray:
        # Dask leaves out what is as by default, and has integers of NumPy
        parts = zip(index, self.shape, strict=True)
        full = tuple(slice(*part.indices(size)) if isinstance(part, slice) else int(part) for part, size in parts)
        return _load(self._stored, full, self._name)


def _locate(source: Readable, name: str | None) -> tuple[Source, Format]:
    place = locate(source, name)
    form = format_of(place)
    if form is None:
        endings = ", ".join(ending for form in FORMATS for ending in form.endings)
        raise ValueError(f"{place.name}: must be one of {endings} or a folder of DICOM slices")
    return place, form


def _open(place: Source, form: Format, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
    if level and not form.has_levels:
        raise ReadError(f"{place.name}: level must be 0 in a format without pyramids, got {level}")
    if image is not None and not form.has_images:
        raise ReadError(f"{place.name}: image must be None in a format of one image, got {image}")
    with reading(place.name):
        stored = form.open(place, level, image, max_bytes)
    if stored.dtype is not None and (stored.dtype.kind not in "buif" or stored.dtype.itemsize > 8):
        raise ReadError(f"{place.name}: pixels must be numbers, got {stored.dtype}")
    return stored


def _space(stored: StoredImage) -> str:
    """Returns the spatial axes in our order; a single plane is an image."""
    sizes = dict(zip(stored.axes, stored.shape, strict=True))
    return "".join(axis for axis in SPACE if axis in sizes and (axis != "z" or sizes[axis] > 1))


def _spacing(stored: StoredImage, file: str, unit: str, assumed_unit: str | None) -> tuple[float, ...]:
    return tuple(convert(stored.sizes, _space(stored), unit, file, assumed_unit))


def _index(stored: StoredImage, file: str, time: int | None, region: Sequence[slice] | None) -> Index:
    """Returns the part of the array that is asked for; axes that are not ours have one entry."""
    if time and "t" not in stored.axes:
        raise ReadError(f"{file}: time must be 0 or None where there is one time, got {time}")
    if len(set(stored.axes)) < len(stored.axes):
        raise ReadError(f"{file}: axes must differ, got {stored.axes!r}")
    space = _space(stored)
    slices = [slice(None)] * len(space) if region is None else list(region)
    if len(slices) != len(space):
        raise ReadError(f"{file}: region must have one slice for each of {', '.join(space)}, got {len(slices)}")
    sizes = dict(zip(stored.axes, stored.shape, strict=True))
    parts = {axis: _slice(part, axis, sizes[axis], file) for axis, part in zip(space, slices, strict=True)}
    parts["c"] = slice(0, sizes.get("c", 1), 1)
    return tuple(
        parts[axis] if axis in parts else _entry(axis, size, file, time)
        for axis, size in zip(stored.axes, stored.shape, strict=True)
    )


def _slice(part: slice, axis: str, size: int, file: str) -> slice:
    start, stop = part.start or 0, size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= start < stop <= size:
        raise ReadError(f"{file}: region along {axis} must be in slice(0, {size}) and have a step of 1, got {part}")
    return slice(start, stop, 1)


def _entry(axis: str, size: int, file: str, time: int | None) -> int:
    if axis == "t" and time is not None:
        if not 0 <= time < size:
            raise ReadError(f"{file}: time must be from 0 to {size - 1}, got {time}")
        return time
    if size > 1:
        unknown = f"entries along the axis {axis!r}, which has no meaning here"
        raise ReadError(f"{file}: has {size} {'times: choose one with time' if axis == 't' else unknown}")
    return 0


def _selected(index: Index) -> tuple[int, ...]:
    """Returns the shape of a part, with axes of one entry; sizes in metadata may be larger than what ``range`` has."""
    return tuple(1 if isinstance(part, int) else -(-(part.stop - part.start) // part.step) for part in index)


def _itemsize(stored: StoredImage) -> int:
    return 8 if stored.dtype is None else stored.dtype.itemsize


def _check_size(shape: tuple[int, ...], stored: StoredImage, file: str, max_bytes: int | None) -> None:
    """Fails if pixels, or the account of the chunks that hold them, take too much memory."""
    pieces = math.prod(-(-size // max(piece, 1)) for size, piece in zip(shape, stored.pieces, strict=True))
    _check_bytes(max(math.prod(shape) * _itemsize(stored), (pieces - 1) * _CHUNK_BYTES), shape, file, max_bytes)


def _check_bytes(promised: int, shape: tuple[int, ...], file: str, max_bytes: int | None) -> None:
    if max_bytes is not None and promised > max_bytes:
        gigabytes = f"{min(promised, 10**30) / 2**30:,.1f} GiB"  # integers may be larger than floats
        which = f"to read pixels of the shape {shape!s:.100}"
        raise ReadError(f"{file}: takes {gigabytes} {which}, max_bytes allows {max_bytes}: raise it, or read a region")


def _load(stored: StoredImage, index: Index, file: str) -> np.ndarray:
    with reading(file):
        pixels = np.asarray(stored.load(index))
    if pixels.dtype.kind not in "buif":
        raise ReadError(f"{file}: pixels must be numbers, got {pixels.dtype}")
    shape = tuple(size for part, size in zip(index, _selected(index), strict=True) if isinstance(part, slice))
    if pixels.shape != shape:
        raise ReadError(f"{file}: must have pixels of the shape {shape}, got {pixels.shape}")
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _arrange(pixels: "_Array", stored: StoredImage) -> "_Array":
    """Returns an array, read or lazy, as ``[channels, *grid]``."""
    order = "c" + _space(stored)
    axes = "".join(axis for axis in stored.axes if axis in order)
    if "c" not in axes:
        return pixels[None].transpose([("c" + axes).index(axis) for axis in order])
    return pixels.transpose([axes.index(axis) for axis in order])
