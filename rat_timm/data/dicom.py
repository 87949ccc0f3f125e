"""Pixel size of DICOM images, in millimetres, on `pydicom`.

A slice's pixels are as far apart as PixelSpacing says; slices are as far apart as their positions are, whatever their
thickness is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..optional import need

_ROUNDING = 0.06  # millimetres by which written positions are off: some writers give one decimal


class Series(NamedTuple):
    """The image or volume of a file or a folder.

    Attributes:
        axes: Letters of the array's axes: z, y, x, c.
        shape: The array's.
        sizes: Millimetres per axis; without those that the file does not say.
        load: Reads the array, rescaled as the file says.
    """

    axes: str
    shape: tuple[int, ...]
    sizes: dict[str, float]
    load: Callable[[], np.ndarray]


class _Plane(NamedTuple):
    """Where a slice or a frame lies, as far as it is said."""

    spacing: Sequence[float] | None
    position: Sequence[float] | None
    orientation: Sequence[float] | None


def open_series(path: Path) -> Series:
    """Reads what a file or a folder of slices says, without its pixels.

    Raises:
        ValueError: If it is no image, or slices are not those of one volume: of one series, parallel, one above the
            other and evenly spaced.
    """
    files = [path]
    if path.is_dir():
        is_dicom = need("pydicom.misc", "data").is_dicom
        files = [file for file in sorted(path.iterdir()) if file.is_file() and is_dicom(file)]
    heads = [need("pydicom", "data").dcmread(file, stop_before_pixels=True) for file in files]
    images = [(file, head) for file, head in zip(files, heads, strict=True) if "Rows" in head]  # no reports, no plans
    if not images:
        raise ValueError(f"{path}: has no DICOM image")
    if len(images) == 1:
        return _open_file(*images[0], str(path))
    return _open_slices(images, str(path))


def _open_file(file: Path, head: Any, name: str) -> Series:
    if "TotalPixelMatrixRows" in head:
        raise ValueError(f"{name}: a slide in tiles is not read: use OME-TIFF or OME-Zarr")
    axes, shape, frames = *_array(head), _frames(head)
    planes = _frame_planes(head)
    sizes = _common_spacing(planes, name)
    if frames > 1:
        axes, shape = "z" + axes, (frames, *shape)
        sizes |= _frame_distance(head, planes, name)
    return Series(axes, shape, sizes, lambda: _pixels(file))


def _open_slices(images: Sequence[tuple[Path, Any]], name: str) -> Series:
    heads = [head for _, head in images]
    kinds = {(str(head.get("SeriesInstanceUID")), _frames(head), _array(head)) for head in heads}
    if len(kinds) > 1 or _frames(heads[0]) > 1:
        raise ValueError(f"{name}: must have the slices of one series, of one size, got {len(kinds)} kinds")
    planes = [_frame_planes(head)[0] for head in heads]
    sizes = _common_spacing(planes, name)
    if any(plane.position is None or plane.orientation is None for plane in planes):
        raise ValueError(f"{name}: slices have no position (ImagePositionPatient, ImageOrientationPatient)")
    order = np.argsort(_heights(planes, name))
    sizes["z"] = _distance([planes[index] for index in order], name)
    axes, shape = _array(heads[0])
    files = [images[index][0] for index in order]
    return Series("z" + axes, (len(files), *shape), sizes, lambda: np.stack([_pixels(file) for file in files]))


def _frames(head: Any) -> int:
    return int(head.get("NumberOfFrames") or 1)


def _array(head: Any) -> tuple[str, tuple[int, ...]]:
    colours = int(head.get("SamplesPerPixel", 1))
    return ("yx", (head.Rows, head.Columns)) if colours == 1 else ("yxc", (head.Rows, head.Columns, colours))


def _group_value(head: Any, frame: Any, sequence: str, keyword: str) -> Any:
    """Returns what a frame's functional group says, or else the group that all frames share; None if neither does."""
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    found = [part[0].get(keyword) for part in (frame.get(sequence), shared.get(sequence)) if part]
    return next((value for value in found if value is not None), None)


def _frame_planes(head: Any) -> list[_Plane]:
    """Returns the planes of an enhanced image's frames, else the image's own."""
    spacing = head.get("PixelSpacing")
    if not (head.get("PerFrameFunctionalGroupsSequence") or head.get("SharedFunctionalGroupsSequence")):
        return [_Plane(spacing, head.get("ImagePositionPatient"), head.get("ImageOrientationPatient"))]
    return [
        _Plane(
            _group_value(head, frame, "PixelMeasuresSequence", "PixelSpacing") or spacing,
            _group_value(head, frame, "PlanePositionSequence", "ImagePositionPatient"),
            _group_value(head, frame, "PlaneOrientationSequence", "ImageOrientationPatient"),
        )
        for frame in head.get("PerFrameFunctionalGroupsSequence") or [{}]
    ]


def _common_spacing(planes: Sequence[_Plane], name: str) -> dict[str, float]:
    """Returns what all planes say of their pixels: the distance between rows, and between columns."""
    said = {None if plane.spacing is None else tuple(map(float, plane.spacing)) for plane in planes}
    if len(said) > 1:
        raise ValueError(f"{name}: slices must have one pixel size, got {sorted(map(str, said))}")
    (spacing,) = said
    return {} if spacing is None else dict(zip("yx", spacing, strict=True))


def _frame_distance(head: Any, planes: Sequence[_Plane], name: str) -> dict[str, float]:
    """Returns the distance of an image's frames, from their positions, or else as it is said."""
    if len(planes) > 1 and all(plane.position is not None and plane.orientation is not None for plane in planes):
        return {"z": _distance(planes, name)}
    offsets = head.get("GridFrameOffsetVector")  # of doses
    if offsets is not None:
        return {"z": _distance([_Plane(None, (0, 0, offset), (1, 0, 0, 0, 1, 0)) for offset in offsets], name)}
    said = _group_value(head, {}, "PixelMeasuresSequence", "SpacingBetweenSlices") or head.get("SpacingBetweenSlices")
    return {} if said is None else {"z": float(said)}


def _normal(plane: _Plane) -> np.ndarray:
    turn = np.array(plane.orientation, dtype=float)
    return np.cross(turn[:3], turn[3:])


def _heights(planes: Sequence[_Plane], name: str) -> np.ndarray:
    """Returns where parallel planes lie along their normal."""
    turns = np.array([plane.orientation for plane in planes], dtype=float)
    if abs(turns - turns[0]).max() > 1e-3:
        raise ValueError(f"{name}: slices must be parallel, their orientations differ")
    return np.array([plane.position for plane in planes], dtype=float) @ _normal(planes[0])


def _distance(planes: Sequence[_Plane], name: str) -> float:
    """Returns the distance of planes, which have to lie one above the other, in order and evenly spaced."""
    heights, index = _heights(planes, name), np.arange(len(planes))
    distance, start = np.polyfit(index, heights, 1)
    steps = abs(np.diff(heights))
    allowed = max(0.01 * abs(distance), min(_ROUNDING, 0.1 * abs(distance)))
    if distance == 0 or abs(heights - start - distance * index).max() > allowed:
        raise ValueError(f"{name}: slices must be evenly spaced, distances are {steps.min():g} to {steps.max():g} mm")
    positions = np.array([plane.position for plane in planes], dtype=float)
    aside = positions - positions[0] - np.outer(heights - heights[0], _normal(planes[0]))
    if abs(np.diff(aside, axis=0)).max() > 2 * allowed:
        raise ValueError(f"{name}: slices must lie one above the other, each is moved aside (a tilted gantry)")
    return float(abs(distance))


def _pixels(file: Path) -> np.ndarray:
    """Reads the pixels as what they stand for: Hounsfield units, doses and the like."""
    data = need("pydicom", "data").dcmread(file)
    pixels = need("pydicom.pixels", "data").apply_modality_lut(data.pixel_array, data)
    if "DoseGridScaling" in data:
        return pixels * float(data.DoseGridScaling)
    frames = data.get("PerFrameFunctionalGroupsSequence") or [{}]
    scales = [[_group_value(data, frame, _TRANSFORMATION, keyword) for keyword in _RESCALE] for frame in frames]
    if all(None in scale for scale in scales):
        return pixels
    slopes, offsets = np.array(scales, dtype=float).T
    shape = (-1, *[1] * (pixels.ndim - 1)) if _frames(data) > 1 else (1,) * pixels.ndim
    return pixels * slopes.reshape(shape) + offsets.reshape(shape)


_TRANSFORMATION, _RESCALE = "PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")
