"""Pixel size of DICOM images, in millimetres, on `pydicom`.

A slice's pixels are as far apart as PixelSpacing says; slices are as far apart as their positions are, whatever their
thickness is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .optional import need

_EVEN = 1e-2  # by what part of their distance slices may be off: positions are written with few digits


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


def open_series(path: Path) -> Series:
    """Reads what a file or a folder of slices says, without its pixels.

    Raises:
        ValueError: If a folder has slices of several series, or slices are not evenly spaced.
    """
    if path.is_dir():
        return _open_folder(path)
    head = _head(path)
    if "TotalPixelMatrixRows" in head:
        raise ValueError(f"{path}: a slide in tiles is not read: use OME-TIFF or OME-Zarr")
    frames = int(head.get("NumberOfFrames", 1))
    axes, shape = _plane(head)
    sizes = _plane_sizes(_measures(head))
    if frames > 1:
        axes, shape = "z" + axes, (frames, *shape)
        sizes.update(_frame_distance(head, frames, str(path)))
    return Series(axes, shape, sizes, lambda: _pixels(path))


def _open_folder(path: Path) -> Series:
    misc = need("pydicom.misc", "data")
    files = [file for file in sorted(path.iterdir()) if file.is_file() and misc.is_dicom(file)]
    if not files:
        raise ValueError(f"{path}: has no DICOM files")
    heads = [_head(file) for file in files]
    kinds = {(str(h.get("SeriesInstanceUID")), h.Rows, h.Columns, tuple(h.get("PixelSpacing", ()))) for h in heads}
    if len(kinds) > 1:
        raise ValueError(f"{path}: must have the slices of one series, of one size, got {len(kinds)} kinds")
    axes, shape = _plane(heads[0])
    sizes = _plane_sizes(heads[0])
    if len(files) > 1:
        heights = _heights(heads, str(path))
        files = [files[index] for index in np.argsort(heights)]
        sizes["z"] = _distance(heights, str(path))
    return Series("z" + axes, (len(files), *shape), sizes, lambda: np.stack([_pixels(file) for file in files]))


def _head(file: Path) -> Any:
    return need("pydicom", "data").dcmread(file, stop_before_pixels=True)


def _pixels(file: Path) -> np.ndarray:
    pydicom = need("pydicom", "data")
    data = pydicom.dcmread(file)
    return need("pydicom.pixels", "data").apply_modality_lut(data.pixel_array, data)


def _plane(head: Any) -> tuple[str, tuple[int, ...]]:
    colours = int(head.get("SamplesPerPixel", 1))
    return ("yx", (head.Rows, head.Columns)) if colours == 1 else ("yxc", (head.Rows, head.Columns, colours))


def _measures(head: Any) -> Any:
    """Returns what holds PixelSpacing: the functional groups of an enhanced image, else the image itself."""
    groups = head.get("SharedFunctionalGroupsSequence") or head.get("PerFrameFunctionalGroupsSequence") or [head]
    return (groups[0].get("PixelMeasuresSequence") or [head])[0]


def _plane_sizes(head: Any) -> dict[str, float]:
    spacing = head.get("PixelSpacing")  # between rows, between columns
    return {} if spacing is None else {"y": float(spacing[0]), "x": float(spacing[1])}


def _frame_distance(head: Any, frames: int, file: str) -> dict[str, float]:
    """Returns the distance of an image's frames, from their positions, or else as it is said."""
    groups = head.get("PerFrameFunctionalGroupsSequence") or []
    planes = [_frame_plane(head, group) for group in groups]
    if len(planes) == frames and all(plane is not None for plane in planes):
        return {"z": _distance(_along_normal(planes), file, in_order=True)}
    offsets = head.get("GridFrameOffsetVector")  # of doses
    if offsets is not None:
        return {"z": _distance([float(v) for v in offsets], file, in_order=True)}
    said = _measures(head).get("SpacingBetweenSlices") or head.get("SpacingBetweenSlices")
    return {} if said is None else {"z": float(said)}


def _frame_plane(head: Any, group: Any) -> tuple[Sequence[float], Sequence[float]] | None:
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    position = group.get("PlanePositionSequence")
    orientation = group.get("PlaneOrientationSequence") or shared.get("PlaneOrientationSequence")
    if not position or not orientation:
        return None
    return position[0].ImagePositionPatient, orientation[0].ImageOrientationPatient


def _heights(heads: Sequence[Any], file: str) -> list[float]:
    planes = [(head.get("ImagePositionPatient"), head.get("ImageOrientationPatient")) for head in heads]
    if any(position is None or orientation is None for position, orientation in planes):
        raise ValueError(f"{file}: slices have no position (ImagePositionPatient, ImageOrientationPatient)")
    return _along_normal(planes)


def _along_normal(planes: Sequence[Any]) -> list[float]:
    """Returns where planes lie along the first one's normal."""
    turn = np.array(planes[0][1], dtype=float)
    normal = np.cross(turn[:3], turn[3:])
    return [float(np.dot(normal, np.array(position, dtype=float))) for position, _ in planes]


def _distance(heights: Sequence[float], file: str, in_order: bool = False) -> float:
    """Returns the mean distance of planes, which have to be evenly spaced."""
    steps = np.diff(heights if in_order else sorted(heights))
    mean = float(abs(steps.mean()))
    if not (abs(abs(steps) - mean) <= _EVEN * mean).all() or mean == 0 or len(set(np.sign(steps))) > 1:
        raise ValueError(
            f"{file}: slices must be evenly spaced, distances are {abs(steps).min():g} to {abs(steps).max():g} mm"
        )
    return mean
