"""What a DICOM file says, on `pydicom`: elements, and the functional groups of frames."""

import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ...optional import import_optional

if TYPE_CHECKING:
    from pydicom import Dataset

HEAD = 2**23  # bytes that are inflated at most to find the description of an image


class _Reader(io.BufferedReader):
    """A file of which no more is asked than there is; pydicom asks for as much as a damaged element claims to have."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))


def read_elements(file: Path, most: int, stop_before_pixels: bool) -> "Dataset":
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


def count(head: "Dataset", keyword: str) -> int:
    """Returns a number of rows, frames and the like, which is at least 1."""
    value = head.get(keyword)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{keyword} must be a number from 1, got {value}")
    return int(value)


def numbers(value: object, size: int, keyword: str) -> tuple[float, ...] | None:
    """Returns so many numbers; None if there is no value."""
    if value is None:
        return None
    array = np.atleast_1d(np.asarray(cast("float | Sequence[float]", value), dtype=float))
    if array.shape != (size,) or not (abs(array) < 1e9).all():  # NaN is not
        raise ValueError(f"{keyword} must be {size} numbers, got {value}")
    return tuple(array.tolist())


def first_given(*values: object) -> object:
    """Returns the first value that is not None."""
    return next((value for value in values if value is not None), None)


def frame_groups(head: "Dataset", frames: int) -> "Sequence[Dataset | Mapping]":
    """Returns the functional groups of each frame; one that is empty where frames have none of their own."""
    groups = head.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) not in (0, frames):
        raise ValueError(f"PerFrameFunctionalGroupsSequence must be of {frames} frames, got {len(groups)}")
    return groups or [{}]


def group_value(head: "Dataset", group: "Dataset | Mapping", sequence: str, keyword: str) -> object:
    """Returns what a frame's functional group says, or else the group that all frames share; None if neither does."""
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    return first_given(*(part[0].get(keyword) for part in (group.get(sequence), shared.get(sequence)) if part))
