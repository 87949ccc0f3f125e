"""The pixels of DICOM images: checked against the header before any are decoded, then rescaled."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...optional import import_optional
from ..errors import reading
from .dicom_geometry import Plane
from .dicom_header import HEAD, first_given, frame_groups, group_value, numbers, read_elements
from .frames import frame_size

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_RLE = "1.2.840.10008.1.2.5"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_TRANSFORMATION, _RESCALE = "PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")


class DicomImage(NamedTuple):
    """What a file says of its image.

    Attributes:
        file: Its name.
        head: All elements in front of the pixels.
        axes: Letters of a frame's axes: y, x, c.
        shape: A frame's.
        frames: Their number.
        size: Bytes of the pixels, when they are not compressed.
        common: What slices of one volume have in common.
        planes: One per frame; one, if frames have none of their own.
    """

    file: Path
    head: "Dataset"
    axes: str
    shape: tuple[int, ...]
    frames: int
    size: int
    common: dict[str, str]
    planes: list[Plane]


def least_bytes(syntax: "UID", size: int, frames: int) -> float:
    """Returns the bytes that pixels take at least: run lengths save up to 63 of 64, deflate up to 1031 of 1032."""
    if syntax.is_deflated:
        return size / 1032
    if syntax == _RLE:
        return size / 64
    return 8 * frames if syntax.is_encapsulated else size  # a frame is an item, whose tag and length are 8 bytes


def read_pixels(image: DicomImage) -> np.ndarray:
    """Reads the pixels as what they stand for: Hounsfield units, doses and the like."""
    with reading(image.file):
        data = read_elements(image.file, image.size + HEAD, stop_before_pixels=False)
        _check_stored(data, image)
        pixels = data.pixel_array
        shape = (image.frames, *image.shape) if image.frames > 1 else image.shape
        if pixels.shape != shape:
            raise ValueError(f"{image.file}: has pixels of {pixels.shape}, its header says {shape}")
        return _rescale(pixels, data, image.frames)


def _check_stored(data: "Dataset", image: DicomImage) -> None:
    """Checks that as many pixels are stored as the header says, before any are decoded."""
    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        stored = next((data[keyword].value for keyword in _PIXELS if keyword in data), b"")  # none: pydicom's error
        if stored[image.size + image.size % 2 :].strip(b"\0"):  # zeros are padding
            raise ValueError(f"{image.file}: has {len(stored)} bytes of pixels, its header says {image.size}")
        return
    table = (data.get("ExtendedOffsetTable"), data.get("ExtendedOffsetTableLengths"))
    frames = import_optional("pydicom.encaps", "data").generate_frames(
        data.PixelData, number_of_frames=image.frames, extended_offsets=None if None in table else table
    )
    longest = 2 * image.size // image.frames + 128  # of run lengths, for pixels that all differ from the next
    number = 0
    for number, frame in enumerate(frames, 1):  # noqa: B007
        if syntax == _RLE and len(frame) > longest:
            raise ValueError(f"{image.file}: a frame has {len(frame)} bytes of run lengths, {longest} are enough")
        if syntax != _RLE and (size := frame_size(frame)) != image.shape[:2]:
            raise ValueError(f"{image.file}: a compressed frame is of {size} pixels, the header says {image.shape[:2]}")
    if number != image.frames:
        raise ValueError(f"{image.file}: has {number} frames, its header says {image.frames}")


def _rescale(pixels: np.ndarray, data: "Dataset", frames: int) -> np.ndarray:
    """Applies the scales of all frames or of each: if one has a scale, the standard wants all to."""
    dose = numbers(data.get("DoseGridScaling"), 1, "DoseGridScaling")
    if dose:
        return pixels * dose[0]
    if data.get("ModalityLUTSequence"):
        return import_optional("pydicom.pixels", "data").apply_modality_lut(pixels, data)
    scaling = [
        [first_given(group_value(data, group, _TRANSFORMATION, keyword), data.get(keyword)) for keyword in _RESCALE]
        for group in frame_groups(data, frames)
    ]
    if all(value is None for scale in scaling for value in scale):
        return pixels
    scales = np.array(scaling, dtype=float)  # [frames or 1, 2]; None becomes NaN
    if not np.isfinite(scales).all():
        raise ValueError(f"{' and '.join(_RESCALE)} must be numbers in all frames, got {scaling}")
    slopes, offsets = scales.T.reshape(2, -1, *[1] * (pixels.ndim - 1))
    return pixels * slopes + offsets
