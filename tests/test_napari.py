"""napari's layers in and out; with napari's own where it is installed, and what they are asked for where not."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_predict_receptive import segmenter

import rat_timm
from rat_timm.dense import Segmenter
from rat_timm.napari import predict_layers
from rat_timm.napari.layers import picture_of
from rat_timm.napari.widget import numbers, predict_widget

pytest.importorskip("zarr")
HAS_NAPARI = importlib.util.find_spec("napari") is not None
QUIET = {"dtype": "float64", "device": "cpu"}


@dataclass
class StandIn:
    """What a layer is asked for, in numpy alone."""

    data: Any
    name: str = "cells"
    rgb: bool = False
    multiscale: bool = False
    units: Any = None
    scale: Any = None
    translate: Any = None
    affine: Any = None
    shear: Any = None
    axis_labels: Any = None
    ndim: int = field(init=False)

    def __post_init__(self):
        self.ndim = (self.data[0] if self.multiscale else self.data).ndim - self.rgb
        self.units = self.units or ("pixel",) * self.ndim
        self.axis_labels = self.axis_labels or tuple(f"axis {i - self.ndim}" for i in range(self.ndim))

    def data_to_world(self, position):
        steps = np.eye(self.ndim)
        if self.shear is not None:
            steps[0, 1] = self.shear[0]
        steps = steps * (1 if self.scale is None else np.asarray(self.scale))
        place = steps @ np.asarray(position) + (0 if self.translate is None else np.asarray(self.translate))
        affine = np.eye(self.ndim + 1) if self.affine is None else np.asarray(self.affine)
        return tuple(affine[:-1, :-1] @ place + affine[:-1, -1])


def layer(data, **options):
    if not HAS_NAPARI:
        return StandIn(data, **options)
    from napari.layers import Image

    return Image(data, **{"name": "cells", **options})


def made(data, options, kind):
    """The layer that napari makes."""
    if not HAS_NAPARI:
        options = {key: value for key, value in options.items() if key in StandIn.__dataclass_fields__}
        return StandIn(data, **options)
    from napari.layers import Layer

    return Layer.create(data, options, kind)


def world(layer, *positions):
    return np.array([layer.data_to_world(position) for position in positions])


SIZES = {2: (37, 52), 3: (13, 22, 18)}
MODELS = {}


def model(axes, in_chans=1):
    if (axes, in_chans) not in MODELS:
        name = "test_rat" if axes == 2 else "test_rat_3d"
        options = {"stem_stride": 2, "depths": (1, 1), "in_chans": in_chans, "spacing": 0.5}
        MODELS[axes, in_chans] = segmenter(name, **options)
    return MODELS[axes, in_chans]


def image(axes, channels=1):
    return np.random.default_rng(0).normal(size=(channels, *SIZES[axes]))


def expected(axes, x, spacing, mask=None):
    """Classes of the whole image ``[channels, *size]``, by the model itself."""
    told = {"spacing": tuple(spacing), "mask": None if mask is None else torch.from_numpy(mask)[None]}
    with torch.no_grad():
        logits = model(axes, len(x))(torch.from_numpy(x)[None], **told)[0]
    return logits.argmax(0).numpy() if mask is None else logits.argmax(0).numpy() * mask


@pytest.mark.parametrize("axes", [2, 3])
def test_scale_and_units_are_the_spacing(axes):
    x, scale = image(axes), [900.0, 500.0, 400.0][-axes:]
    source = layer(x[0], scale=scale, translate=[7.0, 8.0, 9.0][-axes:], units=["nm"] * axes)
    ((labels, options, kind),) = predict_layers([source], model(axes), **QUIET)
    assert kind == "labels"
    assert options["name"] == "cells labels"
    np.testing.assert_array_equal(labels, expected(axes, x, np.array(scale) / 1000))
    assert 0 < labels.mean() < 1
    result = made(labels, options, kind)
    ends = [0] * axes, [n - 1 for n in labels.shape]
    np.testing.assert_allclose(world(result, *ends), world(source, *ends))
    assert [str(unit) for unit in result.units] == [str(unit) for unit in source.units]


@pytest.mark.parametrize("axes", [2, 3])
def test_what_has_other_pixels_covers_the_same_field(axes):
    """Where features and maps with ``out`` lie, told by their corners."""
    x = image(axes)
    source = layer(x[0], scale=[0.25] * axes, translate=[3.0] * axes)
    ((shares, options, kind),) = predict_layers(
        [source], model(axes), task="probabilities", out=0.5, spacing=1.0, **QUIET
    )
    assert kind == "image"
    np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)  # stored as float32
    assert shares.shape[1:] == tuple(2 * n for n in x[0].shape)  # told 1.0, so that 0.5 is half of a pixel
    result = made(shares, options, kind)
    corners = [[-0.5] * axes, [n - 0.5 for n in x[0].shape]]
    theirs = [[0, *[-0.5] * axes], [0, *(n - 0.5 for n in shares.shape[1:])]]
    np.testing.assert_allclose(world(result, *theirs)[:, 1:], world(source, *corners))


def test_a_backbones_features_lie_where_its_tokens_are():
    x = image(2)
    source = layer(x[0], scale=[0.5, 0.5], translate=[3.0, 4.0])
    ((features, options, kind),) = predict_layers([source], model(2).backbone, task="features", **QUIET)
    with torch.no_grad():
        whole = model(2).backbone.forward_intermediates(torch.from_numpy(x)[None], spacing=0.5, output_dict=True)
    grid = whole["grids"][-1]
    assert features.shape[1:] == grid.shape
    centres = grid.coordinates()[0].flatten(0, 1).numpy() - 0.25 + [3.0, 4.0]  # by default 0 is the image's corner
    indices = [(0, i, j) for i in range(grid.shape[0]) for j in range(grid.shape[1])]
    np.testing.assert_allclose(world(made(features, options, kind), *indices)[:, 1:], centres)


@pytest.mark.parametrize("axes", [2, 3])
def test_a_mask_of_another_pixel_size(axes):
    x = image(axes)
    source = layer(x[0], scale=[0.5] * axes, translate=[10.0] * axes)
    coarse = np.zeros([-(-n // 2) for n in x[0].shape], int)
    coarse[:, 3:] = 4
    mask = layer(coarse, scale=[1.0] * axes, translate=[10.25] * axes, name="tissue")
    valid = coarse.astype(bool)
    for axis, n in enumerate(x[0].shape):
        valid = np.take(valid.repeat(2, axis), range(n), axis)
    wanted = expected(axes, x, [0.5] * axes, valid)
    x[0][~valid] = np.nan
    ((labels, _, _),) = predict_layers([source], model(axes), mask=mask, **QUIET)
    np.testing.assert_array_equal(labels, wanted)


def test_channels_in_any_form():
    """RGB (and A), an axis in front of others, several layers, levels, and what is read lazily."""
    array = pytest.importorskip("dask.array")
    x = np.random.default_rng(0).random((3, *SIZES[2])).astype(np.float32)
    place = {"scale": (0.5, 0.5)}
    rgba = np.concatenate([x, np.ones_like(x[:1])]).transpose(1, 2, 0)
    series = np.stack([np.zeros_like(x), x])
    forms = {
        "rgb": ([layer(rgba[..., :3], rgb=True, **place)], None),
        "rgba": ([layer(rgba, rgb=True, **place)], None),
        "levels": ([layer([rgba, rgba[::2, ::2]], rgb=True, multiscale=True, **place)], None),
        "axis": ([layer(x, scale=(1, 0.5, 0.5))], None),
        "lazy": ([layer(array.from_array(x, chunks=(1, 20, 20)), scale=(1, 0.5, 0.5))], None),
        "layers": ([layer(channel, name=f"{i}", **place) for i, channel in enumerate(x)], None),
        "series": ([layer(series, scale=(2, 1, 0.5, 0.5))], [1, 0, 0, 0]),
    }
    wanted = expected(2, x.astype(float), (0.5, 0.5))
    assert 0 < wanted.mean() < 1
    for name, (layers, position) in forms.items():
        ((labels, options, kind),) = predict_layers(layers, model(2, 3), position=position, **QUIET)
        assert labels.ndim == layers[0].ndim, name
        np.testing.assert_array_equal(labels.reshape(wanted.shape), wanted, err_msg=name)
    result = made(labels, options, kind)
    np.testing.assert_allclose(world(result, [0, 0, 0, 0]), [[2, 1, 0, 0]])  # in time, and in the middle of channels
    np.testing.assert_allclose(world(result, [0, 0.5, 0, 0]), [[2, 2.5, 0, 0]])


def test_a_turned_image():
    x, turn = image(2), np.array([[0.0, -1.0, 5.0], [1.0, 0.0, 6.0], [0.0, 0.0, 1.0]])
    source = layer(x[0], scale=(0.5, 0.4), affine=turn)
    ((labels, options, kind),) = predict_layers([source], model(2), **QUIET)
    np.testing.assert_array_equal(labels, expected(2, x, (0.5, 0.4)))
    ends = [0, 0], [30, 0], [0, 40]
    np.testing.assert_allclose(world(made(labels, options, kind), *ends), world(source, *ends), atol=1e-12)
    ((shares, options, kind),) = predict_layers([source], model(2), task="probabilities", **QUIET)
    theirs = world(made(shares, options, kind), *([1, *end] for end in ends))
    np.testing.assert_allclose(theirs[:, 1:], world(source, *ends), atol=1e-12)


def test_instances_of_a_saved_model(tmp_path):
    pytest.importorskip("skimage")
    model(2).save(tmp_path / "model")
    x = image(2)
    source = layer(x[0].astype(np.float32), scale=(0.5, 0.5))
    options = {"task": "instances", "scale": 2.0, "threshold": 0.4, "device": "cpu"}
    ((labels, _, kind),) = predict_layers([source], tmp_path / "model", **options)
    assert kind == "labels"
    assert labels.dtype == np.int32
    assert labels.max() > 1


PLAIN = {"scale": (0.5, 0.5)}


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([], {}, "image must be a layer"),
        ([layer(np.zeros((9, 9)))], {}, "spacing must be given: layer 'cells' has scale 1"),
        ([layer(np.zeros((9, 9)), scale=(0.5, 0.5), shear=[0.3])], {}, "image must not be sheared"),
        ([layer(np.zeros((9, 9)), **PLAIN)], {"axes": 3}, "image must have 3 axes, as the model has, got 2"),
        ([layer(np.zeros((9, 9)), units=("um", "nm"))], {}, "image must have one unit"),
        ([layer(np.zeros((4, 9, 9)), scale=(1, 0.5, 0.5))], {}, "position must be an index for axis 0"),
        ([layer(np.zeros((4, 9, 9)), scale=(1, 0.5, 0.5))], {"position": (4, 0, 0)}, "position must lie in"),
        ([layer(np.zeros((3, 3, 9, 9)), scale=(1, 1, 0.5, 0.5))], {"channels": 3}, "channel_axis must be one of"),
        ([layer(np.zeros((3, 9, 9)))], {"channel_axis": 1}, "channel_axis must be in front"),
        ([layer(np.zeros((9, 9)), **PLAIN), layer(np.zeros((9, 8)), **PLAIN)], {"channels": 2}, "one shape, scale"),
        ([layer(np.zeros((9, 9)), **PLAIN), layer(np.zeros((9, 9)))], {"channels": 2}, "one shape, scale"),
        ([layer(np.zeros((9, 9)))], {"spacing": (1, 2, 3)}, "spacing"),
    ],
)
def test_errors_name_the_argument(layers, options, message):
    with pytest.raises(ValueError, match=message):
        picture_of(layers, **{"axes": 2, "channels": 1, **options})


def test_a_mask_that_is_turned_is_an_error():
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    with pytest.raises(ValueError, match="mask must be turned as the image is"):
        predict_layers([layer(np.zeros((9, 9)), **PLAIN)], model(2), mask=layer(np.ones((9, 9)), affine=turn))


def test_progress_is_told_and_ends_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source, told = layer(image(2)[0], **PLAIN), []
    predict_layers([source], model(2), tile=8.0, progress=lambda *counts: told.append(counts), **QUIET)
    assert len(told) > 2
    assert told[-1] == (37 * 52, 37 * 52)
    assert told == sorted(told)

    def stop(*_):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        predict_layers([source], model(2), tile=8.0, progress=stop, **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_form():
    assert numbers("", "spacing") is None
    assert numbers("2, 0.5 .5", "spacing") == (2, 0.5, 0.5)
    with pytest.raises(ValueError, match="spacing must be numbers"):
        numbers("half", "spacing")


def test_the_manifest_is_one():
    npe2 = pytest.importorskip("npe2")
    manifest = npe2.PluginManifest.from_file(MANIFEST)
    (widget,) = manifest.contributions.widgets
    manifest.validate_imports()
    assert manifest.name == "rat-timm"
    assert widget.display_name == "Predict"


# What follows is for Qt, without a screen: QT_QPA_PLATFORM=offscreen python -m pytest tests/test_napari.py
MANIFEST = Path(rat_timm.__file__).with_name("napari.yaml")


def test_napari_finds_the_form(request):
    """In napari's window, which is empty: layers are drawn with OpenGL, which is not there without a screen."""
    npe2 = pytest.importorskip("npe2")
    pytest.importorskip("pytestqt")
    viewer = request.getfixturevalue("make_napari_viewer")()
    manager = npe2.PluginManager.instance()
    if "rat-timm" not in manager:
        manager.register(npe2.PluginManifest.from_file(MANIFEST))
    _, form = viewer.window.add_plugin_dock_widget("rat-timm", "Predict")
    assert [form.image.value, form.mask.value, form.task.value] == [None, None, "labels"]


@pytest.fixture
def form(request, tmp_path, monkeypatch):
    """napari's viewer and the plugin's form, filled in for an image."""
    components = pytest.importorskip("napari.components")
    pytest.importorskip("pytestqt")
    request.getfixturevalue("qtbot")
    viewer = components.ViewerModel()
    monkeypatch.setattr("napari.current_viewer", lambda: viewer)
    viewer.add_image(image(2)[0].astype(np.float32), scale=(0.5, 0.5), translate=(3, 4), units="um", name="cells")
    form = predict_widget()
    form.image.choices = form.mask.choices = tuple(viewer.layers)
    form.mask.value = None
    model(2).save(tmp_path / "model")
    form.model.value = tmp_path / "model"
    return viewer, form


def test_the_form_adds_a_layer(form, qtbot):
    viewer, form = form
    form.tile.value = "8"
    worker = form()
    qtbot.waitUntil(lambda: len(viewer.layers) == 2, timeout=60_000)
    labels = viewer.layers["cells labels"]
    assert worker.pbar.n == worker.pbar.total == 100
    x = torch.from_numpy(image(2)).float()[None]
    with torch.no_grad():
        wanted = Segmenter.load(form.model.value)(x, spacing=0.5).argmax(dim=1)[0].numpy()
    assert (labels.data == wanted).mean() > 0.999
    np.testing.assert_allclose(labels.translate, (3, 4))
    np.testing.assert_allclose(labels.scale, (0.5, 0.5))


def test_errors_are_one_line_in_napari(form, qtbot):
    notifications = pytest.importorskip("napari.utils.notifications").notification_manager
    viewer, form = form
    form.task.value = "instances"
    notifications.records.clear()
    form()  # ends at once: nobody may wait for its signal
    qtbot.waitUntil(lambda: len(notifications.records) > 0, timeout=60_000)
    (record,) = notifications.records
    assert str(record.message).startswith("rat_timm: scale must be the length")
    assert "\n" not in record.message
    assert len(viewer.layers) == 1


def test_a_prediction_is_cancelled(form, qtbot, monkeypatch):
    viewer, form = form
    errors = []
    monkeypatch.setattr("rat_timm.napari.widget.report", errors.append)
    form.tile.value = "4"
    worker = form()
    form[-1].changed.emit(True)
    qtbot.waitUntil(lambda: len(errors) > 0, timeout=60_000)
    assert [type(error).__name__ for error in errors] == ["Cancelled"]
    assert worker.pbar.n == 0
    assert len(viewer.layers) == 1
