"""Where tiles are computed: in this process, in others on this machine, or on a cluster of Dask or Ray.

An engine starts workers, hands out tiles and restarts what was killed. Nothing goes through it but numbers of tiles:
``work``, sent once to each worker, reads and writes what belongs to a tile.
"""

import os
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache, partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple, TypeAlias

import torch

from ..optional import import_optional

Work: TypeAlias = Callable[[int], None]
"""Computes a tile. It can be pickled, and it does no harm to compute a tile twice."""

RETRIES = 3
"""How often a tile is computed again whose worker was killed."""
_DEATHS = f"workers that computed one tile were killed {RETRIES + 1} times: they may need more memory than there is"


class Engine(NamedTuple):
    """Workers that wait for tiles.

    Attributes:
        submit: Hands out a tile.
        most: Returns how many tiles may be handed out at a time: two for each that can be computed at a time.
    """

    submit: Callable[[int], Future]
    most: Callable[[], int]


Hold: TypeAlias = Callable[[Work], AbstractContextManager[Engine]]
"""Gives work to workers, which hold it as long as the context lasts."""


class Workers:
    """What computes tiles, of one work after another: started with the first tile, and ended with the context.

    Args:
        scheduler: See `run`.
        workers: See `run`.

    Raises:
        ValueError: If an argument does not fit.
    """

    def __init__(self, scheduler: str | None = None, workers: int = 0) -> None:
        check(scheduler, workers)
        self._start = _starter(scheduler, workers)
        self._stack = ExitStack()
        self._hold: Hold | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._hold = None
        self._stack.close()

    def run(self, work: Work, tiles: Sequence[int], done: Work | None = None) -> None:
        """Calls ``work`` for each tile; see the function `run`."""
        if self._start is None:
            for tile in tiles:
                work(tile)
                _tell(done, tile)
        elif tiles:
            if self._hold is None:
                self._hold = self._stack.enter_context(self._start())
            with self._hold(work) as (submit, most):
                _hand_out(submit, most, tiles, done)


def run(
    work: Work,
    tiles: Sequence[int],
    *,
    scheduler: str | None = None,
    workers: int = 0,
    done: Work | None = None,
) -> None:
    """Calls ``work`` for each tile.

    A worker that is killed is replaced, and what it had in hand is computed again, three times at most. Few tiles are
    handed out at a time, so that memory does not grow with their number. Without tiles nothing is started.

    Args:
        work: What is called. Sent once to each worker, however many tiles it gets. Its calls do not depend on each
            other, and a worker of a cluster that has threads calls it in several at once.
        tiles: Numbers of tiles.
        scheduler: None: this process, or ``workers`` others on this machine. "dask", "ray": a cluster on this machine,
            which ends with the run; "ray" is one that runs if the variable RAY_ADDRESS names one or `ray.init` was
            called. An address, "tcp://...", "tls://..." (Dask) or "ray://...": a cluster that runs.
        workers: How many processes; 0: this process, or as many as the engine starts for this machine. On a cluster
            that runs: how many tiles at a time; 0: as many as it has places for.
        done: Is called in this process with each tile that ended, in the order in which they end.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If the engine is not installed; with the extra that installs it.
        ChildProcessError: If a tile's workers are killed whenever it is tried.
        Exception: What ``work`` raised first. Tiles that had begun end before, and ``done`` is told of them.
    """
    with Workers(scheduler, workers) as started:
        started.run(work, tiles, done)


def check(scheduler: str | None, workers: int) -> None:
    """Checks what `run` takes, before anything starts.

    Raises:
        ValueError: If an argument does not fit.
    """
    if workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    _starter(scheduler, workers)


def _starter(scheduler: str | None, workers: int) -> Callable[[], AbstractContextManager[Hold]] | None:
    """Returns what starts and ends workers; None: this process."""
    if scheduler is None:
        return partial(_processes, workers) if workers else None
    if scheduler == "dask" or scheduler.startswith(("tcp://", "tls://")):
        return partial(_dask, scheduler, workers)
    if scheduler == "ray" or scheduler.startswith("ray://"):
        return partial(_ray, scheduler, workers)
    allowed = 'None, "dask", "ray", or an address tcp://..., tls://... (Dask) or ray://...'
    raise ValueError(f"scheduler must be {allowed}, got {scheduler!r}")


def _hand_out(
    submit: Callable[[int], Future], most: Callable[[], int], tiles: Sequence[int], done: Work | None
) -> None:
    """Hands out tiles until all have ended, or one has failed and those at hand have ended."""
    waiting, deaths = deque(tiles), Counter[int]()
    running: dict[Future, int] = {}
    failure: BaseException | None = None
    while running or (waiting and failure is None):
        free = max(most(), 1) - len(running) if failure is None else 0
        running |= {submit(tile): tile for tile in (waiting.popleft() for _ in range(min(free, len(waiting))))}
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            tile = running.pop(future)
            error = future.exception()
            if error is None:
                _tell(done, tile)
            elif isinstance(error, BrokenExecutor) and deaths[tile] < RETRIES:  # Dask and Ray count themselves
                deaths[tile] += 1
                waiting.appendleft(tile)
            elif failure is None:
                failure = error
    if failure is not None:
        raise failure


def _tell(done: Work | None, tile: int) -> None:
    if done is not None:
        done(tile)


@contextmanager
def _processes(workers: int) -> Iterator[Hold]:
    """Processes on this machine, which are other ones for each work."""

    @contextmanager
    def hold(work: Work) -> Iterator[Engine]:
        pool = _Pool(work, workers)
        try:
            yield Engine(pool.submit, lambda: 2 * workers)
        except BrokenExecutor as error:
            raise ChildProcessError(_DEATHS) from error
        finally:
            pool.executor.shutdown(cancel_futures=True)

    yield hold


class _Pool:
    """Processes that are all replaced if one of them is killed, as `concurrent.futures` wants it."""

    def __init__(self, work: Work, workers: int) -> None:
        self.arguments = work, workers
        self.executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.arguments[1], _context(), _hold, self.arguments)

    def submit(self, tile: int) -> Future:
        try:
            return self.executor.submit(_process_tile, tile)
        except BrokenExecutor:
            self.executor.shutdown()
            self.executor = self._start()
            return self.executor.submit(_process_tile, tile)


def _context() -> BaseContext:
    """Returns how processes start: never forked from this one, since then they could use neither CUDA nor threads."""
    if sys.platform != "linux":
        return get_context("spawn")
    context = get_context("forkserver")  # a process that has imported the package, and does nothing but fork
    context.set_forkserver_preload([__package__])
    return context


_held: list[Work] = []  # in a process of a pool: its work


def _hold(work: Work, workers: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _held.append(work)


def _process_tile(tile: int) -> None:
    _held[0](tile)


@contextmanager
def _dask(scheduler: str, workers: int) -> Iterator[Hold]:
    """Starts a cluster of Dask or connects to one; its workers, later ones too, hold the work as a plugin."""
    distributed = import_optional("distributed", "dask")
    with ExitStack() as stack:
        cluster: Any = scheduler
        limit = workers
        if scheduler == "dask":  # Dask holds no results, so that there is nothing to spill where memory is short
            cluster = distributed.LocalCluster(
                n_workers=workers or None, threads_per_worker=1, memory_limit=0, dashboard_address=None
            )
            stack.enter_context(cluster)
            limit = 0
        client = stack.enter_context(distributed.Client(cluster, set_as_default=False))

        @contextmanager
        def hold(work: Work) -> Iterator[Engine]:
            plugin, name = distributed.WorkerPlugin(), f"rat_timm-{uuid.uuid4()}"
            plugin.work = work
            client.register_plugin(plugin, name=name)
            try:
                submit = partial(client.get_executor(pure=False).submit, _dask_tile, name)
                yield Engine(submit, lambda: _most(sum(client.nthreads().values()), limit))
            except distributed.KilledWorker as error:
                raise ChildProcessError(_DEATHS) from error
            finally:
                client.unregister_worker_plugin(name)

        yield hold


def _dask_tile(name: str, tile: int) -> None:
    import_optional("distributed", "dask").get_worker().plugins[name].work(tile)


@contextmanager
def _ray(scheduler: str, workers: int) -> Iterator[Hold]:
    """Starts a cluster of Ray or connects to one; its store holds the work, from which each worker takes it once."""
    ray = import_optional("ray", "ray")
    is_ours, limit = scheduler != "ray" or not ray.is_initialized(), workers
    if scheduler != "ray":
        ray.init(scheduler)
    elif is_ours and os.environ.get("RAY_ADDRESS"):
        ray.init()
    elif is_ours:
        ray.init("local", num_cpus=workers or None, include_dashboard=False)
        limit = 0
    tile = ray.remote(max_retries=RETRIES)(_ray_tile)

    @contextmanager
    def hold(work: Work) -> Iterator[Engine]:
        work_ = [ray.put(work)]  # in a list: not taken from the store for each tile
        try:
            yield Engine(
                lambda number: tile.remote(work_, number).future(),
                lambda: _most(int(ray.cluster_resources().get("CPU", 0)), limit),
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.WorkerCrashedError as error:
            raise ChildProcessError(_DEATHS) from error
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray: {error}") from error

    try:
        yield hold
    finally:
        if is_ours:
            ray.shutdown()


@lru_cache(maxsize=1)
def _from_ray(reference: Any) -> Work:
    return import_optional("ray", "ray").get(reference)


def _ray_tile(work: list[Any], tile: int) -> None:
    _from_ray(work[0])(tile)


def _most(places: int, limit: int) -> int:
    return min(2 * places, limit) if limit else 2 * places
