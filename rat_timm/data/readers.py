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

from ..optional import need
from . import dicom
from .units import NIFTI_UNITS, Length, convert

SPACE = "zyx"


class Scan(NamedTuple):
    """An image or volume with its pixel size.

    Attributes:
        pixels: ``[channels, *grid]``, rescaled where the format says so (NIfTI, DICOM).
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
        load: Reads the array, or the part of an index.
    """

    axes: str
    shape: tuple[int, ...]
    sizes: Mapping[str, Length]
    load: Callable[[tuple[int | slice, ...]], np.ndarray]


def read(
    path: str | PathLike,
    unit: str = "um",
    *,
    level: int = 0,
    image: int | None = None,
    time: int | None = None,
    assumed_unit: str | None = None,
) -> Scan:
    """Reads an image or a volume and its pixel size.

    Args:
        path: A file ``.ome.tif``, ``.ome.tiff``, ``.nii``, ``.nii.gz`` or ``.dcm``, a folder with an OME-Zarr image, or
            a folder with the DICOM slices of one series.
        unit: The unit of the spacing that is returned, such as "um" or "mm".
        level: Level of a pyramid (OME-TIFF, OME-Zarr), 0 is the finest.
        image: Index of an OME-TIFF's image, needed where there are several.
        time: Index on the time axis, needed where there are several times.
        assumed_unit: The unit of sizes whose unit the file does not say; None makes that an error.

    Raises:
        ValueError: If the format is another, or the pixel size is missing or absurd; with the file's name.
        ImportError: If the format's package is not installed; with the extra that installs it.
    """
    found = _open(Path(path), level, image)
    spacing = _spacing(found, str(path), unit, assumed_unit)
    return Scan(torch.from_numpy(_arrange(found, str(path), time)), spacing)


def read_spacing(
    path: str | PathLike,
    unit: str = "um",
    *,
    level: int = 0,
    image: int | None = None,
    assumed_unit: str | None = None,
) -> tuple[float, ...]:
    """Reads the pixel size alone, (z, y, x) or (y, x); see `read`."""
    return _spacing(_open(Path(path), level, image), str(path), unit, assumed_unit)


def is_readable(path: str | PathLike) -> bool:
    """Tells whether a file's name is that of a format which `read` knows; it may know any folder."""
    return _format(Path(path)) is not None


def _open(path: Path, level: int, image: int | None) -> _Found:
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    opener = _format(path)
    if opener is None:
        raise ValueError(f"{path}: must be one of {', '.join(_FORMATS)} or a folder of DICOM slices")
    if level and opener not in (_open_ome_tiff, _open_ome_zarr):
        raise ValueError(f"{path}: level must be 0 in a format without pyramids, got {level}")
    if image is not None and opener is not _open_ome_tiff:
        raise ValueError(f"{path}: image must be None in a format of one image, got {image}")
    try:
        return opener(path, level, image)
    except (ImportError, OSError):
        raise
    except Exception as error:  # each package has errors of its own, few of which name the file
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _format(path: Path) -> "Callable[[Path, int, int | None], _Found] | None":
    name = path.name.lower()
    for ending, opener in _FORMATS.items():
        if name.endswith(ending):
            return opener
    if any((path / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup")):
        return _open_ome_zarr
    return _open_dicom if path.is_dir() else None


def _space(found: _Found) -> str:
    """Returns the spatial axes in our order; a single plane is an image."""
    sizes = dict(zip(found.axes, found.shape, strict=True))
    return "".join(axis for axis in SPACE if axis in sizes and (axis != "z" or sizes[axis] > 1))


def _spacing(found: _Found, file: str, unit: str, assumed_unit: str | None) -> tuple[float, ...]:
    return tuple(convert(found.sizes, _space(found), unit, file, assumed_unit))


def _arrange(found: _Found, file: str, time: int | None) -> np.ndarray:
    """Returns the array as ``[channels, *grid]``."""
    kept = "c" + _space(found)
    if time and "t" not in found.axes:
        raise ValueError(f"{file}: time must be 0 or None where there is one time, got {time}")
    index = tuple(
        slice(None) if axis in kept else _index(axis, size, file, time)
        for axis, size in zip(found.axes, found.shape, strict=True)
    )
    pixels, axes = found.load(index), [axis for axis in found.axes if axis in kept]
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"{file}: pixels must be numbers, got {pixels.dtype}")
    if "c" not in axes:
        pixels, axes = pixels[None], ["c", *axes]
    pixels = pixels.transpose([axes.index(axis) for axis in kept])
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _index(axis: str, size: int, file: str, time: int | None) -> int:
    if axis == "t" and time is not None:
        if not 0 <= time < size:
            raise ValueError(f"{file}: time must be from 0 to {size - 1}, got {time}")
        return time
    if size > 1:
        unknown = f"entries along the axis {axis!r}, which has no meaning here"
        raise ValueError(f"{file}: has {size} {'times: choose one with time' if axis == 't' else unknown}")
    return 0


def _open_ome_tiff(path: Path, level: int, image: int | None) -> _Found:
    tifffile = need("tifffile", "data")
    with tifffile.TiffFile(path) as tiff:
        if not tiff.is_ome:
            raise ValueError(f"{path}: must be an OME-TIFF, whose metadata say the pixel size; this is another TIFF")
        number, metadata = _pick_image(tifffile.xml2dict(tiff.ome_metadata)["OME"], len(tiff.series), image, path)
        levels = tiff.series[number].levels
        chosen, finest = _pick(levels, level, path), levels[0]
        if any(page is None for page in chosen.pages):
            raise ValueError(f"{path}: planes are missing: a file of the set is not there")
    axes = finest.axes.lower().replace("s", "c")
    if axes.count("c") > 1:
        raise ValueError(f"{path}: has both channels and colours (axes {finest.axes})")
    sizes = {
        axis: _tiff_size(metadata["Pixels"], axis.upper(), full / size)
        for axis, full, size in zip(axes, finest.shape, chosen.shape, strict=True)
        if axis in SPACE
    }
    return _Found(axes, chosen.shape, sizes, lambda part: tifffile.imread(path, series=number, level=level)[part])


def _pick_image(ome: Any, count: int, image: int | None, path: Path) -> tuple[int, Any]:
    """Returns the number and the metadata of the image that is asked for."""
    images = ome.get("Image", [])
    images = images if isinstance(images, list) else [images]
    if len(images) != count:
        raise ValueError(f"{path}: metadata are of {len(images)} images, the file has {count}")
    if count > 1 and image is None:
        raise ValueError(f"{path}: has {count} images (or its set of files has): choose one with image")
    image = image or 0
    if not 0 <= image < count:
        raise ValueError(f"{path}: image must be from 0 to {count - 1}, got {image}")
    return image, images[image]


def _tiff_size(pixels: Mapping[str, Any], axis: str, ratio: float) -> Length:
    """Returns a level's pixel size, which is so much larger than the first level's."""
    value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "um")
    return Length(None if value is None else float(value) * ratio, unit)


def _pick(levels: Any, level: int, path: Path) -> Any:
    if not 0 <= level < len(levels):
        raise ValueError(f"{path}: level must be from 0 to {len(levels) - 1}, got {level}")
    return levels[level]


def _open_ome_zarr(path: Path, level: int, image: int | None) -> _Found:
    ome_zarr, zarr = need("ome_zarr", "data"), need("zarr", "data")
    group = zarr.open_group(path, mode="r")
    if not _says_scale(group):
        raise ValueError(f"{path}: must be an image of OME-Zarr 0.4 or later, whose metadata say the pixel size")
    found = ome_zarr.OMEZarrMultiscale.from_ome_zarr(group)
    chosen, letters = _pick(found.images, level, path), [_letter(axis) for axis in found.metadata.axes]
    factors, units = _common_scale(found.metadata, len(letters)), chosen.axes_units or {}
    sizes = {
        letter: Length(chosen.scale[name] * factor, units.get(name))
        for letter, name, factor in zip(letters, chosen.axes, factors, strict=True)
        if letter in SPACE
    }
    return _Found("".join(letters), chosen.data.shape, sizes, lambda part: np.asarray(chosen.data[part]))


def _letter(axis: Any) -> str:
    """Returns the letter of an axis; "?" for one that has none."""
    letter = {"channel": "c", "time": "t"}.get(axis.type, str(axis.name).lower())
    return letter if len(letter) == 1 else "?"


def _says_scale(group: Any) -> bool:
    """Tells whether the metadata are of a version that has scales: ome-zarr makes them up for earlier ones."""
    scales = group.attrs.get("ome", group.attrs).get("multiscales", [])
    return bool(scales) and all("coordinateTransformations" in dataset for dataset in scales[0].get("datasets", []))


def _common_scale(metadata: Any, count: int) -> list[float]:
    """Returns the scale that metadata have for all levels, on top of each level's own, per axis."""
    common = metadata.coordinateTransformations or ()
    return next((list(part.scale) for part in common if part.type == "scale"), [1.0] * count)


def _open_nifti(path: Path, level: int, image: int | None) -> _Found:
    nibabel = need("nibabel", "data")
    volume = nibabel.load(path)
    if volume.ndim > 5:
        raise ValueError(f"{path}: must have at most 5 axes (x, y, z, time, channel), got {volume.ndim}")
    unit = NIFTI_UNITS.get(int(volume.header["xyzt_units"]) & 7)
    sizes = {axis: Length(value, unit) for axis, value in zip("xyz", _nifti_sizes(volume, path), strict=True)}
    return _Found("xyztc"[: volume.ndim], volume.shape, sizes, lambda part: np.asarray(volume.dataobj[part]))


def _nifti_sizes(volume: Any, path: Path) -> list[float]:
    """Returns the sizes of the affine matrix, or those of the header as it is written: nibabel puts 1 for 0."""
    nibabel = need("nibabel", "data")
    if not int(volume.header["sform_code"]):
        with nibabel.openers.ImageOpener(path) as file:
            written = type(volume.header).from_fileobj(file, check=False)
        return written["pixdim"][1:4].tolist()
    turn = volume.affine[:3, :3]
    sizes = nibabel.affines.voxel_sizes(volume.affine)
    angles = turn.T @ turn - np.diag(sizes**2)
    if abs(angles).max() > 1e-3 * (sizes**2).max():
        raise ValueError(f"{path}: voxels must have right angles, the affine matrix shears them")
    return sizes.tolist()


def _open_dicom(path: Path, level: int, image: int | None) -> _Found:
    series = dicom.open_series(path)
    sizes = {axis: Length(value, "mm") for axis, value in series.sizes.items()}
    return _Found(series.axes, series.shape, sizes, lambda part: series.load()[part])


_FORMATS: "dict[str, Callable[[Path, int, int | None], _Found]]" = {
    ".ome.tif": _open_ome_tiff,
    ".ome.tiff": _open_ome_tiff,
    ".zarr": _open_ome_zarr,
    ".nii": _open_nifti,
    ".nii.gz": _open_nifti,
    ".dcm": _open_dicom,
}
