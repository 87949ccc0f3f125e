import gc
import os
import re

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: workers that share cores must not fight for them with threads

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# What runs compilers and whole trainings: counting lines doubles their time, and other tests run the same lines.
UNCOUNTED_FILES = {
    "test_benchmark",
    "test_consumers",
    "test_context_study",
    "test_evaluate",
    "test_examples",
    "test_export",
    "test_huggingface",
    "test_pretrain_training",
    "test_resolution_study",
    "test_timm_contract",
    "test_training",
    "test_training_dense",
}
UNCOUNTED_TESTS = re.compile("compil|export|program|trace|train|learn")

# What takes half a minute and more comes first, so that no worker is left with it when the others are done.
LONG_TESTS = (
    "test_over_ray",
    "test_two_processes_with_shards_do_what_one_does",
    "test_a_day_on_a_gpu",
    "test_compile_without_graph_breaks",
    "test_two_processes_do_what_one_does",
    "test_a_cluster_of_ray_on_this_machine",
    "test_a_killed_run_goes_on_as_if_it_had_not_been_killed",
    "test_programs_and_onnxruntime_give_what_the_model_gives",
    "test_compiled_training_on_masked_pyramids",
    "test_a_detector_learns_in_seconds",
)


def pytest_addoption(parser):
    """How long what kills may take."""
    parser.addoption("--kills", type=int, default=2, help="moments at which each run of test_kills dies; 0: all")


def pytest_collection_modifyitems(items):
    """Leaves the lines of tests that take long uncounted, which run all the same, and begins with the longest."""
    for item in items:
        if item.path.stem in UNCOUNTED_FILES or UNCOUNTED_TESTS.search(item.originalname):
            item.add_marker("no_cover")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    long = sorted((i for i in items if i.originalname in LONG_TESTS), key=lambda i: LONG_TESTS.index(i.originalname))
    rest = [item for item in items if item.originalname not in LONG_TESTS]
    share = -(-len(rest) // workers)  # as xdist deals them out
    items[:] = [item for w in range(workers) for item in (*long[w::workers], *rest[w * share : (w + 1) * share])]


def pytest_collection_finish():
    """Spares every later garbage collection what was imported, which stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Lets a test compute as programs that are started do (`helpers.start`)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Returns ``once(name, make)``: a folder that ``make(folder)`` fills, once for all workers of pytest."""
    filelock = pytest.importorskip("filelock")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def filled(name, make):
        folder, made = shared / name, shared / f"{name}.made"
        with filelock.FileLock(shared / f"{name}.lock"):
            if not made.exists():
                folder.mkdir()
                torch.set_num_threads(1)
                make(folder)
                made.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def quickly(once):
    """Trains a task with --quick, once for all workers of pytest; returns the folder."""
    from helpers import quick
    from training import trainer

    return lambda task: once(f"quick-{task}", lambda folder: trainer.train(quick(folder, task)))
