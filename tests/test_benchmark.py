"""The day on a GPU runs through on the CPU, with tiny models."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "gpu_day.sh"


def run(folder, **variables):
    python = str(Path(sys.executable).parent)
    env = os.environ | {"GPU_DAY_DRY": "1", "PATH": f"{python}{os.pathsep}{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", SCRIPT, folder], env=env, capture_output=True, text=True)
    with (folder / "parts.csv").open() as file:
        parts = {row["part"]: row["status"] for row in csv.DictReader(file)}
    return done, parts


@pytest.mark.slow
def test_a_day_on_a_gpu(tmp_path):
    done, parts = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert parts == dict.fromkeys(["packages", "layers and models", "inference", "compiled training"], "0")
    with (tmp_path / "benchmarks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["test_rat", "test_rat+conv", "test_rat_3d"]
    assert all(float(row["seconds"]) > 0 and "torch" in row["versions"] and not row["error"] for row in rows)
    assert "packages ended with 0" in (tmp_path / "log.txt").read_text()


def test_parts_without_time_fail_and_the_next_is_tried(tmp_path):
    done, parts = run(tmp_path, GPU_DAY_SECONDS="9", GPU_DAY_PARTS="inference|training")
    assert done.returncode == 1
    assert parts == {"inference": "no time", "compiled training": "no time"}
