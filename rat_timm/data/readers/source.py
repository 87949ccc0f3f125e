"""Where images come from, and what a format's reader tells of one."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ...optional import import_optional
from ..errors import ReadError
from ..units import Length

SPACE = "zyx"
Index = tuple[int | slice, ...]


class Source(NamedTuple):
    """Where an image comes from.

    Attributes:
        name: What errors begin with.
        kind: The name, in lower case, whose ending tells the format.
        place: A path, an address, a file object or a ``zarr.Group``.
    """

    name: str
    kind: str
    place: Any


class Found(NamedTuple):
    """What a format's reader finds in a file.

    Attributes:
        axes: One letter per axis of the array: t, c, z, y, x, or another.
        shape: The array's.
        dtype: That of what ``load`` returns; None where it is known only then, and has at most 8 bytes.
        chunks: Shape of the smallest part that is read at once.
        sizes: Pixel size of spatial axes, as far as the file says it.
        load: Opens the file, reads the part of an index, and closes it.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype | None
    chunks: tuple[int, ...]
    sizes: Mapping[str, Length]
    load: Callable[[Index], np.ndarray]


def locate(source: Any, form: str | None) -> Source:
    """Returns where an image is, and the name that tells its format.

    Args:
        source: What the user passes to `read`.
        form: The format that the user says, or None.

    Raises:
        ValueError: If it is nothing that can be read.
        FileNotFoundError: If there is no such file.
    """
    said = None if form is None else f".{form.lower()}"
    if isinstance(source, str) and "://" in source:
        return Source(source, said or source.rstrip("/").lower(), _existing_address(source))
    if isinstance(source, str | PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(2, f"{path}: there is no such file or folder", str(path))
        return Source(str(path), said or path.name.lower(), path)
    if "zarr" in sys.modules and isinstance(source, sys.modules["zarr"].Group):
        return Source(str(source.store_path), ".zarr", source)
    if not all(hasattr(source, method) for method in ("read", "seek", "tell")):
        allowed = "a path, an address, a file object that can seek, or a zarr.Group"
        raise ValueError(f"source must be {allowed}, got {type(source).__name__}")
    named = getattr(source, "name", None)
    name = named if isinstance(named, str) else form or type(source).__name__
    return Source(name, said or name.lower(), source)


def _existing_address(address: str) -> str:
    files, inner = import_optional("fsspec.core", "data").url_to_fs(address)
    if not files.exists(inner):
        raise FileNotFoundError(2, f"{address}: there is no such file or folder", address)
    return address


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
        source.place.seek(0)
        yield source.place


def pick(levels: Any, level: int, name: str) -> Any:
    """Returns a level of a pyramid."""
    if not 0 <= level < len(levels):
        raise ReadError(f"{name}: level must be from 0 to {len(levels) - 1}, got {level}")
    return levels[level]


def whole(part: Index, shape: tuple[int, ...]) -> bool:
    """Tells whether an index is of all of an array."""
    return all(
        isinstance(index, slice) and index.indices(size) == (0, size, 1)
        for index, size in zip(part, shape, strict=True)
    )


def need_zarr() -> ModuleType:
    """Imports zarr, which OME-Zarr and parts of the planes of OME-TIFF are read with."""
    try:
        return import_optional("zarr", "data")
    except ImportError as error:
        raise ImportError(f"{error}; OME-Zarr and regions of OME-TIFF want Python 3.11 or later") from error
