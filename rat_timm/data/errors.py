"""The one error of all readers."""

import contextlib
from collections.abc import Iterator
from os import PathLike


class ReadError(ValueError):
    """An image that cannot be read, or whose pixel size is missing or cannot be true; begins with the file's name."""


@contextlib.contextmanager
def reading(path: str | PathLike) -> Iterator[None]:
    """Turns whatever a format's package raises into a `ReadError` that names the file.

    Packages have errors of their own, few of which name the file. If the file itself is not there or may not be opened
    (``FileNotFoundError``, ``PermissionError``), or a package is not installed (``ImportError``), errors stay what they
    are; a part that is missing inside an image is a `ReadError`.
    """
    try:
        yield
    except (ReadError, PermissionError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and str(error.filename) == str(path):
            raise
        message = str(error)
        if isinstance(error, ValueError) and message.startswith(str(path)):
            raise ReadError(message) from error
        raise ReadError(f"{path}: cannot be read: {type(error).__name__}: {message:.500}") from error
