"""Damaged DICOM files: right pixels with the right size, or one error that names the file.

`test_dicom` tries some cases, or as many as the environment's RAT_TIMM_FUZZ says.
"""

import functools
import io
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom
import pytest
from fuzzing import damage, guarded
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from rat_timm.data import ReadError, Scan, read

REAL = [
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "rtdose.dcm",
    "rtdose_rle.dcm",
]

# What nothing else in a file contradicts: these say what pixels and their size are, and any answer to them is right.
FREE = {
    "PixelData",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "DoseGridScaling",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PlanarConfiguration",
    "PhotometricInterpretation",
    "PerFrameFunctionalGroupsSequence",  # without any, frames are as far apart as SpacingBetweenSlices says
}
NASTY = [
    b"",
    b"0 ",
    b"-1",
    b"1 ",
    b"2 ",
    b"3.7 ",
    b"2000000000",
    b"1e400 ",
    b"nan ",
    b"inf ",
    b"abc ",
    b"1\\2 ",
    b"\\\\",
]
NASTY += [b"0\\0\\0\\0\\0\\0 ", b"../../etc/passwd", b"1.2.840.10008.1.2.5\0", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"]
NASTY += [b"\0\0", b"\1\0", b"\xff\xff", b"\0" * 8, b"\xff" * 4, b"x" * 4096]


class Original(NamedTuple):
    """A file, or a folder of slices.

    Attributes:
        path: Its name.
        scan: What is read before any damage.
        contents: Of the file, or of all files of the folder.
    """

    path: Path
    scan: Scan
    contents: dict[Path, bytes]


def original(path: Path) -> Original:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return Original(path, read(path, "mm"), {file: file.read_bytes() for file in files})


def real(folder: Path, name: str) -> Original:
    path = Path(shutil.copy(get_testdata_file(name, download=False), folder))
    if name.startswith("SC"):  # has no pixel size
        data = pydicom.dcmread(path)
        data.PixelSpacing = [0.5, 0.25]
        data.save_as(path)
    return original(path)


def elements(data: Dataset) -> Iterator[tuple[Dataset, DataElement]]:
    """Yields all elements with the data set that has them, those of sequences too."""
    for element in data:
        yield data, element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)


@functools.cache
def free_bytes(content: bytes) -> np.ndarray:
    """Returns for each byte whether it is of an element whose value is free; all of what is deflated is."""
    free = np.zeros(len(content), bool)
    data = pydicom.dcmread(io.BytesIO(content))
    if data.file_meta.TransferSyntaxUID.is_deflated:
        free[content.index(data.file_meta.TransferSyntaxUID.encode()) + 22 :] = True
    order = "little" if data.original_encoding[1] else "big"
    for _, element in elements(data):
        if element.keyword in FREE and element.VR != "SQ":
            tag = element.tag.group.to_bytes(2, order) + element.tag.elem.to_bytes(2, order)
            is_bytes = isinstance(element.value, bytes)
            size = len(element.value) if is_bytes else len("\\".join(map(str, np.atleast_1d(element.value)))) + 1
            for found in re.finditer(re.escape(tag), content):
                free[found.end() : found.end() + 8 + size] = True  # of the header 4 or 8 bytes
    return free


def change_bytes(content: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """Returns a damaged copy, and whether what was changed is free."""
    changed = damage(content, rng)
    size = min(len(content), len(changed))
    differs = np.frombuffer(content[:size], np.uint8) != np.frombuffer(changed[:size], np.uint8)
    return changed, bool((differs & free_bytes(content)[:size]).any())


def change_metadata(content: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """Returns a copy with an element that is removed, has another value, or has more or fewer items."""
    while True:
        data = pydicom.dcmread(io.BytesIO(content))
        candidates = [pair for pair in elements(data) if not pair[1].tag.is_private]
        if rng.integers(4):  # mostly those that describe images and places
            candidates = [pair for pair in candidates if pair[1].tag.group in (0x20, 0x28, 0x3004, 0x5200)]
        parent, element = candidates[rng.integers(len(candidates))]
        kind = rng.integers(4)
        if kind == 0:
            del parent[element.tag]
        elif element.VR == "SQ" and kind < 3:
            items = list(element.value)
            element.value = items[:-1] if kind == 1 else [*items, *items[-1:]]
        else:
            value = NASTY[rng.integers(len(NASTY))]
            parent[element.tag] = RawDataElement(element.tag, element.VR, len(value), value, 0, *data.original_encoding)
        written = io.BytesIO()
        try:
            data.save_as(written)
        except Exception:  # pydicom does not write it; another one, then
            continue
        return written.getvalue(), element.keyword in FREE


def run(
    given: Original, change: Callable[[bytes, np.random.Generator], tuple[bytes, bool]], cases: int
) -> Counter[str]:
    """Tries the cases of some seeds; each has one changed file.

    Raises:
        AssertionError: If what is read is wrong, or is refused with another error than one that names the file.
    """
    results: Counter[str] = Counter()
    files = list(given.contents)
    for case in cases:
        rng = np.random.default_rng(case)
        file = files[rng.integers(len(files))]
        changed, free = change(given.contents[file], rng)
        file.write_bytes(changed)
        try:
            results[_outcome(given, free)] += 1
        except BaseException as error:
            raise AssertionError(f"case {case}, {file.name}: {error}") from error
        file.write_bytes(given.contents[file])
    return results


def _outcome(given: Original, free: bool) -> str:
    with guarded(given.path.parent):
        try:
            scan = read(given.path, "mm")
        except ReadError as error:
            if not str(error).startswith(str(given.path)) or "MemoryError" in str(error):
                raise AssertionError(f"does not begin with the name, or takes too much memory: {error}") from error
            return "refused"
    assert scan.pixels.shape == given.scan.pixels.shape, f"is of {scan.pixels.shape}"
    several = len(given.contents) > 1  # which contradict each other
    sizes = pytest.approx(given.scan.spacing, rel=0.01)
    assert (free and not several) or scan.spacing == sizes, f"has pixels of {scan.spacing}"
    assert free or np.array_equal(scan.pixels, given.scan.pixels), "pixels are wrong"
    return "read"
