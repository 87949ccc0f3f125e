"""`examples/context_study`: neither crop nor overview decides alone, its networks have one budget, it runs."""

import dataclasses
import gzip
import re
import zipfile

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")
pytest.importorskip("joblib")
pytest.importorskip("monai")
nibabel = pytest.importorskip("nibabel")

import run_context_study

from context_study import brain, conditions, experiments, networks, report, scenes, tasks, views
from helpers import EXAMPLES, call
from rat_timm import Grid
from studies.results import carry_out
from training.wheels import UnavailableError

STUDY = EXAMPLES / "context_study"
TASK = tasks.TASKS["tissue"]
TISSUE = {2: tasks.TISSUE, 3: tasks.TISSUE_3D}

try:
    networks._import_muvit()
    MUVIT = True
except ImportError:
    MUVIT = False
HERE = [name for name, network in networks.NETWORKS.items() if MUVIT or network.family != "muvit"]


def averaged(image, factor):
    shape = [n for size in image.shape for n in (size // factor, factor)]
    return image.reshape(shape).mean(axis=tuple(range(1, len(shape), 2)))


KINDS = scenes.ARRANGEMENTS


def in_one_region(monkeypatch, kind):
    """Makes all regions of one kind, and leaves all else as it is."""
    monkeypatch.setattr(scenes, "ARRANGEMENTS", (KINDS[kind],) * len(KINDS))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_scene_is_the_same_at_any_pixel_size_and_in_any_field(axes):
    tissue, size = TISSUE[axes], (48, 48) if axes == 2 else (12, 16, 16)
    fine = scenes.render(tissue, 5, [2 * n for n in size], (1.0,) * axes)
    coarse = scenes.render(tissue, 5, size, (2.0,) * axes)
    assert np.corrcoef(coarse.image.ravel(), averaged(fine.image, 2).ravel())[0, 1] > 0.99
    corner = [n / 2 for n in size]
    part = scenes.render(tissue, 5, size, (1.0,) * axes, corner)
    there = tuple(slice(n // 2, n // 2 + n) for n in size)
    inside = (slice(3, -3),) * axes  # blur reaches over the border
    assert np.allclose(part.image[inside], fine.image[there][inside], atol=1e-4)
    assert (part.labels == fine.labels[there]).all()
    assert {0} < set(fine.labels.ravel().tolist()) <= set(range(len(scenes.CLASSES)))


def test_labels_are_the_cell_and_the_region_of_a_pixel():
    tissue, axes = tasks.TISSUE, [np.arange(400) + 0.5] * 2
    field = scenes.render(tissue, 0, (400, 400), (1.0, 1.0))
    region = scenes.regions(tissue, axes, 0)
    cells = field.labels > 0
    assert ((field.labels[cells].astype(int) - 1) // len(scenes.CELLS) == region[cells]).all()
    assert len(np.unique(region)) == len(scenes.ARRANGEMENTS)
    counts = [(field.labels == label).sum() / (region == (label - 1) // 2).sum() for label in range(1, 5)]
    assert min(counts) > 0.05
    textured = (field.labels > 0) & (field.labels % 2 == 1)
    spread = [field.image[mask].std() for mask in (textured, cells & ~textured)]
    assert spread[0] > 1.5 * spread[1]


@pytest.mark.parametrize("axes", [2, 3])
def test_crops_of_both_regions_are_alike(monkeypatch, axes):
    """They have the same brightness and contrast, and hardly tell which way the arrangement varies."""
    tissue, size = TISSUE[axes], TASK.size if axes == 2 else (16, 24, 24)
    numbers, ways = [], []
    for kind in range(len(KINDS)):
        in_one_region(monkeypatch, kind)
        crops = [
            scenes.render(tissue, seed, size, (1.0,) * axes, [700.0 * (seed + 1)] * axes).image
            for seed in range(120 if axes == 2 else 60)
        ]
        numbers.append([[image.mean(), image.std()] for image in crops])
        ways.append([_varies_along_y(image) for image in crops])
    means, errors = np.mean(numbers, axis=1), np.std(numbers, axis=1) / np.sqrt(len(numbers[0]))
    apart = np.abs(means[0] - means[1]) / np.hypot(*errors)
    assert (apart < 3.5).all(), apart
    right = (np.mean(ways[0]) + 1 - np.mean(ways[1])) / 2
    assert right < 0.7, right


def _varies_along_y(image):
    """Whether means of rows vary more than means of columns."""
    rows, columns = (image.mean(axis=tuple(a for a in range(image.ndim) if a != image.ndim - k)) for k in (2, 1))
    return rows.var() > columns.var()


def test_an_overview_tells_the_region_and_not_the_cell(monkeypatch):
    """A region of it tells which way the arrangement varies; cells of both kinds are as bright in its pixels."""
    ways, wide = [], dataclasses.replace(tasks.TISSUE, region=1e4)
    for kind in range(len(KINDS)):
        in_one_region(monkeypatch, kind)
        parts = [averaged(scenes.render(wide, seed, (240, 240), TASK.spacing).image, 8) for seed in range(20)]
        ways.append(np.mean([_varies_along_y(part) for part in parts]))
    assert ways[0] > 0.85, ways
    assert ways[1] < 0.15, ways
    monkeypatch.undo()
    field = scenes.render(tasks.TISSUE, 3, TASK.field, TASK.spacing)
    coarse, kind = averaged(field.image, 8), field.labels.astype(int)
    share = [averaged(((kind > 0) & (kind % 2 == parity)).astype(float), 8) for parity in (0, 1)]
    only = [(share[place] > 0.4) & (share[1 - place] == 0) for place in (0, 1)]
    brightness = [coarse[mask] - 0.55 * share[place][mask] for place, mask in enumerate(only)]
    error = np.hypot(*(each.std() / np.sqrt(len(each)) for each in brightness))
    assert abs(brightness[0].mean() - brightness[1].mean()) < max(3 * error, 0.02)
    fine = [field.image[(kind > 0) & (kind % 2 == parity)].std() for parity in (0, 1)]
    assert fine[1] > 1.3 * fine[0]


def test_arrangements_have_one_density(monkeypatch):
    share = []
    for kind in range(len(KINDS)):
        in_one_region(monkeypatch, kind)
        share.append(np.mean([scenes.render(tasks.TISSUE, s, (192, 192), (2.0, 2.0)).labels > 0 for s in range(5)]))
    assert max(share) - min(share) < 0.03, share
    assert min(share) > 0.2


@pytest.fixture(params=["tissue", "tissue in volumes"])
def shown(request):
    """Two random scenes of a task."""
    task = tasks.TASKS[request.param]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, (2, *task.field)).astype(np.uint8)
    images = rng.integers(0, 255, (2, *task.field)).astype(np.uint8)
    return task, tasks.Scenes(images, labels)


def test_views_are_where_they_are_said_to_be(shown, monkeypatch):
    """At float64, with scenes whose pixels are their own places."""
    monkeypatch.setattr(views, "NOISE", 0.0)
    task, known = shown
    axes = len(task.size)
    chosen = views.choose(task, known.labels, np.array([0, 1, 1]), np.random.default_rng(1))
    for axis in range(axes):
        ticks = (np.arange(task.field[axis]) % 250).reshape([-1 if a == axis else 1 for a in range(axes)])
        places = tasks.Scenes(np.broadcast_to(ticks, (2, *task.field)).astype(np.uint8), known.labels)
        batch = views.show(task, places, chosen, ("crop", "overview", "between", "finer overview"), 0, [False] * axes)
        for level in batch.levels:
            pixel = (level.image[:, 0].double() * views.SCALE + views.MIDDLE) * 255
            said = (level.grid.coordinates()[..., axis] / task.spacing[axis]) - 0.5
            same = said.expand_as(pixel) < 249 - max(task.factors)
            assert torch.allclose(said.expand_as(pixel)[same], pixel[same], atol=2e-3)
    crop, overview, between, finer = batch.levels
    assert crop.image.shape == overview.image.shape == between.image.shape
    assert finer.image.shape[2:] == tuple(n // f for n, f in zip(task.field, task.finer, strict=True))
    assert torch.equal(
        batch.target[0],
        torch.from_numpy(
            views.cut(torch.from_numpy(known.labels[chosen.scene])[:, None], chosen.corner, task.size)[0, 0].numpy()
        ).long(),
    )
    for inner in (crop, between):  # all lies in the field, and the crop in what lies between
        low, high = inner.grid.corners()
        assert (low >= overview.grid.corners()[0] - 1e-9).all()
        assert (high <= overview.grid.corners()[1] + 1e-9).all()
    assert (crop.grid.corners()[0] >= between.grid.corners()[0] - 1e-9).all()
    assert (crop.grid.corners()[1] <= between.grid.corners()[1] + 1e-9).all()


def test_mirrored_scenes_have_their_crops_mirrored(shown, monkeypatch):
    monkeypatch.setattr(views, "NOISE", 0.0)
    task, known = shown
    chosen = views.choose(task, known.labels, np.array([0, 1]), np.random.default_rng(1))
    mirrored = [axis == 1 for axis in range(len(task.size))]
    straight, turned = (
        views.show(task, known, chosen, ("crop", "overview"), 0, flips)
        for flips in ([False] * len(task.size), mirrored)
    )
    for one, other in zip(straight.levels, turned.levels, strict=True):
        assert torch.allclose(one.image.flip(3), other.image, atol=1e-5)
    assert torch.equal(straight.target.flip(2), turned.target)
    ends = straight.levels[0].grid.corners()[1][:, 1] + turned.levels[0].grid.corners()[0][:, 1]
    assert torch.allclose(ends, torch.full_like(ends, task.field[1] * task.spacing[1]))


def test_scenes_to_train_on_are_no_test_scenes_and_are_kept(tmp_path, monkeypatch):
    small = dataclasses.replace(TASK, size=(12, 12))
    monkeypatch.setitem(tasks.TASKS, "tissue", small)
    train, test = (draw("tissue", 2, tmp_path) for draw in (tasks.training_scenes, tasks.held_out_scenes))
    assert train.images.shape == (2, 96, 96)
    assert not (train.labels == test.labels).all(axis=(1, 2)).any()
    monkeypatch.setattr(scenes, "render", None)
    assert (tasks.training_scenes("tissue", 2, tmp_path).images == train.images).all()


@pytest.mark.parametrize("task", tasks.TASKS)
def test_networks_have_one_budget(task):
    cost = {
        name: networks.count_cost(networks.NETWORKS[name], tasks.TASKS[task])
        for name in HERE
        if networks.NETWORKS[name].in_budget and task not in networks.NETWORKS[name].without
    }
    for ours, theirs in ((cost[networks.OURS], each) for each in cost.values()):
        assert all(0.85 < their / our < 1.15 for our, their in zip(ours, theirs, strict=True)), cost


@pytest.fixture(scope="module")
def crops():
    """Shows two crops of two random scenes in the views that are asked for."""
    rng = np.random.default_rng(0)
    known = tasks.Scenes(*(rng.integers(0, 5, (2, *TASK.field)).astype(np.uint8) * 30 for _ in range(2)))
    chosen = views.Chosen(np.array([0, 1]), np.array([[10, 300], [200, 40]]))

    def show(names):
        return views.show(TASK, known._replace(labels=known.labels // 30), chosen, names, 0, [False, False])

    return show


@pytest.mark.parametrize("name", HERE)
def test_every_network_can_be_tested_as_it_is_said(name, crops):
    """And what it can not be tested for has a reason."""
    torch.manual_seed(0)
    model, known = networks.NETWORKS[name].create(TASK).eval(), networks.NETWORKS[name]
    answers = {}
    with torch.inference_mode():
        for condition, changed in conditions.CONDITIONS.items():
            if not changed.why_not(name):
                batch = changed.change(TASK, crops(changed.views or known.views))
                answers[condition] = model(batch)
                assert answers[condition].shape == (2, len(TASK.classes), *TASK.size)
                assert answers[condition].isfinite().all()
    expected = {"": 1, "muvit": 5, "unet": 7, "rat": 9, "vit": 9}
    assert len(answers) == (1 if len(known.views) == 1 else expected[known.family])
    for condition, answer in answers.items():
        assert condition == "" or not torch.equal(answer, answers[""]), condition


def test_conditions_say_what_they_do(crops):
    batch = crops(networks.PYRAMID)
    crop, overview = batch.levels
    moved = conditions.CONDITIONS["half a crop off"].change(TASK, batch)
    assert torch.allclose(moved.levels[1].origin - overview.origin, torch.tensor(24.0, dtype=torch.float64))
    assert moved.levels[0] is crop
    both = conditions.hidden(TASK, batch).levels
    assert all(torch.allclose(a, b) for a, b in zip(both[1].grid.corners(), crop.grid.corners(), strict=True))
    assert both[0].spacing == crop.spacing
    turned = conditions.swapped(TASK, batch)
    assert turned.levels == (overview, crop)
    assert torch.equal(turned.place.coordinates(), crop.grid.coordinates())
    masked = conditions.half_masked(TASK, batch).levels[1]
    assert masked.mask.float().mean() == 0.5
    assert masked.mask[0, 0, -1]  # the first crop lies on the right, the second one on the left
    assert masked.mask[1, 0, 0]
    assert (masked.image[:, 0][~masked.mask] == 0).all()
    assert set(conditions.CONDITIONS["third level"].views) == {*networks.PYRAMID, "between"}


def test_the_unet_sees_the_overview_about_its_crop(crops):
    """Channels are the overview's pixels, moved by whole pixels where the crop lies so, and zero beyond it."""
    unet = networks.NETWORKS[networks.CHANNELS].create(TASK)
    crop, overview = crops(networks.PYRAMID).levels
    middle = torch.full((2, 2), 8 * 24 - 24 + 0.5, dtype=torch.float64)  # the crop in the middle of the field
    seen = unet._about(crop._replace(origin=middle), overview)
    assert torch.allclose(seen[:, :1], overview.image, atol=1e-5)
    assert (seen[:, 1] == 1).all()
    further = unet._about(crop._replace(origin=middle + 80), overview)
    assert torch.allclose(further[:, 0, :-10, :-10], overview.image[:, 0, 10:, 10:], atol=1e-5)
    assert (further[:, 1, -10:] == 0).all()
    assert (further[:, 0, -10:] == 0).all()


def test_the_whole_field_is_read_where_the_crop_is(crops, monkeypatch):
    unet = networks.NETWORKS["U-Net, whole field"].create(TASK)
    monkeypatch.setattr(unet, "model", torch.nn.Identity())
    assert torch.equal(
        unet(crops(("field",))),
        views.cut(crops(("field",)).levels[0].image, np.array([[10, 300], [200, 40]]), TASK.size),
    )


@pytest.mark.skipif(not MUVIT, reason="muvit is not installed")
def test_muvit_is_told_where_its_levels_are(crops):
    """In pixels of the crop, from the first pixel's centre to the last one's, as its package asks for."""
    batch = crops(networks.PYRAMID)
    boxes = networks.NETWORKS[networks.MUVIT].create(TASK)._boxes(batch.levels)
    assert boxes[0].tolist() == [[[10.5, 300.5], [57.5, 347.5]], [[4.0, 4.0], [380.0, 380.0]]]


def write_wheel(file):
    """A template: a block of white matter in grey matter, in a box as large as the real one's."""
    size = (197, 233, 189)
    grey, white = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    grey[30:170, 40:200, 20:150], white[60:140, 80:160, 50:110] = 255, 255
    grey[white > 0] = 0
    affine = np.eye(4)
    affine[:3, 3] = (-98, -134, -72)
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in (("t1", grey // 3 + white // 2), ("gm", grey), ("wm", white)):
            archive.writestr(brain.FILE.format(name), gzip.compress(nibabel.Nifti1Image(array, affine).to_bytes(), 1))
    return file


def test_a_brain_has_tissue_in_octants(tmp_path):
    source = brain.template.__wrapped__(write_wheel(tmp_path / "wheel.whl"))
    assert source.maps.shape == (3, 189, 233, 197)
    size, spacing = (24, 24, 24), (6.0, 8.0, 8.0)
    fields = {train: brain.render(0, train, size, spacing, source) for train in (True, False)}
    assert not np.allclose(fields[True].image, fields[False].image)
    labels = fields[True].labels
    assert set(np.unique(labels)) == set(range(17))
    assert labels[2, 2, 2] == 0
    tissue, octant = (labels - 1) % 2, (labels - 1) // 2
    inner = labels[8:16, 8:16, 8:16]
    assert (inner > 0).mean() > 0.9
    for axis, bit in ((0, 4), (1, 2), (2, 1)):  # upper, front and right halves have the higher indices
        middles = [np.argwhere((labels > 0) & ((octant & bit > 0) == side)).mean(axis=0)[axis] for side in (0, 1)]
        assert middles[1] > middles[0] + 4
    assert tissue[12, 12, 12] == 1


def test_training_and_test_change_the_brain_by_other_amounts():
    drawn = {
        train: np.abs(np.concatenate([brain._amount(np.random.default_rng(seed), train, 9) for seed in range(50)]))
        for train in (True, False)
    }
    assert drawn[True].max() < drawn[False].min()
    assert drawn[False].max() < 1


def test_the_real_template():
    """What the report says of it."""
    try:
        source = brain.template()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    assert source.maps.shape == (3, 189, 233, 197)
    assert source.origin == (-72.0, -134.0, -98.0)
    t1, grey, white = source.maps
    assert np.abs(t1 - t1[..., ::-1]).mean() < 0.02  # symmetric
    assert t1[white > 0.8].mean() > t1[grey > 0.8].mean() > t1[(grey + white < 0.1) & (t1 > 0)].mean()


def test_iou_intervals_and_gains():
    confusion = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    assert report.mean_iou(confusion) == pytest.approx((8 / 11 + 9 / 12) / 2)
    assert report.interval([50.0]) == "50.0"
    half = 4.302653 * 1.0 / 3**0.5
    assert report.interval([49.0, 50.0, 51.0]) == f"50.0 ({50 - half:.1f} to {50 + half:.1f})"
    rows = [
        {"task": "tissue", "network": name, "seed": seed, "condition": condition, "seconds": 1, "confusion": text}
        for seed in range(2)
        for name, condition, text in (
            (networks.OURS, "", "9 1 1 9"),
            (networks.OURS, "a crop off", "5 5 5 5"),
            (networks.CHANNELS, "", f"{8 + seed} {2 - seed} 1 9"),
        )
    ]
    found = report.measured(pd.DataFrame(rows))
    ahead = report.gains(found)
    assert ahead["ahead of"].tolist() == [networks.CHANNELS]
    expected = [100 * (9 / 11 - (8 / 11 + 9 / 12) / 2), 0]
    assert ahead["points"].tolist() == [report.interval(expected)]
    changed = report.conditions(found).set_index("network")
    drop = 100 * (1 / 3 - 9 / 11)
    assert changed.loc[networks.OURS, "a crop off"] == f"33.3 ({drop:+.1f})"
    assert changed.loc[networks.CHANNELS, "a crop off"] == "-"


def test_what_is_impossible_is_said():
    found = report.impossible()
    assert set(found[found["network"] == networks.MUVIT]["condition"]) == {
        "third level",
        "finer overview",
        "coarser overview",
        "half masked",
    }
    assert networks.OURS not in set(found["network"])
    assert found["why"].str.len().min() > 10


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    seed: int


def test_a_plan_goes_on_where_it_was(tmp_path):
    ran, file = [], tmp_path / "new" / "results.csv"

    def run(line):
        ran.append(line)
        return pd.DataFrame([{**dataclasses.asdict(line), "value": 1, "more": 2}])

    lines = [Line("a", 0), Line("a", 1), Line("b", 0)]
    for wanted, count in ((lines[:2], 2), (lines, 3), ([], 3)):
        carry_out(wanted, run, file, ["name", "seed", "value"], 1)
        assert len(ran) == count
    assert file.read_text().splitlines() == ["name,seed,value", "a,0,1", "a,1,1", "b,0,1"]


def test_quick_results_are_not_taken_for_the_studys(monkeypatch, capfd):
    with pytest.raises(SystemExit) as end:
        call("run_context_study.py", "--quick", patch=monkeypatch, capture=capfd)
    assert end.value.code == 2
    assert "--quick needs --output" in capfd.readouterr().err


@pytest.mark.slow
def test_the_study_runs_and_goes_on(tmp_path, monkeypatch, capfd):
    arguments = ["--quick", "--output", tmp_path, "--cache", tmp_path / "cache"]
    call("run_context_study.py", *arguments, patch=monkeypatch, capture=capfd)
    results = report.read(tmp_path / "results.csv")
    assert set(results["network"]) == set(run_context_study.QUICK["networks"])
    ours = results[results["network"] == networks.OURS]
    assert set(ours["condition"]) == set(conditions.CONDITIONS)
    pixels = [report.confusion_of(text).sum() for text in results["confusion"]]
    assert set(pixels) == {2 * TASK.crops * 48 * 48}
    assert "2 trainings" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "tissue.png").stat().st_size > 5_000
    assert set(pd.read_csv(tmp_path / "times.csv")["network"]) == set(run_context_study.QUICK["networks"])
    before = (tmp_path / "results.csv").read_text(), (tmp_path / "times.csv").read_text()
    call("run_context_study.py", *arguments, patch=monkeypatch, capture=capfd)
    assert before == ((tmp_path / "results.csv").read_text(), (tmp_path / "times.csv").read_text())


def test_report_and_tables_are_those_of_the_results(tmp_path):
    if not (STUDY / "results.csv").exists():
        pytest.skip("the study has not been run")
    for name in ("README.md", "times.csv"):
        (tmp_path / name).write_bytes((STUDY / name).read_bytes())
    report.write_tables(report.measured(report.read(STUDY / "results.csv")), tmp_path)
    for name in ("README.md", *(f"tables/{path.name}" for path in (STUDY / "tables").glob("*.csv"))):
        assert (tmp_path / name).read_text() == (STUDY / name).read_text(), name
    text = (STUDY / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(pictures) == sorted(path.name for path in STUDY.glob("*.png"))


def test_batches_of_a_seed_are_the_same_for_all_networks(tmp_path, monkeypatch):
    small = dataclasses.replace(TASK, batch=8)
    known = tasks.Scenes(*(np.ones((3, *TASK.field), np.uint8) for _ in range(2)))
    places = []
    for name in (networks.OURS, "RAT, overview", "U-Net, whole field"):
        batch = next(experiments.draw_batches(small, networks.NETWORKS[name], known, 4))
        place = batch.levels[0].grid if batch.place is None else batch.place
        places.append(place)
        assert isinstance(place, Grid)
    assert torch.equal(places[0].origin, places[1].origin)
    assert torch.equal(places[0].origin[:1], places[2].origin)
    assert len(places[0].origin) == 8


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_crop_is_tested_twice(name):
    task = tasks.TASKS[name]
    labels = np.broadcast_to(np.uint8(1), (3, *task.field))
    chosen = experiments.choose_for_tests(task, tasks.Scenes(labels, labels))
    crops = {(int(scene), *corner.tolist()) for part in chosen for scene, corner in zip(*part, strict=True)}
    assert len(crops) == 3 * task.crops
    for _, *corner in crops:
        assert all(0 <= at <= whole - n for at, whole, n in zip(corner, task.field, task.size, strict=True))
