"""Packages that are needed for some things only."""

import importlib
from types import ModuleType


def import_optional(name: str, extra: str) -> ModuleType:
    """Imports a package.

    Raises:
        ImportError: If it is not there, with the name of the extra that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(f"{name} is not installed: pip install 'rat-timm[{extra}]'") from error
