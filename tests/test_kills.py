"""A run that is killed goes on to the same bytes, whatever it was doing; `kills.py` kills at more random moments."""

import os
import random
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from test_predict import levels
from test_predict_receptive import segmenter

from kills import files
from rat_timm.predict import predict

pytest.importorskip("zarr")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}
TASKS = {"labels": {}, "probabilities": {"halo": 4.0}, "instances": {"scale": 4.0, "largest": 8.0}}


def in_a_child(call, folder, dies_at):
    """Calls in a process that dies before a change of a file in a folder; returns how many there were if it did not."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return int((folder / "changes").read_text()) if code == 0 else None
    count = 0

    def look(event, arguments):
        nonlocal count
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        if is_change and isinstance(arguments[0], str | os.PathLike) and str(folder) in str(arguments[0]):
            if count == dies_at:
                os._exit(9)
            count += 1

    sys.addaudithook(look)
    try:
        call()
        (folder / "changes").write_text(str(count))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
    return None


@pytest.mark.parametrize("begins", ["anew", "over another"])
@pytest.mark.parametrize(
    ("task", "ending"), [*((task, ".ome.zarr") for task in TASKS), ("labels", ".ome.tif"), ("labels", ".nii.gz")]
)
def test_a_run_that_dies_at_any_change_of_a_file_goes_on_to_the_same_bytes(tmp_path, task, ending, begins, request):
    x, model = torch.randn(1, 70, 300, dtype=torch.float64), segmenter()
    output, whole = tmp_path / "out" / f"out{ending}", tmp_path / "whole"
    output.parent.mkdir()

    def call(**changes):
        options = {"task": task, "tile": (35.0, 100.0), **TASKS[task], "progress": False, "dtype": "float64", **changes}
        predict(levels(x, (1.0, 1.0)), model, output, **options)

    def again():
        call(resume=False)

    changes = in_a_child(call, tmp_path, -1)
    assert changes > 60
    shutil.move(output.parent, whole)
    count = request.config.getoption("--kills")
    moments = range(changes) if count == 0 else random.Random(f"{task} {begins}").sample(range(changes), count)
    for moment in moments:
        output.parent.mkdir()
        if begins == "over another":
            assert in_a_child(lambda: call(tile=50.0), tmp_path, changes // 2) is None
        in_a_child(call if begins == "anew" else again, tmp_path, moment)
        if not output.exists():
            call()
        assert files(output.parent) == files(whole), f"at change {moment} of {changes}"
        shutil.rmtree(output.parent)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["group", "worker"])
@pytest.mark.parametrize("engine", ["process", "processes", "dask", "tcp", "ray"])
def test_the_command_is_killed(engine, who, request):
    """In processes of its own: clusters take their time, so that they are tried with ``--kills 0`` alone."""
    if request.config.getoption("--kills") and (engine, who) != ("process", "group"):
        pytest.skip("takes a minute: --kills 0")
    if (engine, who) == ("process", "worker"):
        pytest.skip("there is one process")
    program, options = Path(__file__).with_name("kills.py"), ["--tasks", "labels", "--kills", "2", "--size", "120"]
    words = [sys.executable, str(program), "--engines", engine, "--who", who, *options]
    assert "the same" in subprocess.run(words, check=True, capture_output=True, text=True).stdout
