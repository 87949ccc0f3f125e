"""Clients of a Hub, each a process of its own: huggingface_hub reads its environment when it is imported.

The processes are forked from one that has imported PyTorch, which takes most of a client's time.
"""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
from multiprocessing.connection import Connection


def run(code: str, variables: dict[str, str]) -> str:
    """Returns what code prints in a process with these environment variables.

    Raises:
        AssertionError: If the code raises anything, with what.
    """
    answer = _call("forkserver", code, variables)
    if answer is None:  # other tests started the forkserver, with more modules
        answer = _call("spawn", code, variables)
    assert answer is not None
    printed, error = answer
    assert error is None, error
    return printed


def _call(method: str, code: str, variables: dict[str, str]) -> tuple[str, str | None] | None:
    """Returns what the code printed and raised; None if the process began with huggingface_hub imported."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["torch", "torchvision"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_execute, args=(code, variables, sender))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def _execute(code: str, variables: dict[str, str], sender: Connection) -> None:
    if "huggingface_hub" in sys.modules:
        sender.send(None)
        return
    os.environ.update(variables)
    printed, error = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<client>", "exec"), {"__name__": "client"})
    except BaseException:
        error = traceback.format_exc()
    sender.send((printed.getvalue(), error))
