"""The processes that train: one, or several that torchrun or Ray started."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import filelock
from torch import distributed as dist

T = TypeVar("T")
PATIENCE = 30.0  # seconds in which the processes of a run that was killed are gone


def rank() -> int:
    """Returns this process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Returns how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def gather(value: T) -> list[T]:
    """Returns every process's value to all of them."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """Does something in the first process; all get what it returns there, or fail if it fails there."""
    if not dist.is_initialized():
        return work()
    said: list = [None, None]
    failure = None
    if rank() == 0:
        try:
            said[0] = work()
        except Exception as error:  # raised below, once the others know
            failure, said[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise RuntimeError(f"in the first process: {said[1]}")
    return said[0]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder to this run.

    Raises:
        ValueError: If another run has it, after `PATIENCE`.
    """
    lock = filelock.FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except filelock.Timeout as error:
            raise ValueError(f"output must be a folder that no other run writes to, got {folder}") from error

    on_first(acquire)
    try:
        yield
    finally:
        lock.release()
