"""What all readers share: where an image comes from, what a file says of it, and how a format declares its reader."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import numpy as np

from ...optional import import_optional
from ..errors import ReadError
from ..units import Length

if TYPE_CHECKING:
    import zarr

SPACE = "zyx"
Index: TypeAlias = "tuple[int | slice, ...]"
Readable: TypeAlias = "str | PathLike | BinaryIO | zarr.Group"
_Level = TypeVar("_Level")


class Source(NamedTuple):
    """Where an image comes from.

    Attributes:
        name: What errors begin with.
        kind: The name, in lower case, whose ending tells the format.
        place: A path, an address, a file object or a ``zarr.Group``.
    """

    name: str
    kind: str
    place: "Path | str | BinaryIO | zarr.Group"


class StoredImage(NamedTuple):
    """What a file says of an image, whose pixels are still in the file.

    Attributes:
        axes: One letter per axis of the array: t, c, z, y, x, or another.
        shape: The array's.
        dtype: That of what ``load`` returns; None where it is told only then, and has at most 8 bytes.
        chunks: Shape of the parts that are best read at once.
        pieces: Shape of the smallest parts that have an entry of their own in the file.
        sizes: Pixel size of spatial axes, as far as the file says it.
        load: Opens the file, reads the part of an index, and closes it.
        levels: How many levels the image has.
        offsets: Position of the first pixel's centre along spatial axes, in the units of ``sizes``; None if the file
            does not say it.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    chunks: tuple[int, ...]
    pieces: tuple[int, ...]
    sizes: Mapping[str, Length]
    load: Callable[[Index], np.ndarray]
    levels: int = 1
    offsets: Mapping[str, float] | None = None


class Opener(Protocol):
    """What reads the metadata of a format."""

    def __call__(self, source: Source, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
        """Reads what a file says of an image, without its pixels.

        Args:
            source: Where the image is.
            level: Of a pyramid, 0 is the finest.
            image: Index of the image, None for the only one.
            max_bytes: None if decoding may take any memory; else ``load`` decodes to no more than metadata promise.

        Raises:
            ReadError: If the file is not what it should be; other errors become one (`..errors.reading`).
        """


class Format(NamedTuple):
    """A format, as the file of its reader declares it.

    Attributes:
        name: What users call it.
        endings: Of names, in lower case.
        open: Reads the metadata.
        has_levels: Whether there are pyramids.
        has_images: Whether a file may have several images.
        in_parts: Whether parts can be read lazily.
        is_folder: Tells whether a folder, whatever its name is, has an image of this format.
    """

    name: str
    endings: tuple[str, ...]
    open: Opener
    has_levels: bool = False
    has_images: bool = False
    in_parts: bool = True
    is_folder: Callable[[Path], bool] = lambda path: False


def locate(source: Readable, form: str | None) -> Source:
    """Returns where an image is, and the name that tells its format.

    Args:
        source: What the user passes to `read`.
        form: The format that the user says, or None.

    Raises:
        ValueError: If it is not one of the kinds that can be read.
        FileNotFoundError: If there is no such file.
    """
    asked = None if form is None else f".{form.lower()}"
    if isinstance(source, str) and "://" in source:
        _check_address(source)
        return Source(source, asked or source.rstrip("/").lower(), source)
    if isinstance(source, str | PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(2, f"{path}: there is no such file or folder", str(path))
        return Source(str(path), asked or path.name.lower(), path)
    if "zarr" in sys.modules and isinstance(source, sys.modules["zarr"].Group):
        return Source(str(source.store_path), ".zarr", source)
    if not is_file_object(source):
        allowed = "a path, an address, a file object that can seek, or a zarr.Group"
        raise ValueError(f"source must be {allowed}, got {type(source).__name__}")
    own = getattr(source, "name", None)
    name = own if isinstance(own, str) else form or type(source).__name__
    return Source(name, asked or name.lower(), source)


def is_file_object(source: object) -> bool:
    """Tells whether something can be read like a file, from any place."""
    return all(hasattr(source, method) for method in ("read", "seek", "tell"))


def _check_address(address: str) -> None:
    files, inner = import_optional("fsspec.core", "data").url_to_fs(address)
    if not files.exists(inner):
        raise FileNotFoundError(2, f"{address}: there is no such file or folder", address)


@contextlib.contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """Opens a file, at its start; an open file object stays open."""
    if isinstance(source.place, Path):
        with source.place.open("rb") as file:
            yield file
    elif isinstance(source.place, str):
        with import_optional("fsspec", "data").open(source.place, "rb") as file:
            yield file
    else:
        stream = cast(BinaryIO, source.place)
        stream.seek(0)
        yield stream


def import_zarr() -> ModuleType:
    """Imports zarr, which reads OME-Zarr and parts of the planes of OME-TIFF.

    Raises:
        ImportError: If it is not there, with the extra that installs it; or with the Python that it needs.
    """
    if sys.version_info < (3, 11):
        this = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(f"OME-Zarr and regions of OME-TIFF need Python 3.11 or later, for zarr does; this is {this}")
    return import_optional("zarr", "data")


def pick(levels: Sequence[_Level], level: int, name: str) -> _Level:
    """Returns a level of a pyramid."""
    if not 0 <= level < len(levels):
        raise ReadError(f"{name}: level must be from 0 to {len(levels) - 1}, got {level}")
    return levels[level]


def is_whole(part: Index, shape: tuple[int, ...]) -> bool:
    """Tells whether an index is of all of an array."""
    return all(
        isinstance(index, slice) and index.indices(size) == (0, size, 1)
        for index, size in zip(part, shape, strict=True)
    )
