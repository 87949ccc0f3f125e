"""What the pages share: the book's one setting, and commands that run in the process that builds it.

`RAT_BOOK=long` builds the long form, whose trainings take as long as results do. Otherwise they are as short as can be,
which CI runs.
"""

import os
import runpy
import shlex
import sys
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

EXAMPLES = Path(__file__).resolve().parents[1]
FORMS = ("short", "long")
FORM = os.environ.get("RAT_BOOK", "short")
if FORM not in FORMS:
    raise ValueError(f"RAT_BOOK must be one of {FORMS}, got {FORM!r}")


def pick(short: T, long: T) -> T:
    """Returns what belongs to the form of the book that is built."""
    return {"short": short, "long": long}[FORM]


def run(command: str) -> None:
    """Does what a shell does with the command, without a new process, which would import PyTorch again.

    Args:
        command: ``python examples/PROGRAM.py ...`` or ``python -m rat_timm ...``.

    Raises:
        RuntimeError: If it fails.
    """
    python, program, *arguments = shlex.split(command)
    if python != "python":
        raise ValueError(f"command must begin with python, got {command!r}")
    before = sys.argv
    module = arguments.pop(0) if program == "-m" else None
    sys.argv = [module or program, *arguments]
    try:
        if module is None:
            runpy.run_path(str(EXAMPLES.parent / program), run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{command}: ended with {end.code}") from end
    finally:
        sys.argv = before
