"""What several tests share."""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from rat_timm.models.rat import model as rat_model

EXAMPLES = Path(__file__).parents[1] / "examples"


def slow(*values):
    """Parameters with which a test is one of those that only ``.ci/run slow`` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def lively(model):
    """Random weights large enough that attention is far from uniform and every influence shows."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "fc" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "gamma" in name or name.endswith(("sga.norm2.weight", "sga.norm3.weight")):
            torch.nn.init.ones_(parameter)
    return model


def start(program, *arguments, launcher=()):
    """Starts an example as its users do, in a process of its own."""
    command = [sys.executable, *launcher, EXAMPLES / program, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout=600, code=0):
    """Waits for a program; returns what it printed."""
    printed, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, printed[-4000:]
    return printed


def together(work, *arguments):
    """Calls a function in two processes, connected, on one thread each; its first argument is which one it is.

    Both are forks of one process that has imported what trains, but has computed nothing yet. Returns what they wrote
    to the standard error, which is else that of the time when this process was started.
    """
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["helpers", "training.trainer", "training.tasks.segmentation"]
        )
        torch.multiprocessing.start_processes(_connect, (folder, work, arguments), 2, start_method="forkserver")
        return "".join(Path(folder, f"stderr-{place}").read_text() for place in range(2))


def train_all(place, configs):
    """Trains one after the other, in one of the processes of `together`."""
    for config in configs:
        importlib.import_module("training.trainer").train(config)


def _connect(place, folder, work, arguments):
    with open(f"{folder}/stderr-{place}", "w") as file:
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=place, world_size=2)
    work(place, *arguments)
    dist.destroy_process_group()


def call(program, *arguments, patch, capture):
    """Runs an example in this process, which has imported most of what it needs; returns what it printed.

    Args:
        program: Name of the file.
        arguments: Of its command line.
        patch: pytest's ``monkeypatch``.
        capture: pytest's ``capfd``.
    """
    patch.setattr(sys, "argv", [program, *map(str, arguments)])
    threads = torch.get_num_threads()
    capture.readouterr()
    try:
        importlib.import_module(program.removesuffix(".py")).main()
    finally:
        torch.set_num_threads(threads)
    return capture.readouterr().out


def record_images(monkeypatch):
    """Returns a list to which each run of a hierarchical RAT adds its images, on their grids."""
    seen = []
    stage_inputs = rat_model.stage_inputs

    def record(cfg, images):
        seen.append(images)
        return stage_inputs(cfg, images)

    monkeypatch.setattr(rat_model, "stage_inputs", record)
    return seen


def read_events(output):
    """Reads what TensorBoard shows of a training."""
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output))
    events.Reload()
    return events


def losses(output):
    """The loss after each step, as TensorBoard shows it."""
    scalars = read_events(output).Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, len(scalars) + 1))
    return [scalar.value for scalar in scalars]


def wait_for_checkpoint(output, process, least=0):
    """Waits until a checkpoint of more than ``least`` steps is there."""
    folder, end = output / "checkpoints", time.monotonic() + 400
    while not any(path.name.isdigit() and int(path.name) > least for path in folder.glob("*")):
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < end
        time.sleep(0.02)


def places(size, spacing):
    """An image whose channels are the physical coordinates of its pixels."""
    axes = [(torch.arange(n) + 0.5) * step for n, step in zip(size, spacing, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).float()


def quick(output, task, **options):
    """The config of a training of seconds."""
    return importlib.import_module("training.config").Config(
        output, task=task, quick=True, workers=0, device="cpu", **options
    )


def write_ome_zarr(place, pixels, spacing, unit="micrometer", chunk=16):
    """Writes an OME-Zarr 0.5 of one level, as its specification says: what libraries write changes with them."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(place), mode="w")
    group.create_array("0", data=pixels, chunks=(chunk,) * pixels.ndim)
    axes = [{"name": axis, "type": "space", "unit": unit} for axis in "zyx"[-pixels.ndim :]]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(spacing)}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    return place
