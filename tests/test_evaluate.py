"""`examples/evaluate.py`: figures are those of slow, independent code, and conditions what they say."""

import contextlib
import functools
import importlib
import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("jsonargparse")
pytest.importorskip("monai")
pytest.importorskip("edt")
pytest.importorskip("pycocotools")
psutil = pytest.importorskip("psutil")

from helpers import call, losses, places, quick
from rat_timm.data import Sample
from rat_timm.dense import Segmenter, instances
from training import trainer
from training.conditions import Condition, Evaluation, conditions, view
from training.config import Config
from training.frames import Discs

pytestmark = pytest.mark.usefixtures("one_thread")


def dice(predicted, true):
    both = sum(1 for p, t in zip(predicted.flatten(), true.flatten(), strict=True) if p and t)
    return 2 * both / (int(predicted.sum()) + int(true.sum()))


def average_precision(pairs, threshold):
    """TP / (TP + FP + FN), pairs of an IoU above a half being the only ones of their objects."""
    hits = others = 0
    for predicted, true in pairs:
        found = [predicted == number for number in np.unique(predicted) if number]
        wanted = [true == number for number in np.unique(true) if number]
        matched = sum((a & b).sum() >= threshold * (a | b).sum() for a in found for b in wanted)
        hits, others = hits + matched, others + len(found) + len(wanted) - 2 * matched
    return hits / (hits + others)


def normalized(sample, model):
    mean, std = (np.mean(model.backbone.pretrained_cfg[name]) for name in ("mean", "std"))
    return (sample.image - mean) / std


def test_figures_of_segmentation(quickly, tmp_path, monkeypatch, capfd):
    output = quickly("segmentation")
    options = ("--trained", output, "--output", tmp_path, "--device", "cpu")
    printed = call("evaluate.py", *options, "--wrong", 0.5, patch=monkeypatch, capture=capfd)
    assert "surface_dice" in printed
    each, together = pd.read_csv(tmp_path / "images.csv"), pd.read_csv(tmp_path / "all.csv")
    model, frames = Segmenter.load(output / "model"), Discs("test", 2)
    for wrong in (1.0, 0.5):
        rows = each[each.wrong == wrong]
        assert rows.image.tolist() == frames.names
        for sample, row in zip(frames, rows.itertuples(), strict=True):
            with torch.no_grad():
                logits = model(normalized(sample, model)[None], spacing=wrong)
            assert row.dice == pytest.approx(dice(logits[0].argmax(0), sample.target > 0), abs=1e-6)
        assert together[together.wrong == wrong].dice.item() == pytest.approx(rows.dice.mean())
    assert together.dice.nunique() == 2  # what was told wrongly made a difference
    assert {file.name for file in tmp_path.iterdir()} == {"images.csv", "all.csv", "factors.png", "prediction.png"}


@pytest.mark.slow
def test_figures_of_instances_at_other_pixel_sizes(quickly, tmp_path, monkeypatch, capfd):
    output = quickly("instances")
    options = ("--trained", output, "--output", tmp_path, "--device", "cpu", "--factors", 1, 2)
    call("evaluate.py", *options, patch=monkeypatch, capture=capfd)
    together = pd.read_csv(tmp_path / "all.csv")
    model = Segmenter.load(output / "model")
    for factor in (1, 2):
        pairs = []
        for sample in Discs("test", 2):
            image = normalized(sample, model)[None]
            if factor == 2:  # the triangle of reach 2 between centres: 1/8, 3/8, 3/8, 1/8, less at the border
                weights = torch.zeros(48, 96)
                for place in range(48):
                    for tap, weight in zip(range(2 * place - 1, 2 * place + 3), (1, 3, 3, 1), strict=True):
                        if 0 <= tap < 96:
                            weights[place, tap] = weight
                weights /= weights.sum(1, keepdim=True)
                image = weights @ image @ weights.T
            with torch.no_grad():
                maps = model(image, spacing=float(factor), out=None if factor == 1 else (1.0, 1.0))
            found = instances(maps, 1.0, scale=8.0, min_size=16.0)[0]
            pairs.append((found.numpy(), sample.target.numpy()))
        for name, threshold in (("ap50", 0.5), ("ap75", 0.75)):
            said = together[together.factor == factor][name].item()
            assert said == pytest.approx(average_precision(pairs, threshold), abs=0.02 if factor == 2 else 1e-9)


@pytest.mark.slow
def test_figures_of_detection(quickly, tmp_path, monkeypatch, capfd):
    output = quickly("detection")
    options = ("--trained", output, "--output", tmp_path, "--device", "cpu", "--factors", 0.5, 1)
    call("evaluate.py", *options, patch=monkeypatch, capture=capfd)
    together = pd.read_csv(tmp_path / "all.csv")
    assert (together.map50 > 0.4).all()  # boxes of images twice as large are brought back
    assert (tmp_path / "prediction.png").exists()


def test_images_of_many_objects_count_them_all():
    detection = importlib.import_module("training.tasks.detection")
    corners = 10.0 * torch.cartesian_prod(torch.arange(15), torch.arange(12))
    true = {"boxes": torch.cat((corners, corners + 8), dim=1), "labels": torch.ones(180, dtype=torch.long)}
    found = {**true, "scores": torch.linspace(0.1, 0.9, 180)}
    assert detection.figures([(found, true)]) == pytest.approx({"map": 1, "map50": 1, "map75": 1})
    half = {name: values[:90] for name, values in found.items()}
    assert detection.figures([(half, true)])["map"] == pytest.approx(0.5, abs=0.01)


def test_conditions():
    told = conditions([0.5, 1], [1.25], resized=True)
    assert told == [
        *(Condition(0.5, 1.0, control) for control in (False, True)),
        *(Condition(1, 1.0, control) for control in (False, True)),
        *(Condition(1.0, 1.25, control) for control in (False, True)),
    ]
    assert conditions([1], [], resized=False) == [Condition()]
    with pytest.raises(ValueError, match=r"wrong must be positive numbers, got \[0\.0\]"):
        conditions([1], [0.0], resized=False)


FRAMES = [((40, 52), (0.5, 0.5)), ((12, 24, 20), (2.0, 0.5, 0.5))]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("wrong", [1.0, 1.25])
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize(("size", "spacing"), FRAMES)
def test_what_a_model_is_given(size, spacing, factor, wrong, resized):
    """Pixels that are coordinates tell where they lie; what is told is that, times what is wrong."""
    frame = Sample(places(size, spacing), torch.tensor(spacing), target=torch.zeros(size, dtype=torch.int32))
    scenes = view(frame, Condition(factor, wrong, resized), [1], spacing)
    image, told = scenes.levels[0].image[0], scenes.spacing[0]
    expected = torch.tensor(spacing) * (1 if resized else factor * wrong)
    torch.testing.assert_close(told, expected)
    at = places(image.shape[1:], told.tolist()) / wrong
    for axis, n in enumerate(image.shape[1:]):
        inner = slice(2, -2) if n > 8 else slice(n // 2, n // 2 + 1)
        middle = tuple(inner if other == axis else slice(None) for other in range(len(size)))
        error = (image[axis][middle] - at[axis][middle]).abs().median()
        assert float(error) < 0.1 * float(told[axis])
    true = [float(to) / wrong for to in told]  # of what the model is given
    assert list(image.shape[1:]) == [round(n * step / to) for n, step, to in zip(size, spacing, true, strict=True)]
    if factor == 1 and (not resized or wrong == 1):
        assert scenes.out is None
    else:
        torch.testing.assert_close(scenes.out.spacing[0].float(), torch.tensor(spacing) * wrong)
        assert scenes.out.shape == size


def test_the_control_brings_images_to_the_training_size(tmp_path):
    """A network that sees images alone gets the same pixels at all factors, and answers on the file's pixels."""
    pytest.importorskip("segmentation_models_pytorch")
    options = {"model": "smp:unet-test_resnet", "pretrained": False, "crops": 1}
    trainer.train(quick(tmp_path, "segmentation", **options))
    evaluation = Evaluation(tmp_path, None, "test", tuple(conditions([0.5, 1, 2], [], resized=True)))
    seen = []
    forward = type(evaluation.loaded[1]).forward
    evaluation.loaded[1].forward = lambda x, **told: (
        seen.append(x.shape[2:]),
        forward(evaluation.loaded[1], x, **told),
    )[1]
    measured = evaluation.measure(0)
    assert seen == [(192, 192), (96, 96), (96, 96), (96, 96), (48, 48), (96, 96)]
    found = dict(zip(evaluation.conditions, (one.values["dice"] for one in measured), strict=True))
    assert found[Condition(1.0)] == found[Condition(1.0, resized=True)]
    assert evaluation.picture(0, Condition(2.0)).shape == (96, 96, 3)


def test_classifiers_are_evaluated_elsewhere(tmp_path):
    trainer.remember(Config(tmp_path), write=True)
    with pytest.raises(ValueError, match=r"trained must be a model of labelled images, got one of classification"):
        _ = Evaluation(tmp_path, None, "test", (Condition(),)).config


def test_other_data(quickly, tmp_path):
    evaluation = Evaluation(
        quickly("segmentation"), str(tmp_path), "test", (Condition(),), tile=(64, 64), spacing=(2.0, 2.0)
    )
    assert evaluation.config.data == str(tmp_path)
    assert evaluation.config.tile == [64, 64]
    assert evaluation.config.spacing == [2.0, 2.0]
    with pytest.raises(ValueError, match="data: there is no folder"):
        _ = evaluation.frames


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster that programs find."""
    interrupt = signal.getsignal(signal.SIGINT)  # Ray Train sets its own, and leaves it
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.train")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: workers would starve beside other tests
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # of processes that would do no work
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # of nodes in a cloud
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield
    ray.shutdown()
    cluster.shutdown()
    signal.signal(signal.SIGINT, interrupt)


@contextlib.contextmanager
def killing(find):
    """Kills the process whose id a function returns, once it returns one."""
    killed, done = [], threading.Event()

    def work():
        while not (done.is_set() or killed):
            time.sleep(0.02)
            if pid := find():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert killed


def writing_worker(output):
    """Returns the id of the process that has written a checkpoint, and events, whose file is named after it."""
    saved = any(path.name.isdigit() for path in output.glob("checkpoints/*"))
    return int(next(output.glob("events.out.*")).name.split(".")[-2]) if saved else None


def busy_worker(title):
    """Returns the id of a process of Ray that does something."""
    processes = psutil.Process().children(recursive=True)
    return next((one.pid for one in processes if one.is_running() and title in " ".join(cmdline(one))), None)


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:  # has ended
        return []


@pytest.mark.slow
def test_over_ray(quickly, tmp_path, cluster, monkeypatch, capfd):
    """Two workers train and two evaluate; one is killed each time, and the numbers are those of one process.

    What is hidden of masked images is drawn for each image, not for each process.
    """
    run = functools.partial(call, patch=monkeypatch, capture=capfd)
    trained = tmp_path / "trained"
    options = ["--task", "masked", "--checkpoint_every", 1, "--quick", "true", "--workers", 0, "--device", "cpu"]
    with killing(lambda: writing_worker(trained)):
        run("train_ray.py", "--output", trained, "--num_workers", 2, *options)
    assert len(list(trained.glob("events.out.*"))) > 1  # it did begin again
    trainer.train(quick(tmp_path / "whole", "masked"))
    assert losses(trained) == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    importlib.import_module("ray").shutdown()  # as a program that ends

    options = ("--trained", quickly("instances"), "--device", "cpu", "--factors", 0.5, 1)
    with killing(lambda: busy_worker("ray::Worker.measure")):
        run("evaluate.py", "--output", tmp_path / "ray", "--num_workers", 2, *options)
    run("evaluate.py", "--output", tmp_path / "one", *options)
    for name in ("images.csv", "all.csv"):
        tables = [pd.read_csv(tmp_path / place / name) for place in ("ray", "one")]
        pd.testing.assert_frame_equal(*tables, atol=1e-6)
