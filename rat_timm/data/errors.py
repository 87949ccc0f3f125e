"""The one error of all readers."""

import contextlib
from collections.abc import Iterator
from os import PathLike


class ReadError(ValueError):
    """An image that cannot be read, or whose pixel size is missing or cannot be true; begins with the file's name."""


@contextlib.contextmanager
def reading(path: str | PathLike) -> Iterator[None]:
    """Turns whatever a format's package raises into a `ReadError` that names the file.

    Packages have errors of their own, few of which name the file. A file that is not there or may not be opened
    (``FileNotFoundError``, ``PermissionError``) and a package that is not installed (``ImportError``) stay what they
    are.
    """
    try:
        yield
    except (ReadError, FileNotFoundError, PermissionError, ImportError):
        raise
    except Exception as error:
        message = str(error)
        if isinstance(error, ValueError) and message.startswith(str(path)):
            raise ReadError(message) from error
        raise ReadError(f"{path}: cannot be read: {type(error).__name__}: {message}") from error
