"""`examples/resolution_study`: its images are what they are said to be, its networks have one budget, it runs."""

import dataclasses
import itertools
import re
import shutil
import statistics

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pd = pytest.importorskip("pandas")
pytest.importorskip("joblib")

import run_resolution_study

from helpers import EXAMPLES, call
from resolution_study import experiments, networks, photographs, report, scenes, tasks

STUDY = EXAMPLES / "resolution_study"


def averaged(image, factor):
    shape = [n for size in image.shape for n in (size // factor, factor)]
    return image.reshape(shape).mean(axis=tuple(range(1, len(shape), 2)))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_scene_is_the_same_at_any_pixel_size_and_in_any_field(monkeypatch, axes):
    monkeypatch.setattr(scenes, "NOISE", 0.0)
    scene, size = scenes.Scene(1, 5), (48, 48) if axes == 2 else (16, 24, 24)
    coarse = scenes.render(scene, size, (2.0,) * axes)
    fine = scenes.render(scene, [2 * n for n in size], (1.0,) * axes)
    assert np.corrcoef(coarse.ravel(), averaged(fine, 2).ravel())[0, 1] > 0.99
    middle = tuple(slice(n // 4, n // 4 + n // 2) for n in size)
    part = scenes.render(scene, [n // 2 for n in size], (2.0,) * axes)
    inside = (slice(2, -2),) * axes  # blur reaches over the border
    assert np.allclose(part[inside], coarse[middle][inside], atol=1e-4)


def test_a_class_at_another_pixel_size_looks_like_another_class(monkeypatch):
    """Cells of class 0 at 2/3 of the spacing are as many pixels wide as those of class 1."""
    monkeypatch.setattr(scenes, "NOISE", 0.0)

    def coarseness(label, spacing):
        images = [scenes.render(scenes.Scene(label, seed), (96, 96), (spacing,) * 2) for seed in range(8)]
        return np.mean([np.abs(np.diff(image, axis=0)).mean() / image.std() for image in images])

    assert coarseness(0, 2 / 3) == pytest.approx(coarseness(1, 1.0), rel=0.15)
    assert coarseness(0, 1.0) > 1.25 * coarseness(1, 1.0)


def test_images_to_train_on_are_no_test_images(tmp_path):
    for name in ("cells", "photographs"):
        (training,) = tasks.training_images(name, "one", 8, tmp_path)
        test = tasks.test_images(name, 1.0, "size", 8, tmp_path)
        for one, other in itertools.product(training.pixels, test.pixels):
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] < 0.9
        again = tasks.test_images(name, 1.0, "size", 8, tmp_path / "anew")
        assert torch.equal(test.pixels, again.pixels)
    whole = photographs._photograph("brick").shape[1]
    parts = [photographs._part("brick", train, 0.0).shape[1] for train in (True, False)]
    assert sum(parts) == whole


@pytest.mark.parametrize(("regime", "counts"), [("one", [27]), ("two", [13, 13]), ("mixed", [3] * 9)])
def test_regimes(tmp_path, regime, counts):
    """All factors have as many images, of one field of view; none is drawn twice."""
    groups = tasks.training_images("photographs", regime, 27, tmp_path)
    assert [group.ratio for group in groups] == [(factor, factor) for factor in tasks.REGIMES[regime]]
    assert [len(group.target) for group in groups] == counts
    for group in groups:
        assert group.pixels.shape[2:] == (round(48 / group.ratio[0]),) * 2
    if regime == "two":
        one, other = (np.asarray(group.pixels[1, 0]) for group in groups)
        assert abs(one.std() - other.std()) > 1e-4


def test_photographs_are_centred(tmp_path):
    """Networks see textures and not one offset that all have in common, with which they did not learn."""
    (training,) = tasks.training_images("photographs", "one", 80, tmp_path)
    image = training.pixels.flatten(1)
    assert image.mean(1).abs().max() < 0.01
    assert 0.5 < image.std(1).mean() < 1.1


@pytest.mark.parametrize(
    ("setting", "size", "ratio"),
    [
        ("field", (8, 16, 16), (2.0, 2.0, 2.0)),
        ("size", (16, 32, 32), (2.0, 2.0, 2.0)),
        ("slices", (8, 32, 32), (2.0, 1.0, 1.0)),
    ],
)
def test_settings(setting, size, ratio):
    task = tasks.TASKS["cells in volumes"]
    assert (task.size_at(2.0, setting), task.ratio(2.0, setting)) == (size, ratio)


def test_images_of_older_code_are_drawn_anew(monkeypatch, tmp_path):
    drawn = []
    task = dataclasses.replace(tasks.TASKS["cells"], draw=lambda *given: drawn.append(given) or np.zeros(given[2]))
    monkeypatch.setitem(tasks.TASKS, "cells", task)
    for version, count in (("old", 2), ("old", 2), ("new", 4)):
        monkeypatch.setattr(tasks, "_version", lambda version=version: version)
        tasks.test_images("cells", 1.0, "size", 2, tmp_path)
        assert len(drawn) == count


def test_networks_have_one_budget():
    parameters, macs = {}, {}
    for name, network in networks.NETWORKS.items():
        if network.levels > 1:
            continue  # which costs a third more, as its report says
        model = network.create((1.0, 1.0), 3).eval()
        parameters[name] = sum(p.numel() for p in model.parameters())
        # fused attention is not counted by every PyTorch
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 1, 48, 48), (1.0, 1.0))
        macs[name] = counter.get_total_flops() / 2
    for numbers in (parameters, macs):
        assert all(0.85 < number / numbers[networks.TOLD] < 1.15 for number in numbers.values()), numbers


def test_the_spacing_reaches_those_that_are_given_it():
    for name, network in networks.NETWORKS.items():
        torch.manual_seed(0)
        model, x = network.create((1.0, 1.0), 3).eval(), torch.randn(2, 1, 24, 36)
        ones, twos = (model(x, (factor, factor)) for factor in (1.0, 2.0))
        assert torch.equal(ones, twos) == (network.spacing == "hidden"), name


def test_the_plan_names_networks_and_every_one_is_planned():
    planned = {each.network for each in run_resolution_study.plan(list(tasks.TASKS))}
    assert planned == set(networks.NETWORKS)


def test_the_physical_stem_is_resizing_beforehand():
    torch.manual_seed(0)
    told = networks.NETWORKS[networks.FORMER].create((1.0, 1.0), 3).eval()
    hidden = networks.NETWORKS[networks.HIDDEN].create((1.0, 1.0), 3).eval()
    hidden.load_state_dict(told.state_dict())
    x = torch.randn(2, 1, 24, 36)
    for factor in (0.5, 1.0, 2.8):
        resized = networks.at_spacing(x, (factor, factor), (1.0, 1.0))
        assert torch.equal(told(x, (factor, factor)), hidden(resized, (1.0, 1.0)))


def test_coarsened_images_are_as_coarse_as_is_said():
    torch.manual_seed(0)
    ramp = torch.arange(48.0).expand(1, 1, 48, 48)
    factors = set()
    for _ in range(20):
        x, (z, factor) = networks.coarsen(ramp, (0.5, 1.0))
        assert z == pytest.approx(factor / 2)
        assert x.shape[3] == pytest.approx(48 / factor, abs=1)
        assert x.diff(dim=3)[..., 2:-2].mean().item() == pytest.approx(factor, rel=1e-2)
        factors.add(factor)
    assert min(factors) < 1.5
    assert 3.0 < max(factors) <= 4.0


def test_all_images_are_trained_on_in_parts_of_all_sizes():
    groups = [tasks.Images(torch.zeros(count, 1, 8, 8), (1.0, 1.0), torch.arange(count)) for count in (8, 13)]
    steps = experiments.draw_steps(groups, 4)
    assert sorted(len(group.target) for group, _ in steps) == [8, 8, 13, 13, 13]
    assert sorted(torch.cat([chosen for group, chosen in steps if group is groups[0]]).tolist()) == list(range(8))
    places = torch.arange(48).expand(1, 1, 48, 48)
    parts = [experiments.augment(places, 0.25) for _ in range(200)]
    assert {part.shape[3] for part in parts} >= set(range(14, 46))
    assert min(int(part.min()) for part in parts) == 0
    assert max(int(part.max()) for part in parts) == 47
    assert {bool(part[0, 0, 0, 0] > part[0, 0, 0, 1]) for part in parts} == {True, False}


@pytest.mark.parametrize("axes", [2, 3])
def test_controls_change_what_they_say(axes):
    images = tasks.Images(torch.randn(2, 1, *(16,) * axes), (2.0,) * axes, torch.tensor([0, 1]))
    assert experiments.crop(images, 0.5).pixels.shape[2:] == (8,) * axes
    assert torch.equal(experiments.crop(images, 0.5).pixels.flatten(2)[..., 0], images.pixels[(..., *[4] * axes)])
    assert networks.at_spacing(images.pixels, (2.0,) * axes, (1.0,) * axes).shape[2:] == (32,) * axes
    seen = []

    def classifier(x, ratio):
        seen.append((tuple(x.shape[2:]), ratio))
        return torch.eye(2)[[0, 0]]

    for control in ("", "resized", "wrong spacing", "spacing hidden"):
        assert experiments.are_right(classifier, images, control).tolist() == [True, False]
    sizes, ratios = zip(*seen, strict=True)
    assert sizes == tuple((size,) * axes for size in (16, 32, 16, 16))
    assert ratios == tuple((ratio,) * axes for ratio in (2.0, 1.0, 3.2, 1.0))


@pytest.fixture
def results():
    """Two seeds, of which the second is right in two more of 100 images, at three pixel sizes."""
    right = {
        ("rat, physical stem", ""): (80, 90, 70),
        ("rat, physical stem", "cropped"): (85, None, None),
        ("rat, physical stem", "spacing hidden"): (45, 90, 40),
        ("rat", ""): (40, 90, 40),
        ("rat, physical stem, former grouping", ""): (65, 90, 65),
        ("rat, pyramid", ""): (50, 91, 50),
        ("rat, pyramid", "resized"): (97, 97, 97),
        ("plain rat", "resized"): (97, 97, 97),
        ("swin", ""): (30, 95, 30),
        ("swin", "resized"): (70, 95, 72),
        ("convnext", "cropped"): (97, 97, 97),
        ("convnext, resized, coarsened", ""): (98, 98, 98),
    }
    experiment = {"task": "cells", "setting": "field", "regime": "one", "count": 100, "seconds": 1}
    rows = [
        {
            **experiment,
            "network": network,
            "control": control,
            "factor": factor,
            "seed": seed,
            "right": number + 2 * seed,
        }
        for (network, control), numbers in right.items()
        for factor, number in zip((0.5, 1.0, 2.0), numbers, strict=True)
        for seed in range(2)
        if number is not None
    ]
    for row in rows:
        row["answers"] = np.packbits(np.arange(100) < row["right"]).tobytes().hex()
    return pd.DataFrame(rows)


def half(one, other):
    """Of the 95% interval, where the first so many of 100 images are right, and two more for the second seed."""
    both = [[(image < one + more) - (image < other + more) for more in (0, 2)] for image in range(100)]
    return 1.96 * statistics.stdev(100 * statistics.mean(seeds) for seeds in both) / 10


def test_networks_are_compared_with_controls_and_with_themselves(results):
    found = report.differences(results, "rat, physical stem")
    expected = {
        "loss": ((90, 80), (90, 90), (90, 70)),
        "loss to the same field of view": ((85, 80),),
        "gain over itself, spacing hidden": ((80, 45), (90, 90), (70, 40)),
        "gain over the best control": ((80, 70), (90, 95), (70, 72)),
    }
    assert list(found) == list(expected)
    for name, pairs in expected.items():
        for by, (one, other) in zip(found[name].values(), pairs, strict=True):
            assert by == pytest.approx((one - other, 0.0, half(one, other)), abs=1e-9)
    assert set(report.best_controls(results, "rat, physical stem").values()) == {("swin", "resized"), ("swin", "")}
    coarsened = results.assign(
        network=results["network"].replace("rat, physical stem", "rat, physical stem, coarsened")
    )
    best = report.best_controls(coarsened, "rat, physical stem, coarsened")
    assert set(best.values()) == {("convnext, resized, coarsened", "")}
    assert "gain over itself, spacing hidden" not in report.differences(coarsened, "rat, physical stem, coarsened")
    trained_without = results[(results["network"] == "swin") & (results["control"] == "")]
    both = pd.concat([results, trained_without.assign(network="rat, spacing hidden")])
    hidden = report.differences(both, "rat, physical stem")["gain over itself, spacing hidden"]
    assert hidden[0.5].mean == pytest.approx(50)


def test_seeds_are_compared_with_the_same_seeds(results):
    ours = results[(results["network"] != "swin") | (results["seed"] == 1)]
    gain = report.differences(ours, "rat, physical stem")["gain over the best control"][0.5]
    assert gain.mean == pytest.approx(10)
    assert np.isnan(gain.deviation)
    assert str(gain) == "10.0 (4 to 16)"


def test_what_the_study_asked_for(results):
    goal, former = report.goals(results).to_dict("records")
    assert (goal["network"], former["network"]) == (networks.TOLD, networks.FORMER)
    assert goal["loss 2x finer"].startswith("10.0 ± 0.0")
    assert goal["loss 2x coarser"].startswith("20.0 ± 0.0")
    assert goal["loss 4x coarser"] == ""
    assert goal["least gain over itself, spacing hidden"].startswith("30.0 ± 0.0")
    assert goal["least gain over the best control"].startswith("-2.0 ± 0.0")


def test_changes_are_those_to_the_network_that_is_changed(results):
    found = report.changes(results)[0.5]
    assert {name: float(by.split()[0]) for name, by in found.items()} == {
        "rat, physical stem - rat, physical stem, former grouping": 15,
        "rat, physical stem, former grouping - rat": 25,
        "rat, pyramid - rat": 10,
        "rat, physical stem / spacing hidden - rat, physical stem": -35,
    }


def test_intervals_are_those_of_the_images(results):
    """Wilson's interval of 81 of 100, however many seeds saw the same images."""
    assert report.table(results).loc["rat, physical stem", 0.5] == "81.0 ± 1.4 (72 to 87)"


def test_quick_results_are_not_taken_for_the_studys(monkeypatch, capfd):
    with pytest.raises(SystemExit, match="2"):
        call("run_resolution_study.py", "--quick", patch=monkeypatch, capture=capfd)
    assert "--quick needs --output" in capfd.readouterr().err


@pytest.mark.slow
def test_the_study_runs_learns_and_goes_on(tmp_path, monkeypatch, capfd):
    arguments = ["--quick", "--jobs", 2, "--output", tmp_path, "--cache", tmp_path / "cache"]
    call("run_resolution_study.py", *arguments, patch=monkeypatch, capture=capfd)
    results = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    assert set(results["network"]) == {"plain rat"}
    seen = results[(results["factor"] == 1.0) & (results["control"] == "")]
    assert (seen["right"] / seen["count"]).min() > 0.6  # chance is a third
    assert "plain rat" in (tmp_path / "tables" / "right.csv").read_text()
    assert "1 trainings" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "cells.png").stat().st_size > 10_000
    before = (tmp_path / "results.csv").read_text()
    call("run_resolution_study.py", *arguments, patch=monkeypatch, capture=capfd)
    assert (tmp_path / "results.csv").read_text() == before


@pytest.mark.slow
def test_report_and_tables_are_those_of_the_results(tmp_path):
    shutil.copy(STUDY / "README.md", tmp_path)
    report.write_tables(report.read(STUDY / "results.csv"), tmp_path)
    for name in ("README.md", *(f"tables/{table}.csv" for table in ("goals", "right", "gains", "changes"))):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text(), name
    text = (STUDY / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in STUDY.glob("*.png"))
    assert len(pictures) == 3
