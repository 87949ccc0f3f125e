"""DICOM, on `pydicom`: a file, or a folder with the slices of one series."""

import codecs
import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...optional import import_optional
from ..errors import ReadError, reading
from ..units import Length
from .dicom_geometry import frame_distance, plane_sizes, planes_of, slice_distance, slice_order
from .dicom_header import HEAD, count, read_elements
from .dicom_pixels import DicomImage, least_bytes, read_pixels
from .source import Format, Index, Source, StoredImage, opened

if TYPE_CHECKING:
    from pydicom import Dataset


def open_dicom(source: Source, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
    """Reads what a DICOM file or a folder of slices says; see `source.Opener`."""
    with _on_disk(source) as path:
        stored = open_series(path)
    if isinstance(source.place, Path):
        return stored

    def load(part: Index) -> np.ndarray:
        with _on_disk(source) as path:
            return open_series(path).load(part)

    return stored._replace(load=load)


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


def open_series(path: Path) -> StoredImage:
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


def _open_images(files: Sequence[Path], name: str) -> Iterator[DicomImage]:
    """Reads the files that have an image."""
    heads = []
    for file in files:
        with reading(file):
            heads.append(read_elements(file, HEAD, stop_before_pixels=True))
    classes = {name for head in heads if "Rows" in head for name in _classes(head)}
    if not classes:
        raise ValueError(f"{name}: has no DICOM image")
    for file, head in zip(files, heads, strict=True):
        with reading(file):
            if "Rows" in head:
                yield _describe(file, head)
            elif not _is_other(head, classes):
                raise ValueError(f"{file}: ends before its image is described, is cut off")


def _classes(head: "Dataset") -> set[str | None]:
    """Returns the class of object in both places where a file names it."""
    return {head.file_meta.get("MediaStorageSOPClassUID"), head.get("SOPClassUID")}


def _is_other(head: "Dataset", classes: set[str | None]) -> bool:
    """Tells whether a file without an image is a report, a plan or the like, no damaged file of the images' classes."""
    own = _classes(head)
    return "DirectoryRecordSequence" in head or (len(own) == 1 and not own & (classes | {None}))


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


def _describe(file: Path, head: "Dataset") -> DicomImage:
    if "TotalPixelMatrixRows" in head:
        raise ValueError(f"{file}: a slide in tiles is not read: use OME-TIFF or OME-Zarr")
    shape = tuple(count(head, keyword) for keyword in ("Rows", "Columns", "SamplesPerPixel"))
    axes, shape = ("yx", shape[:2]) if shape[2] == 1 else ("yxc", shape)
    frames = count(head, "NumberOfFrames") if head.get("NumberOfFrames") is not None else 1
    size = import_optional("pydicom.pixels.utils", "data").get_expected_length(head)
    syntax = head.file_meta.TransferSyntaxUID
    if (stored := file.stat().st_size) < least_bytes(syntax, size, frames):
        raise ValueError(f"{file}: is cut off: {frames} frames of {shape} do not fit into {stored} bytes")
    common = {keyword: str(head.get(keyword)) for keyword in _COMMON}
    common |= {"a rescale": str("RescaleSlope" in head), "a shape": str((frames, *shape))}
    return DicomImage(file, head, axes, shape, frames, size, common, planes_of(head, frames))


def _open_file(image: DicomImage) -> StoredImage:
    axes, shape, name = image.axes, image.shape, str(image.file)
    sizes = plane_sizes(image.planes, name)
    if image.frames > 1:
        axes, shape = "z" + axes, (image.frames, *shape)
        distance = frame_distance(image.head, image.planes, image.frames, name)
        sizes |= {} if distance is None else {"z": distance}
    return _stored(axes, shape, sizes, lambda: read_pixels(image))


def _open_slices(images: Sequence[DicomImage], name: str) -> StoredImage:
    _check_common(images, name)
    planes = [image.planes[0] for image in images]
    sizes, order = plane_sizes(planes, name), slice_order(planes, name)
    sizes["z"] = slice_distance([planes[index] for index in order], name)
    shape = (len(images), *images[0].shape)
    return _stored(
        "z" + images[0].axes, shape, sizes, lambda: np.stack([read_pixels(images[index]) for index in order])
    )


def _stored(axes: str, shape: tuple[int, ...], sizes: dict[str, float], load: Callable[[], np.ndarray]) -> StoredImage:
    lengths = {axis: Length(size, "mm") for axis, size in sizes.items()}
    return StoredImage(axes, shape, None, shape, shape, lengths, lambda part: load()[part])


def _check_common(images: Sequence[DicomImage], name: str) -> None:
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


DICOM = Format("DICOM", (".dcm",), open_dicom, in_parts=False, is_folder=Path.is_dir)
