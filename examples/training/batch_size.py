"""The largest batch that fits, found before training begins."""

import copy
import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset

from training.config import BEGAN, Config
from training.engines import TorchEngine, create_optimizer
from training.processes import count, gather, on_first, rank
from training.steps import Recipe

SHARE = 0.9  # of the memory that a step may take
TRIED = 4  # samples on a CPU, from which on memory is extrapolated
SAMPLED = 0.002  # seconds between looks at the memory
CGROUP = Path("/sys/fs/cgroup")


def find_batch_size(
    model: nn.Module, data: Dataset, collate: Callable[[Sequence], object], recipe: Recipe, config: Config
) -> int:
    """Returns the largest power of two for which a step fits in memory in every process, times the processes.

    Real steps of a copy of the model are taken, on one process's share of a batch: on a GPU until its memory is
    exhausted, on a CPU on 1, 2 and 4 samples, whose peaks in memory say what more samples take, the machine's processes
    together. Processes that share a model (FSDP, DeepSpeed) need less than what is found.

    Args:
        model: Is left as it is.
        data: Samples of training.
        collate: Makes a batch of samples.
        recipe: What a step is.
        config: Says the device, and where the choice is kept: a training that goes on does not search again.

    Raises:
        ValueError: If one sample does not fit.
    """
    file = config.output / "batch_size"
    chosen = on_first(lambda: int(file.read_text()) if (config.output / BEGAN).exists() else 0)
    if chosen:
        return chosen
    most = _power_of_two(len(data) // count())
    fits = _fits_gpu if config.device == "cuda" else _fits_cpu
    with torch.random.fork_rng():
        engine = _engine(model, recipe, config)
        step = Step(engine, data, collate, config.device)
        found = min(gather(fits(step, most)))
        del engine, step
    if not found:
        raise ValueError(f"batch_size: one sample in each of {count()} processes does not fit on {config.device}")
    if rank() == 0:
        print(f"batch_size {found * count()}: {found} in each of {count()} processes fit on {config.device}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(found * count()))
    return found * count()


class Step:
    """A step on so many samples."""

    def __init__(self, engine: TorchEngine, data: Dataset, collate: Callable, device: str) -> None:
        self.engine, self.data, self.collate, self.device = engine, data, collate, device

    def __call__(self, samples: int) -> None:
        """Takes it."""
        batch = self.collate([self.data[index % len(self.data)] for index in range(samples)])
        self.engine.step(batch.to(self.device))


def _engine(model: nn.Module, recipe: Recipe, config: Config) -> TorchEngine:
    trial = copy.deepcopy(model).to(config.device)
    return TorchEngine(trial, lambda model: create_optimizer(model, config), recipe, config.device, None)


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1) if most > 0 else 0


def _fits_gpu(step: Callable[[int], None], most: int) -> int:
    """Returns the largest power of two up to ``most`` at which the GPU has enough memory."""
    fits, samples = 0, 1
    torch.cuda.set_per_process_memory_fraction(SHARE)  # the rest is for what processes exchange
    try:
        while samples <= most:
            step(samples)
            fits, samples = samples, 2 * samples
    except torch.cuda.OutOfMemoryError:
        pass  # which is what was looked for
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    return fits


def _fits_cpu(step: Callable[[int], None], most: int) -> int:
    """Returns the largest power of two up to ``most`` whose steps are expected to fit.

    Memory is that of the process above what it had before the search.
    """
    process = psutil.Process()
    _trim()
    before = process.memory_info().rss
    bound = SHARE * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", count()))
    peaks: dict[int, int] = {}
    samples = 1
    while samples <= min(most, TRIED):
        _trim()
        with _peak(process) as peak:
            step(samples)
        peaks[samples] = peak[0] - before
        if peaks[samples] > bound:
            return samples // 2
        samples *= 2
    if not peaks or max(peaks) < TRIED:
        return max(peaks, default=0)
    each = max((peaks[TRIED] - peaks[1]) / (TRIED - 1), peaks[TRIED] / TRIED / 2)
    fits = TRIED
    while 2 * fits <= most and peaks[TRIED] + (2 * fits - TRIED) * each <= bound:
        fits *= 2
    return fits


def _trim() -> None:
    """Has glibc give back what it keeps of freed memory, which a step would take without being seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _peak(process: psutil.Process) -> Iterator[list[int]]:
    """Yields a list of one number, which is the largest memory of the process once the block is left."""
    peak, done = [process.memory_info().rss], threading.Event()

    def look() -> None:
        while not done.wait(SAMPLED):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], process.memory_info().rss)


def free_memory() -> int:
    """Returns how many bytes are free, to this process's container where there is one."""
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
