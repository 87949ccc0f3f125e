"""`examples/training`: what it learns, how it goes on, and that processes together do what one does."""

import fcntl
import functools
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import distributed as dist

from rat_timm import data as rat_data
from rat_timm.data.errors import ReadError
from rat_timm.dense import Segmenter

pytest.importorskip("jsonargparse")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("monai")
pytest.importorskip("filelock")
pytest.importorskip("tensorboard")
tifffile = pytest.importorskip("tifffile")

from helpers import call, finish, losses, quick, read_events, slow, start, together, train_all, wait_for_checkpoint
from training import checkpoints, data, processes, spacings, trainer
from training.config import Config, axes_of, remember, warmup_of
from training.engines import create_optimizer
from training.tasks.classification import Classification

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEPS = 12  # of 3 epochs
DIGITS = {"epochs": 3, "scale": (0.97, 1.0)}  # crops have few pixel sizes: the model is called once for each
OPTIONS = ("--epochs", 3, "--scale", "[0.97, 1.0]")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def uninterrupted(once):
    """One process, three epochs of the shipped weights on digits that are alike."""
    return once("uninterrupted", lambda folder: trainer.train(Config(folder, checkpoint_every=3, **DIGITS)))


def test_pretrained_weights_beat_random_ones_at_equal_steps(uninterrupted, tmp_path):
    def accuracy(output):
        return read_events(output).Scalars("validation/accuracy")[-1].value

    scratch = trainer.train(Config(tmp_path, pretrained=False, **DIGITS))
    assert len(losses(uninterrupted)) == len(losses(tmp_path)) == STEPS
    assert accuracy(tmp_path) == pytest.approx(scratch)
    assert accuracy(uninterrupted) > 0.85
    assert 1 - accuracy(uninterrupted) < (1 - scratch) / 3


def test_only_pretrained_layers_learn_at_rates_of_their_own(tmp_path):
    model = timm.create_model("test_rat")

    def rates(**options):
        optimizer = create_optimizer(model, Config(tmp_path, **options))
        return {group.get("lr_scale", 1.0) for group in optimizer.param_groups}

    assert rates(pretrained=False) == {1.0}
    assert min(rates(pretrained=True)) < 0.5 < max(rates(pretrained=True)) == 1.0
    assert min(rates(pretrained=False, layer_decay=0.8)) < 0.5


def test_the_learning_rate_rises_for_a_tenth_of_the_epochs(tmp_path):
    assert [warmup_of(Config(tmp_path), epochs) for epochs in (1, 4, 10, 60, 99)] == [1, 1, 1, 6, 9]
    assert warmup_of(Config(tmp_path, warmup_epochs=0), 60) == 0


def test_the_trained_model_is_made_again(uninterrupted):
    model = timm.create_model(f"local-dir:{uninterrupted / 'model'}", pretrained=True)
    assert model.num_classes == 4
    assert model.pretrained_cfg["label_names"] == ["3", "5", "8", "9"]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(uninterrupted, tmp_path):
    process = start("train.py", "--output", tmp_path, "--checkpoint_every", 3, *OPTIONS)
    wait_for_checkpoint(tmp_path, process)
    process.kill()
    process.communicate()
    before = max(int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit())
    assert before < STEPS
    trainer.train(Config(tmp_path, checkpoint_every=3, **DIGITS))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), abs=1e-6)
    first, again = (timm.create_model(f"local-dir:{o / 'model'}", pretrained=True) for o in (uninterrupted, tmp_path))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "deepspeed2", "deepspeed3"])
def test_two_processes_do_what_one_does(uninterrupted, tmp_path, parallel):
    if parallel != "ddp":
        pytest.importorskip("deepspeed")
    average = ["--ema_decay", 0] if parallel == "deepspeed3" else []  # no loss depends on it
    options = ("--output", tmp_path, *OPTIONS, "--workers", 0, "--parallel", parallel, *average)
    finish(start("train.py", *options, launcher=TORCHRUN))
    assert losses(tmp_path) == pytest.approx(losses(uninterrupted), abs=1e-4)
    timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    if parallel == "ddp":  # whose state is that of one process
        return
    last = damage_last(tmp_path)
    printed = finish(start("train.py", *options, launcher=TORCHRUN))
    check_again(printed, last, tmp_path, uninterrupted)


def damage_last(output):
    """Damages the last checkpoint of a training; returns its folder."""
    last = output / "checkpoints" / "00000012"
    damage(max((file for file in last.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size))
    return last


def check_again(printed, last, output, uninterrupted):
    assert re.search(r"checkpoints/00000012: is damaged and left out: .* changed", printed)
    assert losses(output) == pytest.approx(losses(uninterrupted), abs=1e-4)
    assert checkpoints.find_damage(last) is None


@pytest.mark.slow
def test_two_processes_with_shards_do_what_one_does(uninterrupted, tmp_path):
    """Also where windows are calls that all processes have to make: one has fewer images that need them."""
    config = Config(tmp_path / "digits", workers=0, parallel="fsdp", device="cpu", **DIGITS)
    discs = functools.partial(quick, task="segmentation", tile=[64, 96], crops=1)
    dense, one_dense = discs(tmp_path / "discs", parallel="fsdp"), discs(tmp_path / "one")
    options = {"size": [64, 64], "crops": 1, "epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu"}
    masked = Config(tmp_path / "masked", "masked", parallel="fsdp", **options)
    together(train_all, [config, dense, masked])
    assert losses(config.output) == pytest.approx(losses(uninterrupted), abs=1e-4)
    timm.create_model(f"local-dir:{config.output / 'model'}", pretrained=True)
    one_masked = Config(tmp_path / "alone", "masked", **options)
    for two, one, figure in ((dense, one_dense, "dice"), (masked, one_masked, "knn")):
        trainer.train(one)
        assert losses(two.output) == pytest.approx(losses(one.output), abs=1e-4)
        ends = [read_events(run.output).Scalars(f"validation/{figure}")[-1].value for run in (two, one)]
        assert ends[0] == pytest.approx(ends[1], abs=1e-4)
    Segmenter.load(dense.output / "model")
    last = damage_last(config.output)
    check_again(together(train_all, [config]), last, config.output, uninterrupted)


@pytest.mark.slow
def test_no_evaluation_is_lost(tmp_path, monkeypatch):
    """A run that ends while it evaluates an epoch evaluates it when it goes on."""
    config = Config(tmp_path, quick=True, workers=0)
    summarize = Classification.summarize
    monkeypatch.setattr(Classification, "summarize", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    monkeypatch.setattr(Classification, "summarize", summarize)
    reports = []
    trainer.train(config, report=reports.append)
    assert [report["epoch"] for report in reports] == [0, 1]
    events = read_events(tmp_path)
    assert [scalar.step for scalar in events.Scalars("validation/accuracy")] == [2, 4]
    assert trainer.train(config) == pytest.approx(reports[-1]["accuracy"])  # of a run that is done


def damage(file):
    """Changes one byte in the middle of a file, whose size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_left_out(uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["00000009", "00000012"]
    damage(next((output / "checkpoints" / "00000012").glob("*.distcp")))
    (output / "checkpoints" / "7").touch()
    (output / "checkpoints" / "99").mkdir()  # neither is a checkpoint's name
    with pytest.warns(UserWarning, match=r"checkpoints/00000012: is damaged and left out: .*\.distcp changed"):
        trainer.train(Config(output, checkpoint_every=3, **DIGITS))
    assert losses(output) == pytest.approx(losses(uninterrupted), abs=1e-4)
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == ["00000009", "00000012", "7", "99"]


class Counter:
    """An engine whose state is a number, in a file in a folder."""

    def save(self, folder):
        (folder / "part").mkdir()
        (folder / "part" / "state").write_text(str(self.state))

    def load(self, folder):
        self.state = int((folder / "part" / "state").read_text())


@pytest.mark.parametrize("harm", ["byte", "file", "manifest", "empty", "list", "cut"])
def test_every_damage_of_a_checkpoint_is_seen(tmp_path, harm):
    saved, engine = checkpoints.Checkpoints(tmp_path), Counter()
    assert saved.load_last(engine) == 0
    for step in (1, 2, 30):
        engine.state = 100 * step
        saved.save(engine, step)
    assert saved.load_last(engine) == 30
    last = tmp_path / "00000030"
    {
        "byte": lambda: damage(last / "part" / "state"),
        "file": (last / "part" / "state").unlink,
        "manifest": (last / "manifest.json").unlink,
        "empty": lambda: (last / "manifest.json").write_text(""),
        "list": lambda: (last / "manifest.json").write_text("[]"),
        "cut": lambda: (last / "part" / "state").write_text("300"[:2]),
    }[harm]()
    with pytest.warns(UserWarning, match=f"{last}: is damaged and left out: "):
        assert saved.load_last(engine) == 2
    assert engine.state == 200
    saved.save(engine, 3)  # the damaged one, of a later step, does not count as one of the last two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003", "00000030"]
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder / "part")
    with pytest.raises(ValueError, match="all checkpoints are damaged"):
        saved.load_last(engine)


def load_last(place, folder):
    """What each of two processes does: writes why no checkpoint can be loaded."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=place, world_size=2)
    try:
        checkpoints.Checkpoints(folder / "checkpoints").load_last(Counter())
    except Exception as error:
        (folder / f"{place}").write_text(f"{type(error).__name__}: {error}")


def test_no_process_waits_where_all_checkpoints_are_damaged(tmp_path):
    engine = Counter()
    engine.state = 1
    checkpoints.Checkpoints(tmp_path / "checkpoints").save(engine, 1)
    damage(tmp_path / "checkpoints" / "00000001" / "manifest.json")
    both = torch.multiprocessing.start_processes(load_last, (tmp_path,), 2, join=False, start_method="fork")
    deadline = time.monotonic() + 120
    while not both.join(timeout=5) and time.monotonic() < deadline:
        pass  # it returns when one of them ends
    waiting = [process for process in both.processes if process.is_alive()]
    for process in waiting:
        process.kill()
    assert waiting == []
    assert re.match("ValueError: .*checkpoints: all checkpoints are damaged", (tmp_path / "0").read_text())
    assert re.match("RuntimeError: in the first process: ValueError: .*are damaged", (tmp_path / "1").read_text())


@pytest.mark.slow
def test_other_numbers_of_epochs(uninterrupted, tmp_path):
    output = shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(ValueError, match=r"epochs must be at least the 3 begun in .*run, got 2"):
        trainer.train(Config(output, checkpoint_every=3, **DIGITS | {"epochs": 2}))
    assert trainer.train(Config(output, checkpoint_every=3, **DIGITS)) > 0.85
    trainer.train(Config(output, checkpoint_every=3, **DIGITS | {"epochs": 4}))
    assert len(losses(output)) == STEPS + 4


@pytest.mark.parametrize("text", ["", "- a\n", "model: [", "\0"])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "checkpoints" / "00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"config\.yaml: (must hold the config that training began|is damaged)"):
        trainer.train(Config(tmp_path))


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    config = Config(tmp_path, quick=True, workers=0)
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="output must be a folder that no other run writes to, got "):
            trainer.train(config)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    trainer.train(config)


def write_folder(root, suffix):
    """Two classes that differ in the physical size of a disc, not in its pixels."""
    y, x = np.mgrid[:32, :32] - 15.5
    disc = (np.hypot(y, x) < 8).astype(np.uint8) * 255
    for part in ("train", "validation"):
        for name, spacing in (("large", 1.0), ("small", 0.25)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(4):
                if suffix == ".png":
                    Image.fromarray(disc).save(folder / f"{index}.png")
                else:
                    metadata = {"axes": "YX", "PhysicalSizeX": spacing, "PhysicalSizeY": spacing}
                    tifffile.imwrite(folder / f"{index}{suffix}", disc, metadata=metadata)


@pytest.mark.slow
def test_files_say_how_large_their_pixels_are(tmp_path, monkeypatch, capfd):
    write_folder(tmp_path / "data", ".ome.tif")
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"data: {tmp_path / 'data'}\nepochs: 12\nbatch_size: 8\nscale: [0.9, 1.0]\nworkers: 0\nclip_grad: 0\n"
    )
    options = ("--output", tmp_path / "run", "--config", file, "--ema_decay", 0)
    printed = call("train.py", *options, patch=monkeypatch, capture=capfd)
    assert "accuracy 100.0%" in printed  # which the pixels alone do not tell
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["large", "small"]


DAMAGED = ("a.ome.tif", "b.zarr", "c.nii.gz", "d.dcm", "e.png")


def write_damaged(folder, name):
    """Writes a disc in the format that the name says, and damages it."""
    pixels, path = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint16), folder / name
    if name.endswith(".ome.tif"):
        metadata = {"axes": "YX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}
        tifffile.imwrite(path, pixels, metadata=metadata, compression="zlib")
    elif name.endswith(".zarr"):
        ome_zarr = pytest.importorskip("ome_zarr")
        image = ome_zarr.OMEZarrImage(pixels, "yx", {"y": 1.0, "x": 1.0}, {"y": "micrometer", "x": "micrometer"})
        ome_zarr.OMEZarrMultiscale(image, [], method="nearest").to_ome_zarr(str(path), version="0.5")
        path = max(path.rglob("*"), key=lambda part: part.is_file() and part.stat().st_size)
    elif name.endswith(".nii.gz"):
        nibabel = pytest.importorskip("nibabel")
        image = nibabel.Nifti1Image(pixels, np.eye(4))
        image.header.set_xyzt_units("micron")
        nibabel.save(image, path)
    elif name.endswith(".dcm"):
        pydicom = pytest.importorskip("pydicom")
        shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm"), path)
    else:
        Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name):
    for folder in ("train/one", "train/two", "validation/one", "validation/two"):
        (tmp_path / folder).mkdir(parents=True)
    write_damaged(tmp_path / "train" / "one", name)
    config = Config(tmp_path / "run", data=str(tmp_path), spacing=[1.0, 1.0], batch_size=1, workers=0)
    with pytest.raises(ReadError, match=f"^{tmp_path / 'train' / 'one' / name}: "):
        trainer.train(config)


def test_a_damaged_file_is_named_by_a_worker(tmp_path):
    write_folder(tmp_path / "data", ".ome.tif")
    damaged = tmp_path / "data" / "train" / "small" / "3.ome.tif"
    damaged.write_bytes(damaged.read_bytes()[:300])
    config = {"data": str(tmp_path / "data"), "batch_size": 8, "workers": 1}
    with pytest.raises(ValueError, match=re.escape(str(damaged))):
        trainer.train(Config(tmp_path / "run", **config))


@pytest.mark.slow
def test_what_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    write_folder(tmp_path / "data", ".ome.tif")
    options = {"data": str(tmp_path / "data"), "batch_size": 4, "spacing": [1.0, 1.0], "epochs": 1}
    trainer.train(Config(tmp_path / "clean", **options))
    for name in DAMAGED[:3]:
        write_damaged(tmp_path / "data" / "train" / "large", name)
    for name in DAMAGED[3:]:
        write_damaged(tmp_path / "data" / "validation" / "small", name)
    for workers in (0, 2):
        config = Config(tmp_path / f"{workers}", skip_unreadable=True, workers=workers, **options)
        with pytest.warns(UserWarning, match="cannot be read and are left out:\n") as warned:
            trainer.train(config)
        said = next(str(w.message) for w in warned if "left out" in str(w.message))
        assert [Path(line.split(": ")[0]).name for line in said.splitlines()[1:]] == list(DAMAGED)
        assert losses(config.output) == pytest.approx(losses(tmp_path / "clean"), abs=1e-6)
    for name in DAMAGED[:3]:  # can be read now, which must not change the order of a training that goes on
        shutil.rmtree(path) if (path := tmp_path / "data" / "train" / "large" / name).is_dir() else path.unlink()
    shutil.copy(
        tmp_path / "data" / "train" / "large" / "0.ome.tif", tmp_path / "data" / "train" / "large" / "a.ome.tif"
    )
    monkeypatch.setattr(data, "_try_all", lambda *args: pytest.fail("what is left out was decided"))
    with pytest.warns(UserWarning, match=r"a\.ome\.tif"):
        training, validation, _ = data.open_data(config)
    assert len(training) == len(validation) == 8


def test_pictures_need_a_spacing(tmp_path):
    write_folder(tmp_path / "data", ".png")
    config = {"data": str(tmp_path / "data"), "batch_size": 8, "quick": True, "workers": 0}
    with pytest.raises(ValueError, match=r"\.png: does not say how large a pixel is: give --spacing"):
        trainer.train(Config(tmp_path / "a", **config))
    trainer.train(Config(tmp_path / "b", spacing=[0.5, 0.5], precision="bf16", compile=False, **config))


def test_folders_that_are_images(tmp_path, monkeypatch):
    (tmp_path / "one" / "a.zarr").mkdir(parents=True)
    (tmp_path / "two" / "series").mkdir(parents=True)
    (tmp_path / "two" / ".hidden").touch()
    monkeypatch.setattr(data, "read", lambda path, unit, assumed_unit: rat_data.Scan(torch.zeros(1, 4, 4), (2.0, 3.0)))
    folder = data.Folder(tmp_path, Config(tmp_path / "out", assumed_unit="mm"))
    assert [Path(path).name for path, _ in folder.samples] == ["a.zarr", "series"]
    assert folder[1].spacing.tolist() == [2.0, 3.0]
    assert folder[1].target == 1
    (tmp_path / "two" / "notes.tif").touch()
    with pytest.raises(ValueError, match=r"notes\.tif: is no image of a format that is read"):
        data.Folder(tmp_path, Config(tmp_path / "out"))


@pytest.mark.parametrize(
    ("mode", "channels", "full"), [("P", 3, 255), ("RGBA", 3, 255), ("1", 1, 255), ("I;16", 1, 65535)]
)
def test_pictures_of_all_kinds(tmp_path, mode, channels, full):
    white = Image.fromarray(np.full((4, 6), 65535, np.uint16)) if mode == "I;16" else Image.new("RGB", (6, 4), "white")
    (white if mode == "I;16" else white.convert(mode)).save(tmp_path / "a.png")
    picture = data.read_picture(str(tmp_path / "a.png"))
    assert picture.shape == (channels, 4, 6)
    assert picture.to(torch.int64).unique().tolist() == [full]


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    model = timm.create_model("test_rat", in_chans=channels)
    sample = rat_data.Sample(torch.full((channels, 8, 8), 255, dtype=torch.uint8), torch.ones(2))
    augmented = data.Augmented([sample], lambda sample: sample, model, Config(Path()))
    mean, std = (sum(model.pretrained_cfg[name]) / 3 for name in ("mean", "std"))
    torch.testing.assert_close(augmented[0].image, torch.full((channels, 8, 8), (1 - mean) / std))


@pytest.mark.slow
def test_volumes(tmp_path):
    config = Config(tmp_path, model="test_rat_3d", quick=True, workers=0, flip=True, intensity="sample")
    trainer.train(config)
    assert len(losses(tmp_path)) == 4
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert model.spatial_dims == 3


@pytest.mark.parametrize("model", ["test_rat", slow("test_rat_3d")])
def test_pixel_sizes_vary_and_the_model_knows_them(tmp_path, model):
    """Crops of a field of view of 32 units keep at least 0.81 of it in training; validation sees all of it."""
    size = [16, 16] if model == "test_rat" else [4, 16, 16]
    config = Config(tmp_path, model=model, size=size, scale=(0.81, 1.0), factors=(0.8, 2.0), quick=True, workers=0)
    trainer.train(config)
    known = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).spacing_range
    for low, high in known[-2:]:  # of pixels of 2 units
        assert 1.2 < low < 1.8  # factors of 32 samples in two epochs come close to the least and the largest
        assert 3.2 < high <= 4.4
    assert trainer.train(config) > 0  # of a run that is done, which goes on with what it has seen
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert again.spacing_range == known


def test_pixel_sizes_of_several_processes_count(tmp_path, monkeypatch):
    seen = spacings.Spacings(tmp_path / "a.json", again=False)
    assert seen.range() is None
    for rows in ([[1.0, 2.0], [0.5, 2.5]], [[0.75, 3.0]]):
        batch = rat_data.Batch(torch.zeros(len(rows), 1, 4, 4), torch.tensor(rows), None, None)
        assert list(seen.watch([batch])) == [batch]
    monkeypatch.setattr(spacings, "gather", lambda own: [own, [[0.25, 0.5], [2.0, 2.0]], []])
    seen.save()
    assert seen.range() == spacings.Spacings(tmp_path / "a.json", again=True).range() == [[0.25, 1.0], [2.0, 3.0]]
    assert spacings.Spacings(tmp_path / "a.json", again=False).range() is None


def test_a_run_goes_on_with_the_same_config_only(tmp_path):
    shape = {"model_args": {"stem_stride": (1, 4, 4)}, "size": (8, 32, 32)}
    remember(Config(tmp_path, lr=1e-3, **shape), write=False)
    assert not list(tmp_path.iterdir())
    remember(Config(tmp_path, lr=1e-3, **shape), write=True)
    remember(Config(tmp_path, lr=1e-3, epochs=20, workers=0, **shape), write=True)
    other = Config(tmp_path, lr=1e-4, model="rat_tiny", **shape)
    remember(other, write=False)  # the first run has trained nothing that would be lost
    (tmp_path / "checkpoints" / "00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"lr, model must be as in .*config\.yaml, or output another folder"):
        remember(other, write=False)


def test_a_model_of_the_hub_says_its_axes(tmp_path, monkeypatch):
    asked = []
    described = {}, "test_rat", {"spatial_dims": 3}
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda name: asked.append(name) or described)
    assert axes_of(Config(tmp_path, model="hf-hub:me/nuclei")) == 3
    assert asked == ["me/nuclei"]


def test_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at most the 32 samples, got 64"):
        trainer.train(Config(tmp_path, batch_size=64, quick=True))
    with pytest.raises(ValueError, match="pretrained must be false for rat_tiny, of which there are no weights"):
        trainer.train(Config(tmp_path, model="rat_tiny", quick=True))
    pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match="parallel must be ddp or fsdp without torchrun, got deepspeed2"):
        trainer.train(Config(tmp_path, parallel="deepspeed2", quick=True))


def test_a_folder_of_another_layout_is_an_error(tmp_path):
    (tmp_path / "cells" / "train" / "a").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data: .*cells must have the folders train and validation"):
        data.open_data(Config(tmp_path / "run", data=str(tmp_path / "cells")))
