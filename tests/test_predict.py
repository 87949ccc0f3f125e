"""Prediction from a file to a file: against the model on the whole image, in one call."""

import argparse
import errno
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_predict_receptive import segmenter

from helpers import write_ome_zarr
from rat_timm import data
from rat_timm.__main__ import parse
from rat_timm.dense.instances import instances
from rat_timm.predict import command, predict
from rat_timm.predict.network import Network
from rat_timm.predict.store import Store

zarr = pytest.importorskip("zarr")
GLOBAL = {"attn_kernel_size": (3, 0)}
QUIET = {"progress": False, "dtype": "float64"}


def stored(output):
    return zarr.open_array(str(output / "0"), mode="r")[:]


def levels(pixels, spacing, factors=(1,)):
    """Levels of an image in memory, as it is."""
    made = data.levels_of(pixels, spacing, factors)
    return [data.Level(made[0].grid, lambda region: pixels[(slice(None), *region)]), *made[1:]]


def probabilities(model, x, **told):
    with torch.no_grad():
        return model(x[None], **told).softmax(dim=1)[0].numpy()


@pytest.fixture
def tiff(tmp_path):
    """An OME-TIFF of one channel, 0.5 um."""
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 110)).astype(np.uint8)
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "image.ome.tif", pixels, metadata={"axes": "YX", **sizes})
    return tmp_path / "image.ome.tif"


@pytest.fixture
def saved(tmp_path):
    model = segmenter().float()
    model.save(tmp_path / "model")
    return tmp_path / "model"


MODELS = {}


def one_of(axes, decoder, physical):
    """A model of the kind; made once."""
    key = axes, decoder, physical
    if key not in MODELS:
        options = {"stem_stride": 2, "physical_stem": physical, "depths": (1, 1)}
        MODELS[key] = segmenter("test_rat" if axes == 2 else "test_rat_3d", decoder=decoder, **options)
    return MODELS[key]


@settings(max_examples=12)
@given(st.data())
def test_tiles_give_what_the_whole_gives(tmp_path_factory, data):
    axes = data.draw(st.sampled_from([2, 3]))
    model = one_of(axes, data.draw(st.sampled_from(["groups", "fpn"])), data.draw(st.booleans()))
    most = 70 if axes == 2 else 30
    size = data.draw(st.tuples(*[st.integers(most // 3, most)] * axes))
    spacing = data.draw(st.tuples(*[st.sampled_from([0.6, 1.0, 1.3])] * axes))
    tile = tuple(data.draw(st.floats(n * s / 3, n * s)) for n, s in zip(size, spacing, strict=True))
    x, background, mask = torch.randn(1, *size, dtype=torch.float64), None, None
    if data.draw(st.booleans()):
        mask = torch.rand(1, *size) > 0.4
        x[~mask] = float("nan")
        background = levels(mask.float(), spacing)[0]
    output = tmp_path_factory.mktemp("out") / "out.ome.zarr"
    options = {"tile": tile, "batch_size": data.draw(st.integers(1, 3)), "background": background}
    done = predict(levels(x, spacing), model, output, task="probabilities", **options, **QUIET)
    assert done.difference is None
    expected = probabilities(model, x, spacing=spacing, mask=mask)
    expected = expected if mask is None else np.where(mask.numpy(), expected, 0.0)
    np.testing.assert_allclose(stored(output), expected, atol=1e-5)


def test_a_halo_that_is_too_short_does_not_give_the_whole_and_says_so(tmp_path):
    model, x = segmenter(), torch.randn(1, 120, 120, dtype=torch.float64)
    options = {"tile": 30.0, "halo": 4.0, "task": "probabilities"}
    done = predict(levels(x, (1.0, 1.0)), model, tmp_path / "out.ome.zarr", **options, **QUIET)
    gap = np.abs(stored(tmp_path / "out.ome.zarr") - probabilities(model, x, spacing=1.0))
    assert gap.max() > 1e-3
    assert np.quantile(gap, 0.999) <= done.difference.usual


def test_a_model_that_sees_everything_stays_within_what_is_said(tmp_path, capsys):
    model, x = segmenter(**GLOBAL), torch.randn(1, 150, 130, dtype=torch.float64)
    image = levels(x, (1.0, 1.0), (1, 2))
    options = {"tile": 32.0, "halo": 24.0, "task": "probabilities", **QUIET, "progress": True}
    done = predict(image, model, tmp_path / "out.ome.zarr", **options)
    gap = np.abs(stored(tmp_path / "out.ome.zarr") - probabilities(model, x, spacing=1.0))
    assert 0 < np.quantile(gap, 0.999) <= done.difference.usual
    said = capsys.readouterr().err
    assert "not equal to the whole image" in said
    assert "blocks of stage 2 attend to all tokens" in said
    assert f"by less than {done.difference.usual:.2g}" in said
    assert "peak memory of a process" in said


def test_a_region_is_that_part_of_the_whole_at_its_place(tmp_path):
    model, x = segmenter(), torch.randn(1, 60, 50, dtype=torch.float64)
    region = [slice(10, 45), slice(5, None)]
    options = {"region": region, "tile": 16.0, "task": "probabilities"}
    predict(levels(x, (0.8, 1.2)), model, tmp_path / "out.ome.zarr", **options, **QUIET)
    expected = probabilities(model, x, spacing=(0.8, 1.2))[(slice(None), *region)]
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), expected, atol=1e-5)
    (grid,) = data.read_grids(tmp_path / "out.ome.zarr")[:1]
    np.testing.assert_allclose(grid.origin[0], [10.5 * 0.8, 5.5 * 1.2])


def test_the_output_may_have_another_pixel_size(tmp_path):
    model, x = segmenter(), torch.randn(1, 60, 50, dtype=torch.float64)
    options = {"out": (1.5, 0.7), "tile": 21.0, "task": "probabilities"}
    predict(levels(x, (1.0, 1.0)), model, tmp_path / "out.ome.zarr", **options, **QUIET)
    expected = probabilities(model, x, spacing=1.0, out=(1.5, 0.7))
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), expected, atol=1e-5)


@pytest.mark.parametrize("stage", [0, -1])
def test_features_of_a_backbone_lie_on_its_map(tmp_path, stage):
    backbone, x = segmenter(stem_stride=2).backbone, torch.randn(1, 64, 52, dtype=torch.float64)
    predict(
        levels(x, (1.2, 1.0)), backbone, tmp_path / "out.ome.zarr", task="features", stage=stage, tile=20.0, **QUIET
    )
    with torch.no_grad():
        (whole,) = backbone.forward_intermediates(
            x[None], [stage % 2], norm=True, intermediates_only=True, spacing=(1.2, 1.0)
        )
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), whole[0], atol=1e-5)
    grid = data.read_grids(tmp_path / "out.ome.zarr")[0]
    assert grid.spacing.tolist() == [[2.0, 2.0] if stage == 0 else [4.0, 4.0]]


def test_further_levels_are_seen_around_each_window(tmp_path, monkeypatch):
    seen = []
    call = Network.__call__

    def record(network, images, grids, masks):
        seen.append([(grid[0].shape, *grid[0].corners()) for grid in grids])
        return call(network, images, grids, masks)

    monkeypatch.setattr(Network, "__call__", record)
    image = levels(torch.randn(1, 128, 128, dtype=torch.float64), (1.0, 1.0), (1, 4))
    options = {"levels": (4.0, "overview"), "tile": 64.0, "halo": 8.0}
    predict(image, segmenter(**GLOBAL), tmp_path / "out.ome.zarr", **options, **QUIET)
    for window, around, field in (call for call in seen if len(call) == 3):
        assert around[0] == window[0]
        middles = [(low + high) / 2 for _, low, high in (window, around)]
        assert bool(((middles[0] - middles[1]).abs() <= 2.0).all())  # half of a pixel of 4
        assert (field[1] == 0).all()
        torch.testing.assert_close(field[2], torch.full_like(field[2], 128.0))
    assert len(seen) > 4


def test_windows_without_data_are_not_computed(tmp_path, monkeypatch):
    calls = []
    call = Network.__call__
    monkeypatch.setattr(Network, "__call__", lambda net, *given: calls.append(given[1][0]) or call(net, *given))
    x = torch.zeros(1, 96, 96, dtype=torch.float64)
    x[:, 40:50, 70:80] = 1.0
    options = {"background": 0.5, "tile": 32.0, "task": "probabilities"}
    predict(levels(x, (1.0, 1.0)), segmenter(), tmp_path / "out.ome.zarr", **options, **QUIET)
    assert len(calls) == 1  # of the tile with data
    result = stored(tmp_path / "out.ome.zarr")
    assert (result[:, 32:64, 64:] > 0).all()
    assert (result[:, :32] == 0).all()


def cut(monkeypatch, after, how):
    """Lets a run end when it has written so many tiles."""
    write, count = Store.write, [0]

    def stop(store, level, box, values):
        count[0] += 1
        if count[0] > after:
            how()
        return write(store, level, box, values)

    monkeypatch.setattr(Store, "write", stop)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, after):
    image = levels(torch.randn(1, 90, 90, dtype=torch.float64), (1.0, 1.0))
    arguments = image, segmenter(), tmp_path / "out.ome.zarr"
    child = os.fork()
    if child == 0:
        cut(monkeypatch, after, lambda: os._exit(9))
        predict(*arguments, tile=30.0, **QUIET)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if after < 9 else 0)
    if after == 9:
        return
    assert not arguments[2].exists()
    calls = []
    see = Network.__call__
    monkeypatch.setattr(Network, "__call__", lambda net, *given: calls.append(1) or see(net, *given))
    done = predict(*arguments, tile=30.0, **QUIET)
    assert done.computed <= done.pixels - max(0, after - 1) * 900  # one may be written behind
    assert len(calls) <= 9 - max(0, after - 1)
    shutil.move(arguments[2], tmp_path / "resumed")
    predict(*arguments, tile=30.0, **QUIET)
    assert files(tmp_path / "resumed") == files(arguments[2])


def test_another_model_image_or_argument_does_not_go_on(tmp_path, monkeypatch):
    x, model = torch.randn(1, 60, 60, dtype=torch.float64), segmenter()
    output = tmp_path / "out.ome.zarr"

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        cut(patch, 2, fail)
        with pytest.raises(OSError, match="No space left"):
            predict(levels(x, (1.0, 1.0)), model, output, tile=20.0, **QUIET)
    for change, image, other in (
        ("model", x, segmenter()),
        ("image", x + 1, model),
        ("tile", x, model),
    ):
        tile = 30.0 if change == "tile" else 20.0
        with pytest.raises(ValueError, match=f"has an unfinished run with other {change}: "):
            predict(levels(image, (1.0, 1.0)), other, output, tile=tile, **QUIET)
    done = predict(levels(x, (1.0, 1.0)), model, output, tile=30.0, resume=False, **QUIET)
    assert done.computed == done.pixels
    assert not (tmp_path / "out.ome.zarr.partial").exists()


def blobs(size, count):
    """Logits of a network for instances that sees round objects, of which some touch: ``[2, *size]``."""
    rng = np.random.default_rng(0)
    centres, radii = rng.uniform(0, size, (count, len(size))), rng.uniform(3, 7, count)
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)
    depth = max_ = np.full(size, -9.0)
    for centre, radius in zip(centres, radii, strict=True):
        max_ = np.maximum(max_, radius - np.linalg.norm(places - centre, axis=-1))
    depth = max_
    return torch.from_numpy(np.stack([5 * depth, np.arctanh(np.clip(depth / 8, 0, 0.99))])).double()


@pytest.mark.parametrize(("size", "count"), [((120, 90), 60), ((30, 44, 50), 40)])
def test_objects_across_tiles_are_those_of_the_whole(tmp_path, monkeypatch, size, count):
    logits = blobs(size, count)
    monkeypatch.setattr(Network, "__call__", lambda net, images, *_: (images[0].movedim(1, -1), None))
    model = segmenter("test_rat" if len(size) == 2 else "test_rat_3d", in_chans=2)
    spacing = (1.0,) * len(size)
    options = {"task": "instances", "scale": 8.0, "tile": 25.0, "largest": 20.0}
    predict(levels(logits, spacing), model, tmp_path / "out.ome.zarr", **options, **QUIET)
    found = stored(tmp_path / "out.ome.zarr")
    expected = instances(logits[None], spacing, scale=8.0)[0].numpy()
    pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
    assert pairs.shape[1] == expected.max() + 1 > 20  # each number of one is a number of the other
    assert set(pairs[0]) == set(range(expected.max() + 1))


@pytest.mark.parametrize("ending", [".ome.tif", ".nii.gz", ".nii", ".ome.zarr"])
@pytest.mark.parametrize("task", ["labels", "probabilities"])
def test_all_formats_are_read_again(tmp_path, ending, task):
    model = segmenter("test_rat_3d", depths=(1, 1))
    x = torch.randn(1, 9, 20, 26, dtype=torch.float64)
    output = tmp_path / f"out{ending}"
    predict(levels(x, (2.0, 0.5, 0.5)), model, output, task=task, **QUIET)
    scan = data.read(output, unit="um")
    assert scan.spacing == pytest.approx((2.0, 0.5, 0.5))
    expected = probabilities(model, x, spacing=(2.0, 0.5, 0.5))
    expected = expected if task == "probabilities" else expected.argmax(axis=0)[None]
    np.testing.assert_allclose(scan.pixels.numpy(), expected, atol=1e-5)


def test_a_nifti_stays_where_it_is_in_the_scanner(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -3], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(22, 18, 9)).astype(np.float32), affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(tmp_path / "image.nii")
    model = segmenter("test_rat_3d", depths=(1, 1), spacing=(3.0, 2.0, 1.5))
    options = {"unit": "mm", "region": [slice(2, 8), slice(0, 18), slice(5, 20)]}
    predict(tmp_path / "image.nii", model, tmp_path / "out.nii", **options, **QUIET)
    out = nibabel.load(tmp_path / "out.nii")
    assert out.shape == (15, 18, 6)
    np.testing.assert_allclose(out.affine @ [0, 0, 0, 1], affine @ [5, 0, 2, 1], atol=1e-5)
    np.testing.assert_allclose(out.affine @ [14, 17, 5, 1], affine @ [19, 17, 7, 1], atol=1e-5)


def test_the_reader_that_napari_uses_finds_labels_with_their_scale(tmp_path):
    reader, location = pytest.importorskip("ome_zarr.reader"), pytest.importorskip("ome_zarr.io")
    x = torch.randn(1, 300, 280, dtype=torch.float64)
    predict(levels(x, (0.5, 0.25)), segmenter(depths=(1, 1)), tmp_path / "out.ome.zarr", **QUIET)
    (node,) = reader.Reader(location.parse_url(tmp_path / "out.ome.zarr"))()
    assert any(isinstance(spec, reader.Label) for spec in node.specs)
    assert [level.shape for level in node.data] == [(300, 280), (300, 140), (150, 70)][: len(node.data)]
    transforms = node.metadata["coordinateTransformations"]
    assert transforms[0] == [
        {"type": "scale", "scale": [0.5, 0.25]},
        {"type": "translation", "translation": [0.25, 0.125]},
    ]
    assert np.array_equal(np.asarray(node.data[0]), stored(tmp_path / "out.ome.zarr"))


def call(*arguments):
    command.run(parse(["predict", *map(str, arguments)]))


def test_the_command_goes_from_a_file_to_a_file(tmp_path, tiff, saved, capsys):
    output, picture = tmp_path / "out.ome.tif", tmp_path / "look.png"
    options = ["--intensities", 0, 255, "--tile", 20, "--preview", picture, "--batch-size", 2]
    call(tiff, "--model", saved, "--output", output, *options)
    said = capsys.readouterr()
    assert "equal to the whole image" in said.err
    assert "px/s" in said.err
    assert said.out.startswith(f"{output}: 9900 pixels in")
    from rat_timm.dense import Segmenter

    x = data.read(tiff).pixels.float() / 255
    with torch.no_grad():
        expected = Segmenter.load(saved)(x[None], spacing=0.5).argmax(dim=1)
    assert float((data.read(output).pixels != expected).float().mean()) < 1e-3
    assert Image.open(picture).size == (110, 90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{out}.png"], "output must end in one of"),
        (["--output", "{tiff}"], "exists: delete it or give another name"),
        (["--output", "{out}/none/out.nii"], "must be there"),
        (["--output", "{out}.nii", "--model", "nowhere"], "no folder with a config.json, hf-hub: name or registered"),
        (["--output", "{out}.nii", "--region", "0:90,50:111"], "region must be one slice of pixels per axis within"),
        (["--output", "{out}.nii", "--level", "1"], "level must be from 0 to 0, got 1"),
        (["--output", "{out}.nii", "--task", "instances"], "scale must be the length"),
        (["--output", "{out}.nii", "--tile", "0"], "tile must be a positive length"),
        (["--output", "{out}.nii", "--unit", "hours"], "unit must be a length"),
        (["--output", "{out}.nii", "--spacing", "1", "2", "3"], "spacing must"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, tiff, saved, arguments, message):
    words = [word.format(out=tmp_path / "out", tiff=tiff) for word in arguments]
    model = [] if "--model" in words else ["--model", str(saved)]
    with pytest.raises(SystemExit, match=message) as error:
        call(tiff, *model, *words)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("rat_timm predict: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_chans": 3}, "image must have 3 channels, as the model has, got 1"),
        ({"name": "test_rat_3d"}, "image must have 3 spatial axes, as the model has, got 2"),
    ],
)
def test_a_model_that_does_not_go_with_the_image_is_one_line(tmp_path, tiff, change, message):
    segmenter(**change).float().save(tmp_path / "other")
    with pytest.raises(SystemExit, match=message):
        call(tiff, "--model", tmp_path / "other", "--output", tmp_path / "out.nii")


def test_an_image_without_a_pixel_size_is_one_line_and_takes_a_spacing(tmp_path, saved):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "image.ome.tif", np.zeros((40, 40), np.uint8), metadata={"axes": "YX"})
    with pytest.raises(SystemExit, match="no pixel size along y"):
        call(tmp_path / "image.ome.tif", "--model", saved, "--output", tmp_path / "out.ome.tif")
    call(tmp_path / "image.ome.tif", "--model", saved, "--output", tmp_path / "out.ome.tif", "--spacing", 0.7)
    assert data.read(tmp_path / "out.ome.tif").spacing == pytest.approx((0.7, 0.7))


def test_an_unreadable_chunk_is_one_line_and_what_was_done_stays(tmp_path, saved):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80)).astype(np.uint8)
    image = write_ome_zarr(tmp_path / "image.ome.zarr", pixels, (1.0, 1.0))
    (chunk,) = image.glob("0/c/0/4")
    good = chunk.read_bytes()
    chunk.write_bytes(b"no chunk")
    arguments = [image, "--model", saved, "--output", tmp_path / "out.ome.zarr", "--tile", 16, "--quiet"]
    with pytest.raises(SystemExit, match=r"image.ome.zarr: cannot be read: .*the same command goes on"):
        call(*arguments)
    left = sorted(path.name for path in (tmp_path / "out.ome.zarr.partial" / ".predict" / "done").iterdir())
    chunk.write_bytes(good)
    call(*arguments)
    assert stored(tmp_path / "out.ome.zarr").shape == (80, 80)
    assert len(left) < 25


@pytest.mark.parametrize("text", ["1:2:3,4", "a:b,1:2", "5"])
def test_regions_are_read_or_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        command._region(text)
    assert command._region("0:5,:7,2:") == [slice(0, 5), slice(None, 7), slice(2, None)]


def test_the_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "predict" in capsys.readouterr().out
    assert "predict" not in sys.modules
