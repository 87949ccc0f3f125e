"""Each engine computes each tile, also if a worker is killed, and ends with what a tile raised."""

import os
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import pytest

from rat_timm.predict import engines
from rat_timm.predict.engines import run


@dataclass
class Work:
    """Adds a line to a tile's file. Kills its process the first time at one tile; raises at another."""

    folder: Path
    kill: int | None = None
    fail: int | None = None
    seconds: float = 0.0

    def __setstate__(self, state):
        self.__dict__.update(state)
        with (self.folder / "sent").open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    def __call__(self, tile):
        if tile == self.kill and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if tile == self.fail:
            raise KeyError("no such tile", tile)
        time.sleep(self.seconds)
        with (self.folder / f"{tile}.txt").open("a") as stream:
            stream.write(f"{os.getpid()}\n")

    def computed(self):
        """Returns, of each tile, the processes that computed it."""
        return {int(file.stem): list(map(int, file.read_text().split())) for file in self.folder.glob("*.txt")}

    def sent(self):
        """Returns the processes that the work was sent to, as often as it was."""
        return list(map(int, (self.folder / "sent").read_text().split()))


TILES = [*range(3, 23), 100, 1, 50]


def check_a_run_with_a_death_and_a_failure(scheduler, folder):
    """One run has both, since engines start slowly. The tile that fails is the last."""
    work, told = Work(folder, kill=7, fail=50, seconds=0.05), []
    with pytest.raises(KeyError) as error:
        run(work, TILES, scheduler=scheduler, workers=2, done=told.append)
    assert type(error.value) is KeyError
    assert error.value.args == ("no such tile", 50)
    assert (folder / "killed").exists()
    computed = work.computed()
    assert sorted(told) == sorted(computed) == sorted(set(TILES) - {50})
    again = [tile for tile, processes in computed.items() if len(processes) > 1]
    assert len(again) <= 4  # what two processes had in hand
    processes = {process for each in computed.values() for process in each}
    assert len(processes) > 1
    assert os.getpid() not in processes
    return work, processes


def test_this_process_goes_tile_by_tile(tmp_path):
    work, told = Work(tmp_path), []
    run(work, TILES, done=told.append)
    assert told == TILES
    assert work.computed() == {tile: [os.getpid()] for tile in TILES}
    run(work, [3])
    assert work.computed()[3] == 2 * [os.getpid()]
    with pytest.raises(KeyError, match="no such tile"):
        run(Work(tmp_path, fail=4), TILES, done=told.append)
    assert told == [*TILES, 3]


@pytest.mark.parametrize("scheduler", [None, "tcp://127.0.0.1:1", "ray://127.0.0.1:1"])
def test_without_tiles_there_is_no_cluster(scheduler):
    run(print, [], scheduler=scheduler, workers=2)


def test_processes(tmp_path):
    work, processes = check_a_run_with_a_death_and_a_failure(None, tmp_path)
    sent = work.sent()
    assert len(sent) == len(set(sent)) <= 4  # once to each of two, and of two that replaced them
    assert processes <= set(sent)


@pytest.mark.slow
def test_a_cluster_of_dask_on_this_machine(tmp_path):
    pytest.importorskip("distributed")
    work, processes = check_a_run_with_a_death_and_a_failure("dask", tmp_path)
    sent = work.sent()
    assert len(sent) == len(set(sent)) <= 3
    assert processes <= set(sent)


def test_a_cluster_of_dask_that_runs(tmp_path):
    """It goes on after the run, and holds nothing of it."""
    distributed = pytest.importorskip("distributed")
    options = {"processes": False, "protocol": "tcp", "host": "127.0.0.1", "dashboard_address": None}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster:
        address = cluster.scheduler_address
        assert address.startswith("tcp://")
        run(Work(tmp_path), TILES, scheduler=address)
        assert sorted(Work(tmp_path).computed()) == sorted(TILES)
        assert len(Work(tmp_path).sent()) <= 3  # the scheduler's copy, and one of each worker
        with pytest.raises(KeyError) as error:
            run(Work(tmp_path, fail=100), TILES, scheduler=address, workers=1)
        assert error.value.args == ("no such tile", 100)
        for worker in cluster.workers.values():
            assert not [name for name in worker.plugins if name.startswith("rat_timm")]


def test_a_cluster_of_ray_on_this_machine(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 would wait for all others on a busy machine
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))  # where its workers look
    work, processes = check_a_run_with_a_death_and_a_failure("ray", tmp_path)
    sent = work.sent()
    assert len(sent) == len(set(sent))
    assert processes <= set(sent)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("scheduler", "address", "expected"),
    [
        ("ray", None, (("local",), {"num_cpus": 2, "include_dashboard": False})),
        ("ray", "10.0.0.1:6379", ((), {})),
        ("ray://10.0.0.1:10001", None, (("ray://10.0.0.1:10001",), {})),
    ],
)
def test_which_cluster_of_ray_it_is(monkeypatch, scheduler, address, expected):
    ray = pytest.importorskip("ray")

    def init(*args, **kwargs):
        assert (args, kwargs) == expected
        raise ConnectionError("that will do")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match="that will do"):
        run(print, [1], scheduler=scheduler, workers=2)


def test_few_tiles_are_handed_out_at_a_time():
    """As many as there are places for, though that changes; at least one."""
    handed, told, places = [], [], [4, 0, 2]
    with ThreadPoolExecutor(2) as pool:

        def submit(tile):
            handed.append(tile)
            assert len(handed) - len(told) <= 4
            return pool.submit(time.sleep, 0.001)

        engines._hand_out(submit, lambda: places.pop(0) if places else 1, range(50), told.append)
    assert handed == list(range(50))
    assert sorted(told) == handed


@pytest.mark.parametrize("deaths", [3, 4])
def test_a_tile_that_kills_is_tried_four_times(deaths):
    left, told = [deaths], []

    def submit(tile):
        future = Future()
        if tile == 2 and left[0]:
            left[0] -= 1
            future.set_exception(BrokenProcessPool("killed"))
        else:
            future.set_result(None)
        return future

    if deaths > 3:
        with pytest.raises(BrokenProcessPool, match="killed"):
            engines._hand_out(submit, lambda: 2, range(5), told.append)
        assert 2 not in told
    else:
        engines._hand_out(submit, lambda: 2, range(5), told.append)
        assert sorted(told) == list(range(5))


@pytest.mark.parametrize("scheduler", ["Dask", "tcp:/host:1", "http://host:1", "slurm", "raylet", ""])
def test_a_scheduler_that_there_is_not(scheduler):
    with pytest.raises(ValueError, match=r'scheduler must be None, "dask", "ray", or an address'):
        run(print, [1], scheduler=scheduler)


def test_a_number_of_workers_that_cannot_be():
    with pytest.raises(ValueError, match="workers must not be negative, got -1"):
        run(print, [1], workers=-1)


@pytest.mark.parametrize(("scheduler", "module", "extra"), [("dask", "distributed", "dask"), ("ray", "ray", "ray")])
def test_what_is_not_installed_is_named(monkeypatch, scheduler, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed: pip install 'rat-timm\[{extra}\]'"):
        run(print, [1], scheduler=scheduler)
