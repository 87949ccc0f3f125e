"""Pixel size of DICOM images, in millimetres, on `pydicom`.

A slice's pixels are as far apart as PixelSpacing says; slices are as far apart as their positions are, whatever their
thickness is.
"""

import codecs
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..optional import import_optional
from .errors import reading


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
    """Where a slice or a frame lies, as far as it is said: millimetres and direction cosines, in the order x, y, z."""

    spacing: tuple[float, ...] | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None


class _Image(NamedTuple):
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
    head: Any
    axes: str
    shape: tuple[int, ...]
    frames: int
    size: int
    common: dict[str, str]
    planes: list[_Plane]


def open_series(path: Path) -> Series:
    """Reads what a file or a folder of slices says, without its pixels.

    In a folder, what is no slice is left out: folders, hidden files, texts, names of other kinds of files, and DICOM
    files without an image (reports, plans, DICOMDIR). Every other file that cannot be read is an error.

    Args:
        path: A file, or a folder with the slices of one series.

    Raises:
        ReadError: If it is no image, is damaged, or slices are not those of one volume: of one series, parallel, one
            above the other and evenly spaced. Begins with the name of the file or the folder.
    """
    with reading(path):
        files = [file for file in sorted(path.iterdir()) if _may_be_slice(file)] if path.is_dir() else [path]
        images = list(_open_images(files, str(path)))
        return _open_file(images[0]) if len(images) == 1 else _open_slices(images, str(path))


_DICOM_ENDING = re.compile(r"\.(dcm|dicom|ima)", re.IGNORECASE)
_OTHER_ENDING = re.compile(
    r"\.(bmp|csv|db|docx?|gif|gz|html?|ini|jpe?g|json|nii|npy|pdf|png|rtf|tiff?|txt|xlsx?|xml|zip)", re.IGNORECASE
)


def _may_be_slice(file: Path) -> bool:
    """Tells whether a file of a folder is a DICOM file; one that should be and is not is an error."""
    if file.is_dir() or file.name.startswith("."):
        return False
    if not file.is_file():
        raise ValueError(f"{file}: is no file, but lies among slices (a link to what is not there?)")
    with file.open("rb") as stream:
        start = stream.read(512)
    if start[128:132] == b"DICM":
        return True
    if _OTHER_ENDING.fullmatch(file.suffix) or (_is_text(start) and not _DICOM_ENDING.fullmatch(file.suffix)):
        return False
    raise ValueError(f"{file}: is no DICOM file, but lies among slices: is damaged, or has to be moved away")


def _is_text(start: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return False
    return bool(start) and b"\0" not in start


def _open_images(files: Sequence[Path], name: str) -> Iterator[_Image]:
    """Reads the files that have an image."""
    heads = []
    for file in files:
        with reading(file):
            heads.append(_read(file, _HEAD, stop_before_pixels=True))
    classes = {said for head in heads if "Rows" in head for said in _classes(head)}
    if not classes:
        raise ValueError(f"{name}: has no DICOM image")
    for file, head in zip(files, heads, strict=True):
        with reading(file):
            if "Rows" in head:
                yield _describe(file, head)
            elif not _is_other(head, classes):
                raise ValueError(f"{file}: ends before its image is described, is cut off")


def _classes(head: Any) -> set[str | None]:
    """Returns which class of object a file is said to be of, in both places where that is said."""
    return {head.file_meta.get("MediaStorageSOPClassUID"), head.get("SOPClassUID")}


def _is_other(head: Any, classes: set[str | None]) -> bool:
    """Tells whether a file without an image is a report, a plan or the like, no damaged file of the images' classes."""
    said = _classes(head)
    return "DirectoryRecordSequence" in head or (len(said) == 1 and not said & (classes | {None}))


_HEAD = 2**23  # bytes that are inflated at most to find the description of an image


class _Reader(io.BufferedReader):
    """A file of which no more is asked than there is; pydicom asks for as much as a damaged element claims to have."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def _read(file: Path, most: int, stop_before_pixels: bool) -> Any:
    """Reads a file's elements; inflates no more than so many bytes of a deflated one."""
    filereader, uid = import_optional("pydicom.filereader", "data"), import_optional("pydicom.uid", "data")
    with _Reader(io.FileIO(file)) as stream:
        filereader.read_preamble(stream, force=False)
        meta = filereader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
            stream.seek(0)
            return filereader.dcmread(stream, stop_before_pixels=stop_before_pixels)
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        plain = inflater.decompress(stream.read(), most)
    if not stop_before_pixels and not inflater.eof:
        raise ValueError(f"{file}: is cut off, or longer than it says: does not end within {most} inflated bytes")
    head = filereader.read_dataset(
        io.BytesIO(plain), False, True, stop_when=lambda tag, vr, length: stop_before_pixels and tag.group == 0x7FE0
    )
    head.file_meta = import_optional("pydicom.dataset", "data").FileMetaDataset(meta)
    return head


# what differs between images that are no slices of one volume, though they may lie one above the other
_COMMON = (
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "PhotometricInterpretation",
    "EchoNumbers",
    "EchoTime",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
    "RescaleType",
)


def _describe(file: Path, head: Any) -> _Image:
    if "TotalPixelMatrixRows" in head:
        raise ValueError(f"{file}: a slide in tiles is not read: use OME-TIFF or OME-Zarr")
    shape = tuple(_count(head, keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel"))
    axes, shape = ("yx", shape[:2]) if shape[2] == 1 else ("yxc", shape)
    frames = _count(head, "NumberOfFrames") if head.get("NumberOfFrames") is not None else 1
    size = import_optional("pydicom.pixels.utils", "data").get_expected_length(head)
    syntax = head.file_meta.TransferSyntaxUID
    if (stored := file.stat().st_size) < _least(syntax, size, frames):
        raise ValueError(f"{file}: is cut off: {frames} frames of {shape} do not fit into {stored} bytes")
    common = {keyword: str(head.get(keyword)) for keyword in _COMMON}
    common |= {"a rescale": str("RescaleSlope" in head), "a shape": str((frames, *shape))}
    return _Image(file, head, axes, shape, frames, size, common, _frame_planes(head, frames))


def _least(syntax: Any, size: int, frames: int) -> float:
    """Returns the bytes that pixels take at least: run lengths save up to 63 of 64, deflate up to 1031 of 1032."""
    if syntax.is_deflated:
        return size / 1032
    if syntax == _RLE:
        return size / 64
    return 8 * frames if syntax.is_encapsulated else size  # a frame is an item, whose tag and length are 8 bytes


def _count(head: Any, keyword: str) -> int:
    value = head.get(keyword)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{keyword} must be a number from 1, got {value}")
    return int(value)


def _open_file(image: _Image) -> Series:
    axes, shape, name = image.axes, image.shape, str(image.file)
    sizes = _common_spacing(image.planes, name)
    if image.frames > 1:
        axes, shape = "z" + axes, (image.frames, *shape)
        sizes |= _frame_distance(image, name)
    return Series(axes, shape, sizes, lambda: _pixels(image))


def _open_slices(images: Sequence[_Image], name: str) -> Series:
    _check_common(images, name)
    planes = [image.planes[0] for image in images]
    sizes = _common_spacing(planes, name)
    order = np.argsort(_positions(planes, name) @ _normal(planes, name))
    sizes["z"] = _distance([planes[index] for index in order], name)
    sorted_images = [images[index] for index in order]
    shape = (len(images), *images[0].shape)
    return Series("z" + images[0].axes, shape, sizes, lambda: np.stack([_pixels(image) for image in sorted_images]))


def _check_common(images: Sequence[_Image], name: str) -> None:
    first, kinds = images[0], len({tuple(image.common.values()) for image in images})
    differing = (
        f"{image.file.name} has {what} {value}, {first.file.name} has {first.common[what]}"
        for image in images
        for what, value in image.common.items()
        if value != first.common[what]
    )
    if kinds > 1 or first.frames > 1:
        example = next(differing, f"each has {first.frames} frames")
        raise ValueError(f"{name}: must have the slices of one series, of one size, got {kinds} kinds: {example}")


def _group_value(head: Any, frame: Any, sequence: str, keyword: str) -> Any:
    """Returns what a frame's functional group says, or else the group that all frames share; None if neither does."""
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    return _said(*(part[0].get(keyword) for part in (frame.get(sequence), shared.get(sequence)) if part))


def _frame_groups(head: Any, frames: int) -> Any:
    """Returns the functional groups of each frame; one that is empty where frames have none of their own."""
    groups = head.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) not in (0, frames):
        raise ValueError(f"PerFrameFunctionalGroupsSequence must be of {frames} frames, got {len(groups)}")
    return groups or [{}]


def _frame_planes(head: Any, frames: int) -> list[_Plane]:
    """Returns the planes of an enhanced image's frames, else the image's own."""
    spacing = head.get("PixelSpacing")
    if not (head.get("PerFrameFunctionalGroupsSequence") or head.get("SharedFunctionalGroupsSequence")):
        return [_plane(spacing, head.get("ImagePositionPatient"), head.get("ImageOrientationPatient"))]
    return [
        _plane(
            _said(_group_value(head, frame, "PixelMeasuresSequence", "PixelSpacing"), spacing),
            _group_value(head, frame, "PlanePositionSequence", "ImagePositionPatient"),
            _group_value(head, frame, "PlaneOrientationSequence", "ImageOrientationPatient"),
        )
        for frame in _frame_groups(head, frames)
    ]


def _plane(spacing: Any, position: Any, orientation: Any) -> _Plane:
    return _Plane(
        _numbers(spacing, 2, "PixelSpacing"),
        _numbers(position, 3, "ImagePositionPatient"),
        _numbers(orientation, 6, "ImageOrientationPatient"),
    )


def _numbers(value: Any, count: int, keyword: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    numbers = np.atleast_1d(np.asarray(value, dtype=float))
    if numbers.shape != (count,) or not (abs(numbers) < 1e9).all():  # NaN is not
        raise ValueError(f"{keyword} must be {count} numbers, got {value}")
    return tuple(numbers.tolist())


def _common_spacing(planes: Sequence[_Plane], name: str) -> dict[str, float]:
    """Returns what all planes say of their pixels: the distance between rows, and between columns."""
    said = {plane.spacing for plane in planes}
    if len(said) > 1:
        raise ValueError(f"{name}: slices must have one pixel size, got {sorted(map(str, said))}")
    (spacing,) = said
    return {} if spacing is None else dict(zip("yx", spacing, strict=True))


_OVER_EACH_OTHER = (None, 0x00182005, 0x00540080, 0x3004000C)  # SliceLocation-, Slice- and GridFrameOffsetVector


def _frame_distance(image: _Image, name: str) -> dict[str, float]:
    """Returns the distance of an image's frames, from their positions, or else as it is said."""
    head, planes = image.head, image.planes
    if len(planes) > 1 and any(plane.position for plane in planes):
        return {"z": _distance(planes, name)}
    if (order := head.get("FrameIncrementPointer")) not in _OVER_EACH_OTHER:
        raise ValueError(f"{name}: frames must lie one above the other, FrameIncrementPointer says {order}")
    offsets = _numbers(head.get("GridFrameOffsetVector"), image.frames, "GridFrameOffsetVector")  # of doses
    if offsets is not None:
        return {"z": _distance([_Plane(None, (0, 0, offset), (1, 0, 0, 0, 1, 0)) for offset in offsets], name)}
    keyword = "SpacingBetweenSlices"
    said = _numbers(_said(_group_value(head, {}, "PixelMeasuresSequence", keyword), head.get(keyword)), 1, keyword)
    return {} if said is None else {"z": said[0]}


_SHARE = 0.01  # of the distance of slices: what is no matter


def _positions(planes: Sequence[_Plane], name: str) -> np.ndarray:
    positions = [plane.position for plane in planes if plane.orientation is not None]
    if None in positions or len(positions) < len(planes):
        raise ValueError(f"{name}: slices have no position (ImagePositionPatient, ImageOrientationPatient)")
    return np.array(positions)


def _normal(planes: Sequence[_Plane], name: str) -> np.ndarray:
    """Returns the direction across parallel planes, of length 1."""
    turns = np.array([plane.orientation for plane in planes]).reshape(-1, 2, 3)  # of rows and of columns
    if abs(turns @ turns.transpose(0, 2, 1) - np.eye(2)).max() > 0.01:
        raise ValueError(f"{name}: ImageOrientationPatient must be two directions at right angles, of length 1")
    if abs(turns - turns[0]).max() > 1e-3:
        raise ValueError(f"{name}: slices must be parallel, their orientations differ")
    normal = np.cross(*turns[0])
    return normal / np.linalg.norm(normal)


def _rounding(positions: np.ndarray) -> float:
    """Returns by how much written positions are off, from the decimals they have: 0.05 mm for one decimal.

    More decimals may be there because a rounded number went through 32 bits.
    """
    noise = 6e-8 * abs(positions) + 1e-9
    written = (digits for digits in range(1, 6) if (abs(positions - positions.round(digits)) <= noise).all())
    return 0.5 * 10.0 ** -next(written, 6)


def _distance(planes: Sequence[_Plane], name: str) -> float:
    """Returns the distance of planes, which have to lie one above the other, in order and evenly spaced.

    They may be off a line by a hundredth of the distance, or by what the rounding of positions explains, up to a tenth.
    All are held to the same line, so small errors do not add up; a hundredth is also what it may lean, half a degree.
    """
    positions, normal = _positions(planes, name), _normal(planes, name)
    index = np.arange(len(planes)) - (len(planes) - 1) / 2
    heights, step = positions @ normal, index @ positions / (index @ index)  # [slices]; x, y, z from each to the next
    distance = abs(step @ normal)
    off = positions - positions.mean(0) - np.outer(index, step)  # [slices, 3]
    along = off @ normal
    aside = np.linalg.norm(off - np.outer(along, normal), axis=1).max()
    leaning = np.linalg.norm(step - (step @ normal) * normal)
    allowed = max(_SHARE * distance, min(2 * _rounding(positions), 0.1 * distance))
    if distance == 0 or abs(along).max() > allowed:
        steps = abs(np.diff(heights))
        raise ValueError(f"{name}: slices must be evenly spaced, distances are {steps.min():g} to {steps.max():g} mm")
    if aside > allowed or leaning > _SHARE * distance + 2 * allowed / (len(planes) - 1):
        raise ValueError(f"{name}: slices must lie one above the other, each is moved aside (a tilted gantry)")
    return float(distance)


def _pixels(image: _Image) -> np.ndarray:
    """Reads the pixels as what they stand for: Hounsfield units, doses and the like."""
    with reading(image.file):
        data = _read(image.file, image.size + _HEAD, stop_before_pixels=False)
        _check_stored(data, image)
        pixels = data.pixel_array
        shape = (image.frames, *image.shape) if image.frames > 1 else image.shape
        if pixels.shape != shape:
            raise ValueError(f"{image.file}: has pixels of {pixels.shape}, its header says {shape}")
        return _rescale(pixels, data, image.frames)


def _check_stored(data: Any, image: _Image) -> None:
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
        if syntax != _RLE and (size := _frame_size(frame)) != image.shape[:2]:
            raise ValueError(f"{image.file}: a compressed frame is of {size} pixels, the header says {image.shape[:2]}")
    if number != image.frames:
        raise ValueError(f"{image.file}: has {number} frames, its header says {image.frames}")


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Returns rows and columns of a frame of JPEG, JPEG-LS or JPEG 2000; None if it is none of them.

    Pillow does not read the headers of frames of 12 and 16 bits, and pydicom reads them when it decodes.
    """
    if not frame.startswith(b"\xff\xd8"):  # SOI of JPEG and JPEG-LS
        start = frame.find(b"\xff\x4f\xff\x51")  # SOC and SIZ, ISO/IEC 15444-1, A.5.1; a JP2 file has boxes before
        if start < 0:
            return None
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    place = 2
    while place < len(frame):  # segments, ISO/IEC 10918-1, B.1.1.3 and B.2.2
        marker, length = struct.unpack_from(">HH", frame, place)
        if marker == 0xFFFF:  # a fill byte
            place += 1
        elif marker in _STARTS_OF_FRAME:
            return struct.unpack_from(">HH", frame, place + 5)
        else:
            place += 2 + length
    return None


_RLE = "1.2.840.10008.1.2.5"
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# SOF0 to SOF15 without DHT, JPG and DAC, and SOF55 of JPEG-LS
_STARTS_OF_FRAME = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}
_TRANSFORMATION, _RESCALE = "PixelValueTransformationSequence", ("RescaleSlope", "RescaleIntercept")


def _rescale(pixels: np.ndarray, data: Any, frames: int) -> np.ndarray:
    """Applies what is said of the values, of all frames or of each: the standard lets no frame go without."""
    dose = _numbers(data.get("DoseGridScaling"), 1, "DoseGridScaling")
    if dose:
        return pixels * dose[0]
    if data.get("ModalityLUTSequence"):
        return import_optional("pydicom.pixels", "data").apply_modality_lut(pixels, data)
    said = [
        [_said(_group_value(data, group, _TRANSFORMATION, keyword), data.get(keyword)) for keyword in _RESCALE]
        for group in _frame_groups(data, frames)
    ]
    if all(value is None for scale in said for value in scale):
        return pixels
    scales = np.array(said, dtype=float)  # [frames or 1, 2]; None becomes NaN
    if not np.isfinite(scales).all():
        raise ValueError(f"{' and '.join(_RESCALE)} must be numbers in all frames, got {said}")
    slopes, offsets = scales.T.reshape(2, -1, *[1] * (pixels.ndim - 1))
    return pixels * slopes + offsets


def _said(*values: Any) -> Any:
    """Returns the first value that is there."""
    return next((value for value in values if value is not None), None)
