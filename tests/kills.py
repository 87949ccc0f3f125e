"""Kills `python -m rat_timm predict` at random moments, resumes it until it ends, and compares what is left.

    PYTHONPATH=$PWD python tests/kills.py --kills 10
    PYTHONPATH=$PWD python tests/kills.py --kills 10 --engines ray --tasks instances --who worker

A moment is a random number of finished things (tiles, numbers of objects, levels) and a random time after it; the
process group gets SIGKILL, or one of the processes that compute does and the run has to end by itself. Runs are forked
from this process, which has imported what takes the time.
"""

import argparse
import contextlib
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from torch import nn

import rat_timm.predict.command  # noqa: F401  # for all runs
from helpers import write_ome_zarr
from rat_timm.dense import Segmenter

ENGINES = ("process", "processes", "dask", "tcp", "ray")
TASKS = {
    "labels": ["--tile", "20"],
    "probabilities": ["--tile", "8", "--halo", "6"],  # too short: windows are blended, and the difference is measured
    "instances": ["--tile", "8", "--scale", "4", "--largest", "8"],
}
LONGEST = 300.0  # seconds of a run
CLUSTER = """
import sys, time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, protocol="tcp", host="127.0.0.1", dashboard_address=None) as c:
        print(c.scheduler_address, flush=True)
        sys.stdin.read()
"""


class Run:
    """``python -m rat_timm`` in a process group of its own."""

    def __init__(self, words: list[str], said: Path) -> None:
        self.said, self.code = said, None
        self.pid = os.fork()
        os.setpgid(self.pid, self.pid or 0)  # here and there: whoever comes first, the group is there when it is killed
        if self.pid == 0:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.argv = ["rat_timm", *words]
            try:
                runpy.run_module("rat_timm", run_name="__main__", alter_sys=True)
            except SystemExit as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(0 if error.code is None else 1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)
            os._exit(0)

    def has_ended(self) -> bool:
        """Tells whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def kill(self) -> None:
        """Kills the process group."""
        os.killpg(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def check(self) -> None:
        """Waits, and raises what a run that failed says."""
        begun = time.monotonic()
        while not self.has_ended():
            if time.monotonic() > begun + LONGEST:
                self.kill()
            time.sleep(0.01)
        if self.code:
            raise RuntimeError(f"the run ended with {self.code}: {self.said.read_text()[-2000:]}")


class Ended(NamedTuple):
    """A run that ended by itself."""

    seconds: float
    kills: int


def make(folder: Path, size: int) -> list[str]:
    """Writes an image and a model; returns the command but for its output."""
    pixels = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    write_ome_zarr(folder / "image.ome.zarr", pixels, (1.0, 1.0), chunk=64)
    options: dict[str, Any] = {"embed_dim": (16, 16), "depths": (1, 2), "num_heads": 2, "attn_kernel_size": 3}
    model = Segmenter("test_rat", 2, width=8, in_chans=1, **options)
    nn.init.normal_(model.classifier.weight, std=0.3)
    model.save(folder / "model")
    program = ["predict", str(folder / "image.ome.zarr")]
    return [*program, "--model", str(folder / "model"), "--quiet"]


@contextlib.contextmanager
def arguments(engine: str) -> Iterator[list[str]]:
    """Yields how an engine is asked for; a cluster of its own lives meanwhile."""
    if engine != "tcp":
        yield {
            "process": [],
            "processes": ["--workers", "2"],
            "dask": ["--scheduler", "dask", "--workers", "2"],
            "ray": ["--scheduler", "ray", "--workers", "2"],
        }[engine]
        return
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(CLUSTER)
        file.flush()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, file.name], text=True, start_new_session=True, **pipes) as cluster:
            assert cluster.stdout is not None
            assert cluster.stdin is not None
            try:
                yield ["--scheduler", cluster.stdout.readline().strip()]
            finally:
                cluster.stdin.close()
                cluster.wait(60)


def marks(output: Path) -> int:
    """Counts what is finished of a run."""
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir(output.with_name(f"{output.name}.partial") / ".predict" / "done"))
    return -1


def start(command: list[str], output: Path) -> Run:
    """Starts a run."""
    return Run([*command, "--output", str(output)], output.parent / "said.txt")


def uninterrupted(command: list[str], output: Path) -> tuple[float, int]:
    """Runs once; returns the seconds and how many things were finished before the last one."""
    begun, process, most = time.monotonic(), start(command, output), 0
    while not process.has_ended():
        most = max(most, marks(output))
        time.sleep(0.002)
    process.check()
    return time.monotonic() - begun, most


def killed(command: list[str], output: Path, moments: list[tuple[int, float]]) -> Ended:
    """Kills runs, each when so many things are finished and some seconds later, and lets the last one end."""
    begun, kills = time.monotonic(), 0
    for count, delay in moments:
        process = start(command, output)
        while not process.has_ended() and marks(output) < count:
            time.sleep(0.001)
        time.sleep(delay)
        if process.has_ended():
            process.check()
        else:
            process.kill()
            kills += 1
        if output.exists():
            return Ended(time.monotonic() - begun, kills)
    start(command, output).check()
    return Ended(time.monotonic() - begun, kills)


def computing(process: Run, engine: str) -> list[psutil.Process]:
    """Returns the processes that compute tiles."""
    # not all that Ray names "ray::": of its agents one may not die
    words = {"processes": "forkserver", "dask": "spawn_main", "ray": "ray::_ray_tile", "tcp": "spawn_main"}[engine]
    own = psutil.Process() if engine == "tcp" else psutil.Process(process.pid)
    with contextlib.suppress(psutil.Error):
        there = [p for p in own.children(recursive=True) if p.is_running() and words in " ".join(p.cmdline())]
        parents = {p.ppid() for p in there}
        return [p for p in there if p.pid not in parents and p.cpu_times().user > 0.5]
    return []


def worker_killed(command: list[str], output: Path, engine: str, moments: list[tuple[int, float]]) -> Ended:
    """Kills processes that compute, of one run, which ends by itself."""
    begun, kills, process = time.monotonic(), 0, start(command, output)
    for count, delay in moments:
        while not process.has_ended() and marks(output) < count:
            time.sleep(0.001)
        time.sleep(delay)
        there: list[psutil.Process] = []
        while not there and not process.has_ended():
            there = computing(process, engine)
        if there:
            with contextlib.suppress(psutil.Error):
                there[count % len(there)].kill()
                kills += 1
    process.check()
    return Ended(time.monotonic() - begun, kills)


def files(folder: Path) -> dict[Path, bytes]:
    """Returns the bytes of each file."""
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_same(one: Path, other: Path) -> None:
    """Compares each file of two outputs, and that nothing is left of the runs."""
    here, there = files(one), files(other)
    names = [name for name in here | there if here.get(name) != there.get(name)]
    assert not names, f"{one} and {other} differ in {names}"
    left = [each for each in one.parent.iterdir() if ".partial" in each.name]
    assert not left, f"{left} were left"


def try_out(engine: str, task: str, who: str, kills: int, seed: int, folder: Path, size: int) -> str:
    """Compares a run that was killed with one that was not; says what was done."""
    rng = random.Random(f"{engine} {task} {who} {seed}")
    command = [*make(folder, size), "--task", task, *TASKS[task]]
    with arguments(engine) as how:
        whole, output = (folder / name / "out.ome.zarr" for name in ("whole", "killed"))
        for each in (whole, output):
            each.parent.mkdir()
        seconds, count = uninterrupted([*command, *how], whole)
        last = count if who == "group" else int(0.6 * count)
        moments = sorted((rng.randint(0, last), rng.uniform(0, 0.2)) for _ in range(kills))
        if who == "group":
            ended = killed([*command, *how], output, moments)
        else:
            ended = worker_killed([*command, *how], output, engine, moments)
    assert_same(whole, output)
    return (
        f"{engine:9} {task:13} {who:6}: {ended.kills} kills of {kills} at {[at for at, _ in moments]} of {count}, "
        f"{ended.seconds:.0f} s, {seconds:.0f} s uninterrupted: the same {len(files(output))} files"
    )


def main() -> None:
    """Tries engines and tasks, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--who", nargs="+", default=["group"], choices=["group", "worker"])
    parser.add_argument("--size", type=int, default=300, help="pixels of the image along each axis")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ.update(RAY_worker_niceness="0", OMP_NUM_THREADS="1")
    for who in given.who:
        for engine in given.engines:
            for task in given.tasks:
                with tempfile.TemporaryDirectory() as folder:
                    args = given.kills, given.seed, Path(folder), given.size
                    print(time.strftime("%H:%M:%S"), try_out(engine, task, who, *args), flush=True)


if __name__ == "__main__":
    main()
