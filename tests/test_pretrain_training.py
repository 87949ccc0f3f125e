"""Training on images without labels: masked images and distillation, in the trainer that all tasks share."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("jsonargparse")
pytest.importorskip("monai")
pytest.importorskip("sklearn")
pytest.importorskip("filelock")
pytest.importorskip("tensorboard")

from helpers import call, losses, places, read_events, slow
from rat_timm import hub
from rat_timm.dense import Segmenter
from rat_timm.geometry.grid import Grid, Tokens
from training import trainer
from training.conditions import Evaluation
from training.config import Config, axes_of
from training.crops import Level, collate_scenes
from training.frames import Images, open_frames
from training.tasks import task_class
from training.tasks.distillation import Evidence, add_up, explained
from training.tasks.masked import Masked, neighbours_accuracy

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8}
TAUGHT = {"teacher": "test_rat", "teacher_args": {"pretrained": True}, "crops": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def short(output, task, **options):
    """The config of one epoch of two crops of each image."""
    return Config(
        output, **{"task": task, "device": "cpu", "workers": 0, "epochs": 1, "crops": 1, "batch_size": 4, **options}
    )


def write_images(root, labelled=()):
    """Pictures of noise in stripes, some with labels of the stripes."""
    inside = root / "images" if labelled else root
    inside.mkdir(parents=True)
    stripes = (np.arange(48) // 12 % 2).astype(np.uint8)[:, None].repeat(40, 1)
    for index, name in enumerate("abc"):
        noise = np.random.default_rng(index).integers(0, 60, (48, 40))
        Image.fromarray((noise + 150 * stripes).astype(np.uint8)).save(inside / f"{name}.png")
    if labelled:
        (root / "labels").mkdir()
        for name in labelled:
            Image.fromarray(stripes).save(root / "labels" / f"{name}.png")


def train_on_stripes(folder):
    write_images(folder / "data" / "train")
    write_images(folder / "data" / "validation", "abc")
    options = {"size": [32, 32], "batch_size": 6, "crops": 16, "epochs": 2, "lr": 3e-3, "block": 8.0, "share": 0.5}
    trainer.train(short(folder / "run", "masked", data=str(folder / "data"), spacing=[0.5, 0.5], **options))


@pytest.fixture(scope="session")
def stripes(once):
    """Trained on stripes, whose hidden blocks can be told."""
    return once("stripes", train_on_stripes) / "run"


def test_masked_images_are_learned(stripes):
    events = read_events(stripes)
    values = losses(stripes)
    assert np.mean(values[-4:]) < np.mean(values[:4]) - 0.2
    first, last = (scalar.value for scalar in events.Scalars("validation/explained"))
    assert first < last < 1
    assert last > 0.2
    assert events.Scalars("validation/knn")[-1].value > 0.8
    picture, _ = events.Images("validation/prediction")
    assert (picture.height, picture.width) == (32, 3 * 32)


def test_the_backbone_starts_other_trainings(stripes, tmp_path):
    folder = stripes / "model"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5)
    assert model.in_chans == 1
    assert model.spacing_range == ((0.5, 0.5), (0.5, 0.5))
    options = {"lr": 1e-9, "ema_decay": 0.0, "size": [48, 48]}
    config = short(tmp_path, "segmentation", model=f"local-dir:{folder}", **options)
    assert axes_of(config) == 2
    with pytest.warns(UserWarning, match="spacing"):  # discs have pixels of 1
        trainer.train(config)
    weights = Segmenter.load(tmp_path / "model").backbone.state_dict()
    for name, value in model.state_dict().items():
        if "head" not in name:
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    task, again = task_class(config).load(config, tmp_path / "model")
    assert again.backbone.in_chans == task.facts.channels == 1


def interrupted(config, step, monkeypatch):
    """Trains, stops after a step, and goes on."""
    finished = trainer.Trainer._finish

    def finish_some(self, progress, bar, at, loss):
        finished(self, progress, bar, at, loss)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    monkeypatch.setattr(trainer.Trainer, "_finish", finished)
    return trainer.train(config)


def check_the_same(config, whole):
    assert losses(config.output) == pytest.approx(losses(whole), abs=1e-6)
    first, again = (timm.create_model(f"local-dir:{o / 'model'}", pretrained=True) for o in (whole, config.output))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["masked", slow("distillation")])
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path, monkeypatch, task):
    options = {"size": [64, 64], "epochs": 2, **TAUGHT}
    whole = short(tmp_path / "whole", task, **options)
    config = short(tmp_path / "parts", task, checkpoint_every=3, **options)
    reached = trainer.train(whole)
    assert interrupted(config, 4, monkeypatch) == pytest.approx(reached, abs=1e-6)
    check_the_same(config, whole.output)
    assert len(read_events(whole.output).Images("validation/prediction")) == 2
    if task == "distillation":
        values = losses(whole.output)
        assert np.mean(values[-2:]) < np.mean(values[:2]) - 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"model": "test_rat_3d", "size": [16, 32, 32], "levels": [1, 2], "hide_level": 0.5, "factors": (0.8, 1.25)},
        {
            "model": "rat_vit_small_patch16_dinov3",
            "pretrained": False,
            "size": [48, 48],
            "model_args": VIT,
            "flip": True,
        },
        {"model": "test_rat_3d", "size": [8, 32, 32], "task": "distillation", "planes": [0, 2], "slices": 2},
    ],
    ids=["pyramids of volumes", "plain", "slices"],
)
def test_others(tmp_path, options):
    if options.get("task") == "distillation":
        teacher = timm.create_model("test_rat", in_chans=1, num_classes=0, spacing=(1.0, 1.0))
        options["teacher"] = str(hub.save(teacher, tmp_path / "teacher"))
        options["teacher_spacing"] = [1.0, 1.0]
    config = short(tmp_path / "run", **{"task": "masked", **options})
    trainer.train(config)
    assert len(losses(config.output)) == 2
    assert len(read_events(config.output).Images("validation/prediction")) == 1
    model = timm.create_model(f"local-dir:{config.output / 'model'}", pretrained=True)
    assert model.spacing_range is not None
    assert axes_of(Config("x", model=f"local-dir:{config.output / 'model'}")) == len(options["size"])


def test_folders_without_labels_or_with_some(tmp_path, monkeypatch, capfd):
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "validation", "ac")
    options = {"data": str(tmp_path / "data"), "spacing": [0.5, 0.5], "size": [32, 32], "batch_size": 3}
    train, validation = (
        open_frames(short("x", "masked", **options), part, folder=Images) for part in ("train", "validation")
    )
    assert train.names == ["a", "b", "c"]
    assert [train[index].target for index in range(3)] == [None] * 3
    assert [validation[index].target is None for index in range(3)] == [False, True, False]
    assert validation[0].target.unique().tolist() == [0, 1]
    config = ("--data", tmp_path / "data", "--spacing", "[0.5, 0.5]", "--size", "[32, 32]", "--batch_size", 3)
    arguments = ("--output", tmp_path / "run", *config, "--epochs", 1, "--crops", 2, "--workers", 0, "--device", "cpu")
    printed = call("pretrain.py", *arguments, "--block", 4, patch=monkeypatch, capture=capfd)
    assert "explained" in printed
    began = json.loads((tmp_path / "run" / "config.yaml").read_text())
    assert (began["task"], began["pretrained"]) == ("masked", False)
    assert read_events(tmp_path / "run").Scalars("validation/knn")[-1].value > 0.3
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model.reference_spacing == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"block must be smaller than the field of view \[16\.0, 16\.0\], got \[20"):
        trainer.train(short(tmp_path / "large", "masked", block=20.0, **options))
    (tmp_path / "data" / "validation" / "labels" / "d.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"validation: must hold images, and labels of the same names alone, got \['d'\]"
    ):
        open_frames(short("x", "masked", **options), "validation", folder=Images)
    with pytest.raises(ValueError, match="trained must be a model of labelled images, got one of masked"):
        _ = Evaluation(tmp_path / "run", None, "test", ()).config


@pytest.mark.parametrize("axes", [2, 3])
def test_classes_of_places_are_those_of_the_pixels_there(tmp_path, axes):
    task = Masked(Config(tmp_path, "masked", model="test_rat" if axes == 2 else "test_rat_3d"))
    task.create_model()
    size, spacing = (12, 16, 20)[-axes:], (1.0, 0.5, 0.5)[-axes:]
    level = task.training[0]._replace(
        image=torch.zeros(1, *size), spacing=torch.tensor(spacing), target=(places(size, spacing)[-1] > 3).int()
    )
    origin = torch.tensor([5.0] * axes)
    crop = [Level(level, origin)]
    scenes = collate_scenes([[crop[0]._replace(sample=level._replace(target=task.targets(crop, True)[0]))]])
    grid = Grid.create(
        [6, 8, 10][-axes:], [2 * step for step in spacing], (origin + torch.tensor(spacing) / 2).tolist()
    )
    features = Tokens(torch.zeros(1, *grid.shape, 1), grid)
    classes = task._classes(features, scenes)[0]
    across = grid.coordinates()[0, ..., -1]  # from the corner at 5 - half a pixel
    expected = (across - 5 + spacing[-1] / 2 > 3).long()
    inside = across < 5 + (size[-1] - 0.5) * spacing[-1]
    assert torch.equal(classes[inside], expected[inside])
    assert classes.max() == 1


def test_figures():
    chance = np.random.default_rng(0)
    classes, frames = np.repeat([0, 1, 0, 1], 20), np.repeat([0, 0, 1, 1], 20)
    features = chance.normal(size=(80, 4)) + 8 * np.eye(4)[classes]
    assert neighbours_accuracy(features, classes, frames) == 1.0
    assert neighbours_accuracy(features, np.where(frames == 0, classes, 1 - classes), frames) == 0.0
    taught = torch.randn(50, 3, dtype=torch.float64) + 2
    said = taught + 0.5 * torch.randn(50, 3, dtype=torch.float64)
    sums = [
        Evidence(float((a - b).square().sum()), len(a), a.sum(0), float(a.square().sum()))
        for a, b in ((taught[:20], said[:20]), (taught[20:], said[20:]))
    ]
    expected = 1 - float((taught - said).square().sum() / (taught - taught.mean(0)).square().sum())
    assert explained(add_up(sums)) == pytest.approx(expected)
