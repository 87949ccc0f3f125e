"""napari's reader: files to layers, with napari's own where it is installed."""

import numpy as np
import pytest
from test_napari import MANIFEST, model

from helpers import write_ome_zarr
from rat_timm import data
from rat_timm.data.errors import ReadError
from rat_timm.napari.reader import open_layers, reader_of
from rat_timm.predict import predict

tifffile = pytest.importorskip("tifffile")
nibabel = pytest.importorskip("nibabel")
pytest.importorskip("zarr")
pytest.importorskip("dask")

PIXELS = np.arange(2 * 3 * 8 * 9, dtype=np.uint16).reshape(2, 3, 8, 9)  # [channels, z, y, x]
SIZES = {"PhysicalSizeZ": 2.0, "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}
UNITS = {f"{name}Unit": "µm" for name in SIZES}


@pytest.fixture
def tiff(tmp_path):
    path = tmp_path / "cells.ome.tif"
    pixels = PIXELS.transpose(1, 0, 2, 3)
    tifffile.imwrite(path, pixels, metadata={"axes": "ZCYX", **SIZES, **UNITS}, photometric="minisblack")
    return str(path)


def test_channels_come_with_the_size_and_place_of_pixels(tiff):
    [(pixels, options, kind)] = reader_of(tiff)(tiff)
    np.testing.assert_array_equal(np.asarray(pixels), PIXELS)
    assert kind == "image"
    assert options == {
        "name": "cells",
        "scale": [2.0, 0.5, 0.25],
        "translate": [1.0, 0.25, 0.125],  # the middle of the first pixel, whose corner is at zero
        "units": ("um",) * 3,
        "axis_labels": ("z", "y", "x"),
        "multiscale": False,
        "channel_axis": 0,
    }


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_units_become_micrometres(tmp_path, ending):
    image = nibabel.Nifti1Image(PIXELS[0].T.astype(np.int16), np.diag([0.25, 0.5, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / f"scan{ending}")
    [(pixels, options, _)] = open_layers(str(tmp_path / f"scan{ending}"))
    np.testing.assert_allclose(options["scale"], [2000.0, 500.0, 250.0])
    assert pixels.shape == (1, 3, 8, 9)


def test_a_prediction_is_a_pyramid_of_labels_over_its_image(tmp_path):
    path, output = tmp_path / "field.ome.zarr", tmp_path / "labels.ome.zarr"
    write_ome_zarr(path, np.random.default_rng(0).normal(size=(200, 310)).astype(np.float32), (0.5, 0.5))
    predict(path, model(2), output, task="labels", progress=False)
    [(image, of_image, _)], [(labels, options, kind)] = open_layers(path), open_layers(output)
    assert kind == "labels"
    assert options["multiscale"]
    assert [level.shape for level in labels] == [grid.shape for grid in data.read_grids(output)]
    assert labels[0].shape == image.shape[1:]
    assert labels[0].dtype.kind in "iu"
    assert options["scale"] == of_image["scale"] == [0.5, 0.5]
    assert options["translate"] == of_image["translate"]


def test_what_is_not_ours_is_left_to_others(tmp_path, tiff):
    assert reader_of([tiff, tiff]) is None
    assert reader_of(str(tmp_path / "picture.png")) is None


def test_a_file_that_does_not_say_its_pixel_size(tmp_path):
    path = tmp_path / "plain.ome.tif"
    tifffile.imwrite(path, PIXELS[0], metadata={"axes": "ZYX"}, photometric="minisblack")
    with pytest.raises(ReadError, match=r"plain\.ome\.tif"):
        open_layers(str(path))


def test_napari_opens_files(tiff):
    components, npe2 = pytest.importorskip("napari.components"), pytest.importorskip("npe2")
    manager = npe2.PluginManager.instance()
    if "rat-timm" not in manager:
        manager.register(npe2.PluginManifest.from_file(MANIFEST))
    viewer = components.ViewerModel()
    first, second = viewer.open(tiff, plugin="rat-timm")
    np.testing.assert_allclose(first.scale, (2.0, 0.5, 0.25))
    assert [str(unit) for unit in second.units] == ["micrometer"] * 3
    np.testing.assert_array_equal(np.asarray(second.data), PIXELS[1])
