import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch: workers that share cores must not fight for them with threads

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
