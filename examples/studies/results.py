"""Carries out a plan of experiments, adds up its results, and puts a summary of them into a report."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from joblib import Parallel, delayed
from rich.progress import track

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def read(file: Path, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """Reads results, none if there is no file.

    Args:
        file: As `carry_out` writes it.
        columns: Its columns.
        **options: Of ``pandas.read_csv``.
    """
    return pd.read_csv(file, keep_default_na=False, **options) if file.exists() else pd.DataFrame(columns=columns)


def carry_out(
    wanted: Sequence[Any], run: Callable[[Any], pd.DataFrame], file: Path, columns: Sequence[str], jobs: int
) -> None:
    """Runs the experiments that a file has no results of, and adds theirs as soon as each is done.

    Args:
        wanted: Dataclass instances, whose fields are columns of the file and tell which experiment it is.
        run: Returns an experiment's rows.
        file: CSV.
        columns: What of the rows is kept.
        jobs: Experiments at a time, in processes of their own if there are several.
    """
    names = [field.name for field in dataclasses.fields(wanted[0])] if wanted else []
    finished = set(read(file, columns)[names].itertuples(index=False, name=None))
    left = [each for each in wanted if dataclasses.astuple(each) not in finished]
    file.parent.mkdir(parents=True, exist_ok=True)
    results = Parallel(jobs, return_as="generator_unordered")(delayed(run)(each) for each in left)
    for rows in track(results, "trainings", total=len(left)):
        rows[list(columns)].to_csv(file, mode="a", header=not file.exists(), index=False)


def put_into(file: Path, sections: Sequence[str]) -> None:
    """Replaces what a report has between its two marks; without a report, one is begun."""
    text = file.read_text() if file.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    file.write_text(before + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + rest.partition(END)[2])


def spread(mean: float, deviation: float) -> str:
    """Writes a mean, and the deviation of seeds where there is more than one seed."""
    return f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def digest(*modules: ModuleType) -> str:
    """A digest of the code of modules: what older code drew is drawn anew."""
    return hashlib.sha256(b"".join(Path(module.__file__ or "").read_bytes() for module in modules)).hexdigest()
