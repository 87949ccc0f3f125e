"""Training on labelled images: crops and overviews, tasks, the search for a batch size, processes together."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("jsonargparse")
pytest.importorskip("monai")
pytest.importorskip("edt")
pytest.importorskip("pycocotools")
pytest.importorskip("psutil")
pytest.importorskip("filelock")
pytest.importorskip("tensorboard")

from helpers import losses, places, quick, read_events, slow
from rat_timm.data import Sample
from rat_timm.dense import Segmenter
from rat_timm.geometry.grid import Grid
from training import batch_size, trainer
from training.config import Config, saved_config
from training.crops import Box, Crops, Scenes, Wholes, at_pixel_size, collate_scenes, overview, whole
from training.data import Scaling
from training.frames import DISCS, Discs, FrameFolder, Kept, open_frames, typical_length
from training.networks import ImageAlone, create_network
from training.tasks import TASKS, Measured, task_class
from training.tasks.labelled import Facts, in_windows, look_at, mean_of

FLOORS = {"segmentation": 0.95, "instances": 0.15, "detection": 0.4}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("task", FLOORS)
def test_each_task_learns(quickly, task):
    output = quickly(task)
    events, score = read_events(output), task_class(Config(output, task=task)).score
    assert events.Scalars(f"validation/{score}")[-1].value > FLOORS[task]
    assert [picture.step for picture in events.Images("validation/prediction")] == [16, 32]
    config = saved_config(output)
    untrained = task_class(config)(config)
    model = untrained.create_model().eval()
    _, validation = untrained.samples(model)
    with torch.no_grad():
        batches = [untrained.collate([validation[index]]) for index in range(2)]
        said = [untrained.predict(lambda batch: untrained.outputs(model, batch), batch)[0] for batch in batches]
    measured = [untrained.measure(one, batch, 0) for one, batch in zip(said, batches, strict=True)]
    assert untrained.summarize(measured)[score] < FLOORS[task] - 0.05


def test_the_trained_model_is_made_again(quickly):
    output = quickly("segmentation")
    facts = json.loads((output / "model" / "facts.json").read_text())
    assert facts["spacing"] == [1.0, 1.0]
    assert facts["spacing_range"] == [[1.0, 1.0], [1.0, 1.0]]
    model = Segmenter.load(output / "model")
    assert model.reference_spacing == (1.0, 1.0)
    assert model(torch.zeros(1, 1, 40, 50), spacing=0.5).shape == (1, 2, 40, 50)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(quickly, tmp_path, monkeypatch):
    task = "instances"
    finished = trainer.Trainer._finish

    def finish_some(self, progress, bar, step, loss):
        finished(self, progress, bar, step, loss)
        if step == 21:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_finish", finish_some)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(quick(tmp_path, task, checkpoint_every=18))
    monkeypatch.setattr(trainer.Trainer, "_finish", finished)
    trainer.train(quick(tmp_path, task, checkpoint_every=18))
    whole_run = quickly(task)
    assert losses(tmp_path) == pytest.approx(losses(whole_run), abs=1e-6)
    score = f"validation/{task_class(Config(tmp_path, task=task)).score}"
    last = [read_events(output).Scalars(score)[-1].value for output in (tmp_path, whole_run)]
    assert last[0] == pytest.approx(last[1], abs=1e-6)


FRAMES = [((40, 52), (0.5, 0.5)), ((12, 30, 26), (2.0, 0.5, 0.5))]


@pytest.mark.parametrize(("size", "spacing"), FRAMES)
def test_crops_and_overviews_lie_where_they_say(size, spacing):
    axes = len(size)
    frame = Sample(places(size, spacing), torch.tensor(spacing), target=torch.arange(math.prod(size)).view(size))
    config = Config("x", "instances", levels=[1, 2], factors=(0.7, 1.5), flip=True, crops=8)
    crops = Crops([frame], [n // 3 for n in size], lambda crop: crop.target, config)
    extent = torch.tensor(size) * torch.tensor(spacing)
    seen = set()
    for index in range(len(crops)):
        levels = crops[index]
        for level in levels:
            image, step, grid = level.sample.image, level.sample.spacing, level.sample.image.shape[1:]
            expected = (
                level.origin.view(-1, *[1] * axes) + places(grid, step.tolist()) - step.view(-1, *[1] * axes) / 2
            )  # from the corner of the frame, along flipped axes from its other end
            middle = tuple(slice(3, -3) if n > 8 else slice(n // 2, n // 2 + 1) for n in grid)
            for axis in range(axes):
                forward = image[axis][middle] - expected[axis][middle]
                backward = extent[axis] - image[axis][middle] - expected[axis][middle]
                error = min(float(forward.abs().median()), float(backward.abs().median()))
                assert error < 0.1 * float(step[axis]), (index, axis)
                seen.add((axis, bool(forward.abs().median() > backward.abs().median())))
        first, around = levels
        assert list(first.sample.image.shape[1:]) == [n // 3 for n in size]
        assert first.sample.target.shape == first.sample.image.shape[1:]
        torch.testing.assert_close(around.sample.spacing, 2 * first.sample.spacing)
        assert around.sample.target is None
    assert len(seen) == 2 * axes  # each axis in both directions


def test_intensities_of_crops_are_bent_between_their_extremes():
    frames = Kept(Discs("train", 2))
    config = Config("x", "instances", flip=True, crops=4, levels=[1, 2])
    plain, bent = (
        Crops(frames, [32, 32], lambda crop: crop.target, dataclasses.replace(config, gamma=gamma)) for gamma in (1, 3)
    )
    exponents = []
    for index in range(8):
        for before, after in zip(plain[index], bent[index], strict=True):
            x, y = (
                (image - image.min()) / (image.max() - image.min())
                for image in (before.sample.image, after.sample.image)
            )
            middle = (x > 0.1) & (x < 0.9)
            powers = y[middle].log() / x[middle].log()
            assert float(powers.max() - powers.min()) < 1e-3
            exponents.append(float(powers.mean()))
            torch.testing.assert_close(before.sample.image.aminmax(), after.sample.image.aminmax())
            assert torch.equal(before.origin, after.origin)
    assert exponents[::2] == pytest.approx(exponents[1::2], rel=1e-3)  # levels of a pyramid alike
    assert 1 / 3 <= min(exponents) < 0.8 < 1.25 < max(exponents) <= 3
    with pytest.raises(ValueError, match=r"gamma must be at least 1, got 0\.5"):
        Config("x", "instances", gamma=0.5)


def test_crops_follow_from_their_numbers():
    config = Config("x", "instances", factors=(0.5, 2.0), flip=True, crops=2)
    crops = [Crops(Kept(Discs("train", 2)), [32, 32], lambda crop: crop.target, config) for _ in range(2)]
    first, again = crops[0][3][0].sample, crops[1][3][0].sample
    assert torch.equal(first.image, again.image)
    crops[1].epoch = 1
    assert not torch.equal(first.image, crops[1][3][0].sample.image)
    assert len(crops[0]) == 2 * DISCS["train"]
    some = Crops(crops[0].frames, [32, 32], lambda crop: None, dataclasses.replace(config, p_factors=0.5))
    sizes = [float(some[index][0].sample.spacing[0]) for index in range(16)]
    assert 3 < sizes.count(1.0) < 13
    assert len(set(sizes)) == 17 - sizes.count(1.0)
    with pytest.raises(ValueError, match="size must be 2 numbers, one per axis of the images, got"):
        Crops(Discs("train", 2), [8, 8, 8], lambda crop: None, config)[0]


def test_crops_with_labels_in_them():
    """A labelled pixel in the corner is in as many crops as are wanted, and at every place of them."""
    size = (40, 60)
    labels = torch.zeros(size, dtype=torch.int32)
    labels[30, 5] = 1
    frame = Sample(torch.zeros(1, *size), torch.ones(2), target=labels)
    config = Config("x", "instances", flip=True, crops=200, foreground=0.5)
    crops = Crops([frame], [8, 8], lambda crop: crop.target, config)
    found = [crop.sample.target.nonzero() for (crop,) in (crops[index] for index in range(200))]
    inside = torch.cat([places for places in found if len(places)])
    assert 75 < len(inside) < 135  # of 200, at which three standard deviations are 21; others by chance
    assert inside[:, 0].unique().tolist() == list(range(8))
    without = Crops([frame._replace(target=labels * 0)], [8, 8], lambda crop: crop.target, config)
    assert not without[0][0].sample.target.any()
    with pytest.raises(ValueError, match="foreground must be a probability, got 2"):
        Config("x", "instances", foreground=2)


def test_flipped_boxes():
    frame = Sample(torch.arange(20.0).view(1, 4, 5), torch.ones(2), target=torch.arange(20).view(4, 5))
    cut = Box([1, 0], [3, 2], (0,)).cut(frame)
    expected = frame.image.flip(1)[:, 1:3, :2]
    assert torch.equal(cut.image, expected)
    assert torch.equal(cut.target, expected[0].long())


def test_a_pyramid_of_one_is_the_image():
    torch.manual_seed(0)
    model = Segmenter("test_rat", 2, in_chans=1).eval()
    frame = Sample(torch.rand(1, 40, 32), torch.tensor([1.0, 1.0]))
    one = model(**collate_scenes([whole(frame, [1])]).told())
    torch.testing.assert_close(one, model(frame.image[None], spacing=1.0))
    two = collate_scenes([whole(frame, [1, 4]), whole(frame._replace(image=frame.image.flip(1)), [1, 4])]).told()
    assert [list(x.shape) for x in two["x"]] == [[2, 1, 40, 32], [2, 1, 10, 8]]
    assert model(**two).shape == (2, 2, 40, 32)


@pytest.mark.parametrize("levels", [[1], [1, 2]])
@pytest.mark.parametrize(("size", "spacing"), FRAMES)
def test_windows_are_where_they_say(size, spacing, levels):
    frame = Sample(places(size, spacing), torch.tensor(spacing), torch.rand(size) > 0.1)
    scenes = collate_scenes([whole(frame, levels)])

    def call(batch):
        for level, (part, origin) in enumerate(zip(batch.levels, batch.origins, strict=True)):
            start = torch.stack([channel.flatten()[0] for channel in part.image[0]])
            if level == 0:
                valid = part.mask[0].flatten()[0]
                assert not valid or torch.allclose(start, origin[0], atol=1e-4)
            assert torch.allclose(part.spacing[0], torch.tensor(spacing) * levels[level])
        assert len(batch.levels) == len(levels)
        return 2 * batch.levels[0].image

    tile = [max(4, n // 2) for n in size]
    torch.testing.assert_close(in_windows(call, scenes, tile, levels), 2 * frame.image[None], rtol=1e-4, atol=1e-4)
    out = Grid.create([n // 2 for n in size], [2 * step for step in spacing])
    there = in_windows(call, scenes._replace(out=out), tile, levels)
    assert list(there.shape[2:]) == [n // 2 for n in size]
    valid = there.abs().sum(1, keepdim=True) > 0
    expected = 2 * out.coordinates().movedim(-1, 1)
    error = ((there - expected).abs() * valid).flatten(2).amax(-1)
    assert bool((error < 2.1 * torch.tensor(spacing)).all())  # masked neighbours move the mean by less than a pixel


def write_folder(root, parts=("train", "validation", "test"), size=(48, 40)):
    """Pictures of discs with their labels."""
    for part in parts:
        for folder in ("images", "labels"):
            (root / part / folder).mkdir(parents=True)
        for index, name in enumerate(("a", "b")):
            sample = Discs("train", 2)[index]
            image = (255 * sample.image[0].clamp(0, 1)).byte().numpy()[: size[0], : size[1]]
            labels = sample.target.numpy().astype(np.uint8)[: size[0], : size[1]]
            labels[:2] = 255
            Image.fromarray(image).save(root / part / "images" / f"{name}.png")
            Image.fromarray(labels).save(root / part / "labels" / f"{name}.png")


def test_folders(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    write_folder(tmp_path)
    config = Config("x", "instances", data=str(tmp_path), spacing=[0.5, 0.25], ignored=255)
    frames = open_frames(config, "train")
    assert frames.names == ["a", "b"]
    sample = frames[1]
    assert sample.image.shape == (1, 48, 40)
    assert sample.spacing.tolist() == [0.5, 0.25]
    assert sample.target[:2].unique().tolist() == [-1]
    assert torch.equal(sample.target[2:], Discs("train", 2)[1].target[2:48, :40])
    facts = look_at(frames, config)
    assert facts.channels == 1
    assert facts.tolerance == 1.0
    lengths = [n for i in range(2) for n in typical_length(frames[i].target, frames[i].spacing)]
    assert facts.length == pytest.approx(np.median(lengths))
    tifffile.imwrite(tmp_path / "train" / "images" / "c.tif", np.zeros((8, 9, 3), np.uint16))
    with pytest.raises(ValueError, match=r"train: must hold as many images as labels, of the same names, got \['c'\]"):
        open_frames(config, "train")
    tifffile.imwrite(tmp_path / "train" / "labels" / "c.tif", np.zeros((8, 9), np.int32))
    assert open_frames(config, "train")[2].image.shape == (3, 8, 9)
    with pytest.raises(ValueError, match=r"channels and axes, got \[1, 48, 40\] and \[3, 8, 9\]"):
        look_at(open_frames(config, "train"), config)
    tifffile.imwrite(tmp_path / "train" / "labels" / "c.tif", np.zeros((8, 8), np.int32))
    with pytest.raises(ValueError, match=r"c\.tif: must have the image's \[8, 9\] pixels, got \[8, 8\]"):
        open_frames(config, "train")[2]
    with pytest.raises(ValueError, match=r"c\.tif: does not say how large a pixel is: give --spacing"):
        open_frames(dataclasses.replace(config, spacing=None), "train")[2]
    with pytest.raises(ValueError, match="data: there is no folder"):
        open_frames(config, "other")
    (tmp_path / "test" / "images" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"a\.txt: is no image of a format that is read"):
        FrameFolder(tmp_path / "test", config)


def test_files_that_say_their_pixel_size(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    volume = Discs("train", 3)[0]
    for folder, pixels in (("images", volume.image[0].numpy()), ("labels", volume.target.numpy().astype(np.uint16))):
        (tmp_path / "train" / folder).mkdir(parents=True)
        metadata = {"axes": "ZYX", "PhysicalSizeZ": 1.0, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        tifffile.imwrite(tmp_path / "train" / folder / "a.ome.tif", pixels, metadata=metadata)
    sample = open_frames(Config("x", "instances", data=str(tmp_path)), "train")[0]
    assert sample.spacing.tolist() == [1.0, 0.5, 0.5]
    assert torch.equal(sample.target, volume.target)


def test_nothing_annotated_and_nothing_labelled(tmp_path):
    empty = [Sample(torch.zeros(1, 8, 8), torch.ones(2), target=torch.zeros(8, 8, dtype=torch.int32))]
    with pytest.raises(ValueError, match="data: no training image has a label above 0"):
        look_at(empty, Config(tmp_path, "segmentation"))
    facts = Facts(1, 2, (1.0, 1.0), 4.0, 2.0, [0.0], [1.0])
    task = task_class(Config(tmp_path, "segmentation"))(Config(tmp_path, "segmentation"), facts)
    unknown = empty[0]._replace(target=torch.full((8, 8), -1))
    batch = collate_scenes([whole(unknown, [1])])
    logits = torch.ones(1, 2, 8, 8, requires_grad=True)
    loss = task.loss(logits, batch)
    loss.backward()
    assert float(loss) == 0
    assert not logits.grad.any()
    nothing = [Measured({"dice": math.nan}, None)] * 2
    assert math.isnan(mean_of(nothing, "dice"))
    assert mean_of([*nothing, Measured({"dice": 0.5}, None)], "dice") == 0.5


def test_segmentation_figures_are_physical(tmp_path):
    """Two squares, the predicted one shifted by 2 pixels along x."""
    config = Config(tmp_path, "segmentation", data="discs")
    true = torch.zeros(20, 20, dtype=torch.int32)
    true[5:15, 5:13] = 3
    shifted = true.roll(2, 1).clamp(max=1).long()
    for spacing, near in ((1.0, 0.0), (0.25, 1.0)):
        facts = Facts(1, 2, (spacing, spacing), 4.0, tolerance=0.6)
        task = task_class(config)(config, facts)
        frame = Sample(torch.zeros(1, 20, 20), torch.tensor([spacing, spacing]), target=true)
        values = task.measure(shifted, collate_scenes([whole(frame, [1])]), 0).values
        assert values["dice"] == pytest.approx(6 / 8)
        assert values["hausdorff95"] == pytest.approx(2 * spacing)
        assert (values["surface_dice"] == 1.0) == (near == 1.0)


def test_networks_that_see_images_alone():
    pytest.importorskip("segmentation_models_pytorch")
    config = Config("x", "instances", model="smp:unet-test_resnet", pretrained=False)
    network = create_network(config, 1, 2, (0.5, 0.5)).eval()
    image = torch.rand(2, 1, 40, 50)
    alone = network(image, spacing=torch.tensor([[0.5, 0.5], [9.0, 9.0]]))
    torch.testing.assert_close(alone, network(image))
    filled = network.network(torch.nn.functional.pad(image, (0, 14, 0, 24)))
    torch.testing.assert_close(alone, filled[..., :40, :50])
    mask = torch.rand(2, 40, 50) > 0.5
    assert not network(image, mask=mask).movedim(1, -1)[~mask].any()
    coordinates = ImageAlone(torch.nn.Identity())(
        places((40, 50), (0.5, 0.5))[None], spacing=0.5, out=Grid.create((20, 25), 1.0)
    )
    torch.testing.assert_close(coordinates[0], places((20, 25), (1.0, 1.0)))
    with pytest.raises(ValueError, match=r"levels must be \[1\] for networks that see images alone, got 2 levels"):
        network([image, image])
    with pytest.raises(ValueError, match="model must be one of this package's for volumes, got smp:"):
        create_network(config, 1, 2, (1.0, 0.5, 0.5))
    ours = dataclasses.replace(config, model="test_rat")
    with pytest.raises(
        ValueError, match=r"model must be for 3 axes, as the data have, got 'test_rat' for 2; .* end in _3d"
    ):
        create_network(ours, 1, 2, (1.0, 0.5, 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"task": "segmentation", "model": "test_rat_3d", "levels": [1, 2], "flip": True},
        {"task": "instances", "model": "smp:unet-test_resnet", "pretrained": False, "factors": (0.7, 1.4)},
        slow({"task": "detection", "detector": "mask_rcnn", "width": 32}),
    ],
    ids=["volumes", "unet", "mask_rcnn"],
)
def test_others(tmp_path, options):
    if str(options.get("model")).startswith("smp"):
        pytest.importorskip("segmentation_models_pytorch")
    config = dataclasses.replace(quick(tmp_path, options["task"]), crops=1, **{**options, "quick": False, "epochs": 1})
    config = dataclasses.replace(config, size=[16, 32, 32] if "3d" in config.model else [48, 48])
    trainer.train(config)
    task, model = task_class(config).load(config, tmp_path / "model")
    assert not model.training
    assert len(losses(tmp_path)) == 2
    images = read_events(tmp_path).Images("validation/prediction")
    assert len(images) == 1
    assert task.facts.channels == 1


def test_detection_is_of_images(tmp_path):
    with pytest.raises(ValueError, match=r"task must not be detection with volumes, levels or tile, got 3 axes"):
        task_class(config := Config(tmp_path, "detection", model="test_rat_3d"))(config)
    with pytest.raises(ValueError, match="levels must begin with 1 and be at least that, got"):
        Config(tmp_path, "instances", levels=[4, 1])
    with pytest.raises(ValueError, match=r"layer_decay must be 1 for Segmenter, .* got 0\.8"):
        trainer.train(quick(tmp_path, "segmentation", layer_decay=0.8))
    assert set(TASKS) == {"classification", "masked", "distillation", *FLOORS}


def test_all_processes_take_the_size_that_fits_in_each(tmp_path, monkeypatch):
    config = Config(tmp_path, "segmentation", device="cpu", batch_size="auto")
    monkeypatch.setattr(batch_size, "_fits_cpu", lambda step, most: 8)
    monkeypatch.setattr(batch_size, "gather", lambda found: [found, 2, 4])
    monkeypatch.setattr(batch_size, "count", lambda: 3)
    model = torch.nn.Linear(1, 1)
    recipe = trainer.Recipe(lambda model, batch: None, lambda outputs, batch: None)
    assert batch_size.find_batch_size(model, range(99), list, recipe, config) == 6
    assert (tmp_path / "batch_size").read_text() == "6"
    monkeypatch.setattr(batch_size, "gather", lambda found: [4, 4, 4])
    assert batch_size.find_batch_size(model, range(99), list, recipe, config) == 12  # no training has begun


class Memory:
    """A step that takes so many bytes for each sample, and a process that has as many."""

    def __init__(self, each):
        self.each, self.tried = each, []

    def __call__(self, samples):
        self.tried.append(samples)
        block = torch.ones(samples * self.each // 4)
        time.sleep(0.05)
        del block


@pytest.mark.parametrize(("free", "most", "expected"), [(130, 64, 4), (500, 64, 16), (500, 8, 8), (20, 64, 0)])
def test_batches_that_fit_on_a_cpu(monkeypatch, free, most, expected):
    step = Memory(25 * 2**20)
    monkeypatch.setattr(batch_size, "free_memory", lambda: free * 2**20)
    assert batch_size._fits_cpu(step, most) == expected
    assert max(step.tried) <= 4


@pytest.mark.parametrize(("least", "most", "expected"), [(9, 64, 8), (100, 50, 32), (1, 8, 0)])
def test_batches_that_fit_on_a_gpu(monkeypatch, least, most, expected):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)

    def step(samples):
        if samples >= least:
            raise torch.cuda.OutOfMemoryError

    assert batch_size._fits_gpu(step, most) == expected
    assert fractions == [batch_size.SHARE, 1.0]


@pytest.mark.slow
def test_a_batch_size_is_found_before_training(tmp_path, monkeypatch, capsys):
    assert batch_size.free_memory() > 0
    monkeypatch.setattr(batch_size, "_fits_cpu", lambda step, most: (step(2), min(8, most))[1])
    config = quick(tmp_path, "segmentation", batch_size="auto", crops=2)
    trainer.train(config)
    assert "batch_size 8: 8 in each of 1 processes fit on cpu" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 2 * 8 * 2 // 8
    assert saved_config(tmp_path).batch_size == "auto"
    monkeypatch.setattr(batch_size, "_fits_cpu", lambda step, most: pytest.fail("was found"))
    trainer.train(config)
    monkeypatch.setattr(batch_size, "_fits_cpu", lambda step, most: 0)
    with pytest.raises(ValueError, match="batch_size: one sample in each of 1 processes does not fit on cpu"):
        trainer.train(quick(tmp_path / "other", "segmentation", batch_size="auto", crops=2))


def test_the_search_changes_no_weights(tmp_path):
    config = quick(tmp_path, "segmentation", batch_size="auto", crops=2)
    torch.manual_seed(0)
    task = task_class(config)(config)
    model = task.create_model()
    training, validation = task.samples(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    recipe = trainer.Recipe(task.outputs, task.loss)
    found = batch_size.find_batch_size(model, training, task.collate, recipe, config)
    assert found in (4, 8, 16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())
    assert isinstance(validation, Wholes)
    assert isinstance(task.collate([validation[0]]), Scenes)


def test_an_overview_ends_where_the_image_does():
    frame = Sample(places((20, 20), (1.0, 1.0)), torch.ones(2))
    around = overview(frame, Box([0, 8], [8, 16]), 2, 1)
    assert around.sample.image.shape[1:] == (6, 8)
    assert around.origin.tolist() == [1.0, 5.0]
    assert at_pixel_size(frame, Box([4, 4], [8, 12]), 1).origin.tolist() == [4.5, 4.5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("channels", [1, 2])
def test_intensities_say_what_scaling_does(dtype, channels):
    scaling = Scaling(channels, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), "model")
    low, high = scaling.intensities(dtype)
    image = (torch.rand(channels, 5, 4) * (1 if dtype.is_floating_point else torch.iinfo(dtype).max)).to(dtype)
    torch.testing.assert_close(scaling(image), (image.float() - low) / (high - low))
    assert Scaling(3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), "model").intensities(dtype) is None
    assert Scaling(channels, (0.4,), (0.2,), "sample").intensities(dtype) is None


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (3.0, 1.0, 1.0)])
def test_hounsfield_units_are_scaled_by_the_training_images(spacing):
    """Air, tissue and bone: divided by 32767 they would all be nearly zero, which is said."""
    torch.manual_seed(0)
    size = (4, 20, 30)[-len(spacing) :]
    images = [torch.randint(-1000, 1500, (1, *size), dtype=torch.int16) for _ in range(3)]
    frames = [Sample(image, torch.tensor(spacing), target=(image[0] > 200).long()) for image in images]
    with pytest.warns(UserWarning, match=r"pixels are torch.int16, and are divided by 32767: --intensity data"):
        assert look_at(frames, Config("x", "segmentation", length=4.0)).mean == ()
    facts = look_at(frames, Config("x", "segmentation", length=4.0, intensity="data"))
    values = torch.stack(images).double()
    assert facts.mean == pytest.approx([values.mean().item()])
    assert facts.std == pytest.approx([values.std(correction=0).item()])
    scaling = Scaling(1, facts.mean, facts.std, "data")
    low, high = scaling.intensities(torch.int16)
    torch.testing.assert_close(scaling(images[0]), (images[0].float() - low) / (high - low))
    assert torch.cat([scaling(image) for image in images]).std() == pytest.approx(1, abs=1e-2)


def test_intensities_of_data_are_kept_with_the_model(tmp_path):
    trainer.train(quick(tmp_path, "segmentation", intensity="data", crops=1))
    facts = json.loads((tmp_path / "model" / "facts.json").read_text())
    assert facts["intensities"] == pytest.approx([facts["mean"][0], facts["mean"][0] + facts["std"][0]])
    with pytest.raises(ValueError, match="intensity must be 'model' or 'sample' for classification"):
        trainer.train(Config(tmp_path / "digits", intensity="data", quick=True))
