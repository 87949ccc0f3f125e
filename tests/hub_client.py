"""Clients of a Hub, each a process of its own: huggingface_hub reads its environment when it is imported.

The processes are forked from one that has imported PyTorch, which takes most of a client's time.
"""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection


def run(code: str, variables: dict[str, str]) -> str:
    """Returns what code prints in a process with these environment variables.

    Raises:
        AssertionError: If the code raises anything, with what.
    """
    printed, error = _parent().submit(_fork, code, variables).result()
    assert error is None, error
    return printed


@functools.cache
def _parent() -> ProcessPoolExecutor:
    """What forks clients: multiprocessing's forkserver would have what other tests and packages preload."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, initializer=importlib.import_module, initargs=("torchvision",))


def _fork(code: str, variables: dict[str, str]) -> tuple[str, str | None]:
    """Returns what the code printed and raised."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_execute, args=(code, variables, sender))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def _execute(code: str, variables: dict[str, str], sender: Connection) -> None:
    os.environ.update(variables)
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<client>", "exec"), {"__name__": "client"})
    except BaseException:
        error = traceback.format_exc()
    sender.send((printed.getvalue(), error))
