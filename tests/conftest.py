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


def pytest_collection_modifyitems(items):
    """Leaves the lines of slow tests uncounted; they run all the same."""
    for item in items:
        if item.path.stem in UNCOUNTED_FILES or UNCOUNTED_TESTS.search(item.originalname):
            item.add_marker("no_cover")


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
def quickly(tmp_path_factory):
    """Trains a task with --quick, once for all workers of pytest; returns the folder."""
    filelock = pytest.importorskip("filelock")
    from helpers import quick
    from training import trainer

    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def train(task):
        output = shared / f"quick-{task}"
        with filelock.FileLock(f"{output}.lock"):
            if not (output / "model" / "facts.json").exists():
                torch.set_num_threads(1)
                trainer.train(quick(output, task))
        return output

    return train
