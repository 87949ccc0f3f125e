"""Lightning's Trainer and command line train what `train.py` trains."""

import math

import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("pycocotools")
pytorch = pytest.importorskip("lightning.pytorch")

from train_lightning import TaskData, TaskModule

from helpers import call, quick
from rat_timm.dense import Segmenter
from training.tasks import task_class

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(output, **options):
    return pytorch.Trainer(
        default_root_dir=output,
        accelerator="cpu",
        logger=pytorch.loggers.CSVLogger(output),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )


@pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
def test_each_task_trains(task, tmp_path):
    config = quick(tmp_path, task)
    data = TaskData(config)
    module = TaskModule(data)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=2, limit_val_batches=2)
    run.fit(module, data)
    assert run.global_step == 4
    assert math.isfinite(run.callback_metrics["train/loss"])
    assert f"validation/{task_class(config).score}" in run.callback_metrics
    assert data.training.epoch == 1
    changed = [name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 0.5 * len(before)
    assert (tmp_path / "model").is_dir()


def test_figures_are_those_of_all_samples_and_the_saved_model_gives_them(tmp_path):
    data = TaskData(quick(tmp_path, "segmentation"))
    module = TaskModule(data)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=4)
    run.fit(module, data)
    task, model = task_class(data.config).load(data.config, tmp_path / "model")
    assert isinstance(model, Segmenter)
    measured = []
    with torch.no_grad():
        for index in range(len(data.validation)):
            batch = task.collate([data.validation[index]])
            (prediction,) = task.predict(lambda batch: task.outputs(model, batch), batch)
            measured.append(task.measure(prediction, batch, 0))
    for name, value in task.summarize(measured).items():
        assert float(run.callback_metrics[f"validation/{name}"]) == pytest.approx(value, rel=1e-4, nan_ok=True)
    assert task.facts.spacing_range == [[1.0, 1.0], [1.0, 1.0]]


def test_a_batch_size_is_said(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a number"):
        TaskData(quick(tmp_path, "segmentation", batch_size="auto"))


def arguments(output):
    values = {
        "data.config.output": output,
        "data.config.task": "segmentation",
        "data.config.quick": "true",
        "data.config.workers": 0,
        "data.config.device": "cpu",
        "trainer.fast_dev_run": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": output,
    }
    return [f"--{name}={value}" for name, value in values.items()]


def test_the_command_line(tmp_path, monkeypatch, capfd):
    call("train_lightning.py", "fit", *arguments(tmp_path), patch=monkeypatch, capture=capfd)
    with pytest.raises(SystemExit, match="0"):
        call("train_lightning.py", "fit", "--help", patch=monkeypatch, capture=capfd)
    assert "--data.config.task" in capfd.readouterr().out
