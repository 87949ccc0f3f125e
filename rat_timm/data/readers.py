"""Readers of images and volumes with their pixel size, on the packages that own the formats.

    scan = read("cells.ome.tif", unit="um")
    scan.pixels.shape, scan.spacing  # [channels, z, y, x], (0.5, 0.1, 0.1)

Read are OME-TIFF (tifffile), OME-Zarr (ome-zarr), NIfTI (nibabel) and DICOM (pydicom), a file or a folder with the
slices of one series. Whatever the order of axes in the file, arrays come as ``[channels, z, y, x]`` or
``[channels, y, x]``, and spacing in the order (z, y, x). Metadata that are missing or cannot be true are errors.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import dicom
from .optional import need
from .units import Length, convert

SPACE = "zyx"


class Scan(NamedTuple):
    """An image or volume with its pixel size.

    Attributes:
        pixels: ``[channels, *grid]``, as the file's numbers; DICOM's after its rescaling.
        spacing: Size of a pixel per axis of the grid, in array-axis order (z, y, x), in the unit that was asked for.
    """

    pixels: Tensor
    spacing: tuple[float, ...]


class _Found(NamedTuple):
    """What a format's reader finds in a file.

    Attributes:
        axes: One letter per axis of the array: t, c, z, y, x, or another.
        shape: The array's.
        sizes: Pixel size of spatial axes, as far as the file says it.
        load: Reads the array.
    """

    axes: str
    shape: tuple[int, ...]
    sizes: Mapping[str, Length]
    load: Callable[[], np.ndarray]


def read(
    path: str | PathLike,
    unit: str = "um",
    *,
    level: int = 0,
    time: int | None = None,
    assumed_unit: str | None = None,
) -> Scan:
    """Reads an image or a volume and its pixel size.

    Args:
        path: A file ``.ome.tif``, ``.ome.tiff``, ``.nii``, ``.nii.gz`` or ``.dcm``, a folder ``.zarr``, or a folder
            with the DICOM slices of one series.
        unit: The unit of the spacing that is returned, such as "um" or "mm".
        level: Level of a pyramid (OME-TIFF, OME-Zarr), 0 is the finest.
        time: Index on the time axis, needed where there are several times.
        assumed_unit: The unit of sizes whose unit the file does not say; None makes that an error.

    Raises:
        ValueError: If the format is another, or the pixel size is missing or absurd; with the file's name.
        ImportError: If the format's package is not installed; with the extra that installs it.
    """
    found = _open(Path(path), level)
    spacing = _spacing(found, str(path), unit, assumed_unit)
    return Scan(torch.from_numpy(_arrange(found, str(path), time)), spacing)


def read_spacing(
    path: str | PathLike, unit: str = "um", *, level: int = 0, assumed_unit: str | None = None
) -> tuple[float, ...]:
    """Reads the pixel size alone, (z, y, x) or (y, x); see `read`."""
    return _spacing(_open(Path(path), level), str(path), unit, assumed_unit)


def is_readable(path: str | PathLike) -> bool:
    """Tells whether a file's name, or a folder's, is that of a format which `read` knows."""
    return _format(Path(path)) is not None


def _open(path: Path, level: int) -> _Found:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    opener = _format(path)
    if opener is None:
        raise ValueError(f"{path}: must be one of {', '.join(_FORMATS)} or a folder of DICOM slices")
    if level and opener not in (_open_ome_tiff, _open_ome_zarr):
        raise ValueError(f"{path}: level must be 0 in a format without pyramids, got {level}")
    return opener(path, level)


def _format(path: Path) -> Callable[[Path, int], _Found] | None:
    name = path.name.lower()
    for ending, opener in _FORMATS.items():
        if name.endswith(ending):
            return opener
    return _open_dicom if path.is_dir() else None


def _space(found: _Found) -> str:
    """Returns the spatial axes in our order; a single plane is an image."""
    sizes = dict(zip(found.axes, found.shape, strict=True))
    return "".join(axis for axis in SPACE if axis in sizes and (axis != "z" or sizes[axis] > 1))


def _spacing(found: _Found, file: str, unit: str, assumed_unit: str | None) -> tuple[float, ...]:
    return tuple(convert(found.sizes, _space(found), unit, file, assumed_unit))


def _arrange(found: _Found, file: str, time: int | None) -> np.ndarray:
    """Returns the array as ``[channels, *grid]``."""
    pixels, axes, space = found.load(), found.axes, _space(found)
    for place in reversed(range(len(axes))):
        if axes[place] not in "c" + space:
            pixels = np.take(pixels, _index(axes[place], pixels.shape[place], file, time), axis=place)
            axes = axes[:place] + axes[place + 1 :]
    if "c" not in axes:
        pixels, axes = pixels[None], "c" + axes
    pixels = pixels.transpose([axes.index(axis) for axis in "c" + space])
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _index(axis: str, size: int, file: str, time: int | None) -> int:
    if axis == "t" and time is not None:
        if not 0 <= time < size:
            raise ValueError(f"{file}: time must be from 0 to {size - 1}, got {time}")
        return time
    if size > 1:
        what = (
            "times: choose one with time"
            if axis == "t"
            else f"entries along the axis {axis!r}, which has no meaning here"
        )
        raise ValueError(f"{file}: has {size} {what}")
    return 0


def _open_ome_tiff(path: Path, level: int) -> _Found:
    tifffile = need("tifffile", "data")
    with tifffile.TiffFile(path) as tiff:
        if not tiff.is_ome:
            raise ValueError(f"{path}: must be an OME-TIFF, whose metadata say the pixel size; this is another TIFF")
        images = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]
        pixels = (images[0] if isinstance(images, list) else images)["Pixels"]
        levels = tiff.series[0].levels
        chosen, finest = _pick(levels, level, path), levels[0]
        axes = finest.axes.lower().replace("s", "c")
    if axes.count("c") > 1:
        raise ValueError(f"{path}: has both channels and colours (axes {finest.axes})")
    sizes = {
        axis: _times(
            Length(pixels.get(f"PhysicalSize{axis.upper()}"), pixels.get(f"PhysicalSize{axis.upper()}Unit", "um")),
            ratio,
        )
        for axis, ratio in zip(axes, np.divide(finest.shape, chosen.shape).tolist(), strict=True)
        if axis in SPACE
    }
    return _Found(axes, chosen.shape, sizes, lambda: tifffile.imread(path, series=0, level=level))


def _times(size: Length, ratio: float) -> Length:
    return size if size.value is None else Length(float(size.value) * ratio, size.unit)


def _pick(levels: Any, level: int, path: Path) -> Any:
    if not 0 <= level < len(levels):
        raise ValueError(f"{path}: level must be from 0 to {len(levels) - 1}, got {level}")
    return levels[level]


def _open_ome_zarr(path: Path, level: int) -> _Found:
    ome_zarr, zarr = need("ome_zarr", "data"), need("zarr", "data")
    group = zarr.open_group(path, mode="r")
    if not _says_scale(group):
        raise ValueError(f"{path}: must be OME-Zarr 0.4 or later, whose metadata say the pixel size")
    try:
        image = ome_zarr.OMEZarrMultiscale.from_ome_zarr(group)
    except ValueError as error:  # pydantic's too
        raise ValueError(f"{path}: metadata are no valid OME-Zarr: {error}") from error
    chosen, axes = _pick(image.images, level, path), "".join(image.images[0].axes)
    factors = _common_scale(image.metadata, len(axes))
    units = chosen.axes_units or {}
    sizes = {
        axis: Length(chosen.scale[axis] * factor, units.get(axis))
        for axis, factor in zip(axes, factors, strict=True)
        if axis in SPACE
    }
    return _Found(axes, chosen.data.shape, sizes, lambda: np.asarray(chosen.data))


def _says_scale(group: Any) -> bool:
    """Tells whether the metadata are of a version that has scales: ome-zarr makes them up for earlier ones."""
    scales = group.attrs.get("ome", group.attrs).get("multiscales", [])
    return bool(scales) and all("coordinateTransformations" in dataset for dataset in scales[0].get("datasets", []))


def _common_scale(metadata: Any, count: int) -> list[float]:
    """Returns the scale that metadata have for all levels, on top of each level's own, per axis."""
    common = metadata.coordinateTransformations or ()
    return next((list(part.scale) for part in common if part.type == "scale"), [1.0] * count)


def _open_nifti(path: Path, level: int) -> _Found:
    nibabel = need("nibabel", "data")
    image = nibabel.load(path)
    axes = "xyztc"[: image.ndim]
    unit = {"meter": "m", "mm": "mm", "micron": "um"}.get(image.header.get_xyzt_units()[0])
    values = nibabel.affines.voxel_sizes(image.affine).tolist()
    sizes = {axis: Length(value, unit) for axis, value in zip("xyz", values, strict=True)}
    return _Found(axes, image.shape, sizes, lambda: np.asarray(image.dataobj))


def _open_dicom(path: Path, level: int) -> _Found:
    series = dicom.open_series(path)
    sizes = {axis: Length(value, "mm") for axis, value in series.sizes.items()}
    return _Found(series.axes, series.shape, sizes, series.load)


_FORMATS: dict[str, Callable[[Path, int], _Found]] = {
    ".ome.tif": _open_ome_tiff,
    ".ome.tiff": _open_ome_tiff,
    ".zarr": _open_ome_zarr,
    ".nii": _open_nifti,
    ".nii.gz": _open_nifti,
    ".dcm": _open_dicom,
}
