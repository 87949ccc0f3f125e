"""Every example runs."""

import argparse
import ast
import functools
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard

from helpers import EXAMPLES, call, slow


@pytest.fixture
def run(monkeypatch, capfd):
    return functools.partial(call, patch=monkeypatch, capture=capfd)


def check_picture(file):
    picture = pytest.importorskip("matplotlib.image").imread(file)
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 0.1


def test_quickstart(run, tmp_path):
    assert "70.4 x 64 x 64 mm" in run("quickstart.py", tmp_path / "picture.png")
    check_picture(tmp_path / "picture.png")


@pytest.mark.parametrize(
    ("name", "expected"), [("pyramid.py", "130.5 x 250.5"), slow("pretrained_features.py", "8.8 x 8 x 8")]
)
def test_table_and_picture(name, expected, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert expected in run(name, tmp_path / "picture.png")
    check_picture(tmp_path / "picture.png")


def test_layouts_are_drawn(run, tmp_path):
    run("layouts.py", "--output", tmp_path / "layouts.png")
    check_picture(tmp_path / "layouts.png")


def test_explanations_are_drawn(run, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("pytorch_grad_cam")
    assert "48 groups; 100.0% of 16 digits" in run("explain.py", "--output", tmp_path, "--digits", 16)
    image = pytest.importorskip("matplotlib.image")
    files = ("class.png", "groups.png", "levels.png", "spacing.png")
    assert all(image.imread(tmp_path / file).std() > 0.1 for file in files)


@pytest.mark.slow
def test_the_study_of_pretraining_runs(run, tmp_path):
    pytest.importorskip("jsonargparse")
    run("run_pretraining.py", "--quick", "--output", tmp_path)
    starts = [line.split(",")[1] for line in (tmp_path / "cells.csv").read_text().splitlines()[1:]]
    assert starts == ["masked", "scratch", "distilled"]


def test_slices_teach_a_network_of_volumes(run, tmp_path):
    pytest.importorskip("sklearn")
    run("distill_slices.py", "--quick", "--seeds", 1, "--output", tmp_path)
    (file,) = tmp_path.glob("*.csv")
    assert len(file.read_text().splitlines()) > 1


def test_few_images_are_compared(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    networks = ["rat_tiny, 32 wide", "resnet10t"]
    run("few_images.py", "--quick", "--seeds", 1, "--networks", *networks, "--output", tmp_path)
    results = pandas.read_csv(tmp_path / "few.csv")
    assert list(results.network) == networks
    assert results.right.between(0.3, 1.0).all()


def test_the_test_weights_are_trained(run, tmp_path):
    pytest.importorskip("sklearn")
    run("pretrain_test_weights.py", "--quick", "--models", "test_rat", "--folder", tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["test_rat.digits.md", "test_rat.digits.safetensors"]
    overlay = {"file": str(tmp_path / "test_rat.digits.safetensors")}
    timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize("name", ["test_rat", slow("test_rat_3d")])
def test_shipped_weights_are_as_good_as_their_card_says(name):
    example = importlib.import_module("pretrain_test_weights")
    file = Path(timm.create_model(name).pretrained_cfg["file"])
    assert file.stat().st_size < 2e6
    stated = ModelCard.load(file.with_suffix(".md")).data.eval_results
    results = {tuple(map(int, result.dataset_config.split(" x "))): result.metric_value for result in stated}
    assert list(results) == example.TASKS[name].test
    model, (_, held_out) = timm.create_model(name, pretrained=True), example.digits()
    sizes = list(results)[:4]  # one that is in training's range, and others
    for size in sizes:
        assert example.accuracy(model, held_out, size) == pytest.approx(results[size], abs=0.005)
    if name == "test_rat":
        assert results[32, 32] >= 0.97


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch")
    monkeypatch.chdir(tmp_path)
    sizes = {"axes": "CYX", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}
    pytest.importorskip("tifffile").imwrite("cells.ome.tif", np.zeros((3, 64, 96), np.uint8), metadata=sizes)
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    exec("\n".join(blocks), names)
    assert names["logits"].shape == (1, 10)
    assert names["cells"].shape == (2, 96, 128)
    assert names["scan"].spacing == (0.5, 0.25)


@pytest.mark.slow
def test_the_benchmark_of_models(run, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    sizes = ["--size", "64+32", "--batch", "1", "--runs", "2"]
    record, picture = tmp_path / "record.json", tmp_path / "picture.png"
    command = [
        "--models",
        "test_rat",
        "--peers",
        "test_rat+conv",
        *sizes,
        "--memory",
        "--json",
        record,
        "--plot",
        picture,
    ]
    assert "speed over" in run("benchmark.py", *command)  # test_benchmark.py starts it as a program
    results = json.loads(record.read_text())["results"]
    assert [(r["model"], r["size"]) for r in results] == [("test_rat", "64+32"), ("test_rat+conv", "64+32")]
    assert all(r["seconds"] > 0 and r["macs"] > 1e6 and r["peak_bytes"] > r["step_bytes"] >= 0 for r in results)
    assert results[0]["macs"] > results[1]["macs"]
    assert results[1]["speed_over"] == {"test_rat+conv": 1.0}
    assert image.imread(picture).std() > 0.05
    assert "train" in run(
        "benchmark.py", "--models", "test_rat_3d", "--size", "16", "24", "--mode", "train", "--runs", "1"
    )


def test_the_benchmark_of_operations(run):
    printed = run("benchmark.py", "--operations", "--batch", "1", "--runs", "1")
    assert len(re.findall("local grouping.*1x56x56x2x32", printed)) == 1


@pytest.mark.slow
def test_adaptive_patches_learn_where_digits_are(run, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("pandas")
    file = tmp_path / "picture.png"
    short = ["--tokens", 9, "--seeds", 1, "--steps", 100, "--canvases", 1500, "--jobs", 1]
    printed = run("adaptive_patches.py", *short, "--picture", file)
    (adaptive,) = re.findall(r"adaptive +[\d.]+ +([\d.]+) ", printed)
    assert float(adaptive) > 16  # one in ten is chance
    assert pytest.importorskip("matplotlib.image").imread(file).shape[:2] == (352, 1280)


PROGRAMS = {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_compile_times(run):
    printed = run("compile_times.py", "test_vit", "--batch-size", 1, "--backend", "eager")
    assert re.search(r"test_vit +compiled in +[\d.]+ s \(processor +[\d.]+ s\), differs by 0.0e\+00 of ", printed)


def test_every_example_is_run_here():
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {name for name in PROGRAMS if f'"{name}.py"' not in tested} == set()


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_what_programs_share_is_in_packages(file):
    """No example imports a program, and `training` no study."""
    imported = {name.partition(".")[0] for name in imports(file)}
    assert not imported & PROGRAMS
    assert file.parent.name != "training" or "resolution_study" not in imported


def imports(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            yield node.module


def test_a_large_image_is_predicted(tmp_path, monkeypatch, capfd):
    predict_large = pytest.importorskip("predict_large")
    frames = np.random.default_rng(0).normal(size=(1, 60, 70)).astype(np.float32)
    monkeypatch.setattr(predict_large, "fetch", lambda: None)
    monkeypatch.setattr(predict_large, "frames", lambda *_: argparse.Namespace(images=frames))
    monkeypatch.setattr(predict_large, "measured", predict_large.measured_here)  # no processes that import again
    monkeypatch.setattr(predict_large, "LASTING", 0)
    said = call("predict_large.py", "--output", tmp_path, "--quick", "--threads", 1, patch=monkeypatch, capture=capfd)
    assert [line.split()[0] for line in said.splitlines()] == ["model", "prediction", "model", "monai"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["pixels"] for row in results if row["what"] != "model"] == [160 * 200] * 2
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in results)
