"""What all fuzzers of readers share: damaged copies of files, and the check of what a reader makes of one.

for case in range(count(40)):
    rng = np.random.default_rng(case)
    path.write_bytes(damage(original, rng, free))
    outcome(lambda: read(path), path.name, path.parent, is_right)
"""

import contextlib
import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rat_timm.data.errors import ReadError

SECONDS, MEMORY = 20.0, 2**29
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.system")
FORBIDDEN += ("pickle.find_class",)
OPENING = ("open", "os.listdir", "os.scandir")
LIBRARIES = tuple({os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())})
SYSTEM = ("/proc/", "/sys/", "/dev/null")
PARSED = "<unknown>"  # what Python calls source without a file: it parses lines of tracebacks, which pydicom logs

Spans = Sequence[tuple[int, int]]

_watched: "list[tuple[str, str]] | None" = None


class HangError(BaseException):
    """A reader took too long; no ``Exception``, so that no reader turns it into one of its own."""


def count(default: int) -> int:
    """Returns how many cases are tried: a few, or as many as the environment says."""
    return int(os.environ.get("RAT_TIMM_FUZZ", default))


def damage(content: bytes, rng: np.random.Generator, free: Spans = ()) -> bytes:
    """Returns a copy with one to three changes.

    Args:
        content: A file.
        rng: Chooses the changes.
        free: Spans that stay as they are: what stands there may be changed without anything contradicting it, such as
            raw pixels or a pixel size.
    """
    changed = bytearray(content)
    places = np.setdiff1d(np.arange(len(content)), np.concatenate([np.arange(*span) for span in [(0, 0), *free]]))
    for _ in range(rng.integers(1, 4)):
        _CHANGES[rng.integers(len(_CHANGES))](changed, int(rng.choice(places)), rng)
    return bytes(changed)


def _flip(content: bytearray, place: int, rng: np.random.Generator) -> None:
    if place < len(content):
        content[place] ^= 1 << int(rng.integers(8))


def _replace(content: bytearray, place: int, rng: np.random.Generator) -> None:
    if place < len(content):
        content[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))


def _truncate(content: bytearray, place: int, rng: np.random.Generator) -> None:
    del content[max(place, 1) :]


def _append(content: bytearray, place: int, rng: np.random.Generator) -> None:
    content += rng.bytes(int(rng.integers(1, 64)))


_CHANGES = (_flip, _flip, _flip, _replace, _replace, _replace, _truncate, _append)


def outcome(
    reader: Callable[[], Any],
    name: str,
    folder: Path,
    is_right: Callable[[Any], bool],
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> str:
    """Runs a reader on a damaged file.

    Args:
        reader: Reads the file.
        name: What the error's message has to begin with, up to the folder in front of it.
        folder: The one folder in which files may be opened.
        is_right: Tells whether what was read is what the file had held.
        seconds: How long it may take.
        memory: Bytes of address space that it may take.

    Returns:
        "read" or "refused".

    Raises:
        AssertionError: If it is neither right nor a `ReadError` that begins with the file's name.
    """
    with guarded(folder, seconds, memory):
        try:
            found = reader()
        except ReadError as error:
            message = str(error)
            assert message.startswith((f"{folder / name}: ", f"{name}: ")), f"does not begin with the name: {message}"
            assert "MemoryError" not in message, f"takes too much memory: {message}"
            return "refused"
        except Exception as error:
            raise AssertionError(f"foreign error: {type(error).__name__}: {error}") from error
    assert is_right(found), "what was read is wrong"
    return "read"


@contextlib.contextmanager
def guarded(folder: Path, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fails if the block takes too long or too much, opens what is not in the folder, calls a network, or unpickles."""
    with _watching() as events, _time_limit(seconds), _memory_limit(memory):
        yield
    strange = [event for event in events if not _may(event, os.path.realpath(folder))]
    assert not strange, f"opened or called: {strange}"


def _may(event: tuple[str, str], folder: str) -> bool:
    kind, path = event
    if kind in FORBIDDEN:
        return False
    if path == PARSED:
        return True
    real = os.path.realpath(path)
    return path.startswith(SYSTEM) or any(os.path.commonpath([real, root]) == root for root in (folder, *LIBRARIES))


@contextlib.contextmanager
def _watching() -> "Iterator[list[tuple[str, str]]]":
    """Yields the list of what is opened and called in the block, in all threads."""
    global _watched
    if not _installed:
        sys.addaudithook(_hook)  # cannot be taken back, so it is there once
        _installed.append(True)
    _watched = events = []
    try:
        yield events
    finally:
        _watched = None


_installed: list[bool] = []


def _hook(event: str, arguments: tuple) -> None:
    if _watched is None:
        return
    if event in FORBIDDEN:
        _watched.append((event, repr(arguments)))
    elif event in OPENING and isinstance(arguments[0], str | bytes | os.PathLike):
        _watched.append((event, os.fsdecode(arguments[0])))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError(f"took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    """Makes larger allocations fail, in every library; threads reserve some memory of their own."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
