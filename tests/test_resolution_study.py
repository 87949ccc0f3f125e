"""`examples/resolution_study`: its images are what they are said to be, its networks have one budget, it runs."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pd = pytest.importorskip("pandas")
pytest.importorskip("joblib")

STUDY = Path(__file__).parents[1] / "examples" / "resolution_study"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    return importlib.import_module


def averaged(image, factor):
    shape = [n for size in image.shape for n in (size // factor, factor)]
    return image.reshape(shape).mean(axis=tuple(range(1, len(shape), 2)))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_scene_is_the_same_at_any_pixel_size_and_in_any_field(study, monkeypatch, axes):
    scenes = study("scenes")
    monkeypatch.setattr(scenes, "NOISE", 0.0)
    scene, size = scenes.Scene(1, 5), (48, 48) if axes == 2 else (16, 24, 24)
    coarse = scenes.render(scene, size, (2.0,) * axes)
    fine = scenes.render(scene, [2 * n for n in size], (1.0,) * axes)
    assert np.corrcoef(coarse.ravel(), averaged(fine, 2).ravel())[0, 1] > 0.99
    middle = tuple(slice(n // 4, n // 4 + n // 2) for n in size)
    part = scenes.render(scene, [n // 2 for n in size], (2.0,) * axes)
    inside = (slice(2, -2),) * axes  # blur reaches over the border
    assert np.allclose(part[inside], coarse[middle][inside], atol=1e-4)


def test_a_class_at_another_pixel_size_looks_like_another_class(study, monkeypatch):
    """Cells of class 0 at 2/3 of the spacing are as many pixels wide as those of class 1."""
    scenes = study("scenes")
    monkeypatch.setattr(scenes, "NOISE", 0.0)

    def coarseness(label, spacing):
        images = [scenes.render(scenes.Scene(label, seed), (96, 96), (spacing,) * 2) for seed in range(8)]
        return np.mean([np.abs(np.diff(image, axis=0)).mean() / image.std() for image in images])

    assert coarseness(0, 2 / 3) == pytest.approx(coarseness(1, 1.0), rel=0.15)
    assert coarseness(0, 1.0) > 1.25 * coarseness(1, 1.0)


def test_images_to_train_on_are_no_test_images(study, tmp_path):
    tasks = study("tasks")
    for name in ("cells", "photographs"):
        training = tasks.training_images(name, "one", 8, tmp_path)
        test = tasks.test_images(name, 1.0, "size", 8, tmp_path)
        for one, other in itertools.product(training.pixels, test.pixels):
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] < 0.9
        again = tasks.test_images(name, 1.0, "size", 8, tmp_path / "anew")
        assert torch.equal(test.pixels, again.pixels)
    photographs = study("photographs")
    whole = photographs._photograph("brick").shape[1]
    parts = [photographs._part("brick", train, 0.0).shape[1] for train in (True, False)]
    assert sum(parts) == whole


@pytest.mark.parametrize(("regime", "allowed"), [("one", {1.0}), ("two", {0.7, 1.4}), ("mixed", None)])
def test_regimes(study, tmp_path, regime, allowed):
    factors = study("tasks").training_images("photographs", regime, 64, tmp_path).factor
    if allowed is None:
        assert 0.5 <= factors.min() < 0.7
        assert 1.5 < factors.max() <= 2.0
    else:
        assert {round(float(factor), 6) for factor in factors} == allowed


def test_networks_have_one_budget(study):
    parameters, macs = {}, {}
    for name, network in study("networks").NETWORKS.items():
        if network.levels > 1:
            continue  # which costs a third more, as its report says
        model = network.create(2, 3).eval()
        parameters[name] = sum(p.numel() for p in model.parameters())
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 1, 48, 48), 1.0)
        macs[name] = counter.get_total_flops() / 2
    for numbers in (parameters, macs):
        assert all(0.85 < number / numbers["rat"] < 1.15 for number in numbers.values()), numbers


def test_the_spacing_reaches_those_that_are_given_it(study):
    for name, network in study("networks").NETWORKS.items():
        torch.manual_seed(0)
        model, x = network.create(2, 3).eval(), torch.randn(2, 1, 24, 36)
        ones, twos = (model(x, factor) for factor in (1.0, 2.0))
        assert torch.equal(ones, twos) == (network.spacing == "hidden"), name


def test_the_plan_names_networks_and_every_one_is_planned(study):
    planned = {each.network for each in study("study").plan(list(study("tasks").TASKS))}
    assert planned == set(study("networks").NETWORKS)


@pytest.mark.parametrize("axes", [2, 3])
def test_controls_change_what_they_say(study, axes):
    tasks, networks, experiments = study("tasks"), study("networks"), study("experiments")
    images = tasks.Images(torch.randn(2, 1, *(16,) * axes), torch.full((2,), 2.0), torch.tensor([0, 1]))
    assert experiments.crop(images, 0.5).pixels.shape[2:] == (8,) * axes
    assert torch.equal(experiments.crop(images, 0.5).pixels.flatten(2)[..., 0], images.pixels[(..., *[4] * axes)])
    assert networks.at_spacing(images.pixels, 2.0, 1.0).shape[2:] == (32,) * axes
    seen = []

    def classifier(x, factor):
        seen.append((tuple(x.shape[2:]), factor))
        return torch.eye(2)

    for control in ("", "resized", "wrong spacing", "spacing hidden"):
        assert experiments.count_right(classifier, images, control) == 2
    assert seen == [((16,) * axes, 2.0), ((32,) * axes, 1.0), ((16,) * axes, 3.2), ((16,) * axes, 1.0)]


@pytest.fixture
def results():
    """Two seeds, of which the second is right in two more of 100 images, at two pixel sizes."""
    right = {
        ("rat, physical stem", ""): (80, 90),
        ("rat, physical stem", "cropped"): (85, None),
        ("rat, physical stem", "spacing hidden"): (45, 90),
        ("rat, pyramid", ""): (50, 91),
        ("rat, pyramid", "resized"): (99, 99),
        ("plain rat", "resized"): (99, 99),
        ("swin", ""): (30, 95),
        ("swin", "resized"): (70, 95),
        ("convnext", "cropped"): (99, 99),
    }
    experiment = {"task": "cells", "fixed": "size", "regime": "one", "count": 100, "seconds": 1}
    return pd.DataFrame(
        [
            {
                **experiment,
                "network": network,
                "control": control,
                "factor": factor,
                "seed": seed,
                "right": share,
                "share": share,
            }
            for (network, control), shares in right.items()
            for factor, number in zip((0.5, 1.0), shares, strict=True)
            for seed, share in enumerate((number, number and number + 2))
            if share is not None
        ]
    )


def test_networks_are_compared_with_controls_and_with_themselves(study, results):
    found = study("report").compare(results, "rat, physical stem")
    assert found[0.5].to_dict() == {
        "right": "81.0 ± 1.4",
        "loss": "10.0 ± 0.0",
        "loss to the same field of view": "5.0 ± 0.0",
        "gain over itself, spacing hidden": "35.0 ± 0.0",
        "gain over swin / resized": "10.0 ± 0.0",
        "gain over the best of controls": "10.0 ± 0.0",
        "the best of controls": "swin / resized",
    }
    assert found.loc["gain over the best of controls", 1.0] == "-5.0 ± 0.0"
    trained_without = results.assign(network="rat, spacing hidden", share=20.0, control="").drop_duplicates(
        ["factor", "seed"]
    )
    both = pd.concat([results, trained_without])
    assert (
        study("report").compare(both, "rat, physical stem").loc["gain over itself, spacing hidden", 0.5] == "61.0 ± 1.4"
    )


def test_what_the_study_asked_for(study, results):
    (goal,) = study("report").goals(results).to_dict("records")
    assert goal["network"] == "rat, physical stem"
    assert goal["loss 2x finer"] == pytest.approx(5.0)
    assert goal["least gain over itself, spacing hidden"] == pytest.approx(35.0)
    assert goal["least gain over the best of controls"] == pytest.approx(10.0)
    assert pd.isna(goal["loss 4x coarser"])


def test_changes_are_those_to_the_rat(study, results):
    found = study("report").changes(results)
    assert found[0.5].to_dict() == {"rat, physical stem / spacing hidden": "-35.0 ± 0.0", "rat, pyramid": "-30.0 ± 0.0"}


def test_intervals_are_those_of_the_images(study, results):
    """Wilson's interval of 81 of 100, however many seeds saw the same images."""
    assert study("report").table(results).loc["rat, physical stem", 0.5] == "81.0 ± 1.4 (72-87)"


def test_the_study_runs_learns_and_goes_on(tmp_path):
    command = [sys.executable, STUDY / "study.py", "--quick", "--jobs", "2", "--output", tmp_path]
    command += ["--cache", tmp_path / "cache"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    results = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    assert set(results["network"]) == {"plain rat"}
    seen = results[(results["factor"] == 1.0) & (results["control"] == "")]
    assert (seen["right"] / seen["count"]).min() > 0.6  # chance is a third
    assert "| plain rat" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "cells-size.png").stat().st_size > 10_000
    before = (tmp_path / "results.csv").read_text()
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "results.csv").read_text() == before
