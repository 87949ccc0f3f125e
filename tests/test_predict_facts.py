"""What a trained model's folder says is used where a user does not say it."""

import json
import warnings

import numpy as np
import pytest
from test_predict_receptive import segmenter

from helpers import write_ome_zarr
from rat_timm.monai import export_bundle
from rat_timm.predict import Options, predict
from rat_timm.predict.facts import FACTS, as_trained

pytest.importorskip("zarr")


def say(folder, **facts):
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text("{}")
    (folder / FACTS).write_text(json.dumps({"length": 8.0, "classes": 2, **facts}))
    return folder


def test_what_is_open_is_filled_in_and_nothing_else(tmp_path):
    folder = say(tmp_path, intensities=[100, 4000])
    assert as_trained(Options(), folder) == Options(intensities=(100.0, 4000.0))
    assert as_trained(Options(intensities=(0, 1)), folder) == Options(intensities=(0, 1))
    filled = as_trained(Options(task="instances"), folder)
    assert (filled.scale, filled.intensities) == (8.0, (100.0, 4000.0))
    assert as_trained(Options(task="instances", scale=5.0), folder).scale == 5.0


def test_without_facts_pixels_are_as_they_are_and_instances_need_a_scale(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for model in (tmp_path, segmenter(), "test_rat"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert as_trained(Options(), model) == Options()
        with pytest.raises(ValueError, match=r"scale must be the length with which .* was trained, got None"):
            as_trained(Options(task="instances"), model)


@pytest.mark.parametrize("facts", [{"intensities": None}, {}])
def test_intensities_of_each_image_are_not_guessed(tmp_path, facts):
    with pytest.warns(UserWarning, match="intensities were each image's own in training"):
        assert as_trained(Options(), say(tmp_path, **facts)).intensities is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_trained(Options(intensities=(0, 255)), tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"length": "long"}', '{"length": 8, "intensities": [1]}'])
def test_damaged_facts_are_an_error(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / FACTS).write_text(text)
    with pytest.raises(ValueError, match=r"facts\.json must say length and intensities"):
        as_trained(Options(), tmp_path)


def test_a_folder_without_a_model_is_said_to_be_one(tmp_path):
    """Before anybody asks for the scale that the folder of the model says."""
    (tmp_path / "model").mkdir()
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match=f"model: no folder with a config.json, .*: {folder}: "):
            as_trained(Options(task="instances"), folder)
    say(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=f"there is one in {tmp_path / 'model'}"):
        as_trained(Options(task="instances"), tmp_path)


def test_a_model_for_instances_has_no_classes(tmp_path):
    folder = say(tmp_path, intensities=[0, 1], task="instances")
    with pytest.warns(UserWarning, match="model was trained for instances: ask for task instances"):
        as_trained(Options(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_trained(Options(task="instances"), folder)


@pytest.mark.parametrize(("values", "warned"), [((94.0, 5000.0), True), ((0.0, 1.0), False), ((-2.0, 6.0), False)])
def test_pixels_on_another_scale_than_in_training_are_a_warning(tmp_path, values, warned):
    pixels = np.random.default_rng(0).uniform(*values, (40, 52)).astype(np.float32)
    image = write_ome_zarr(tmp_path / "image.ome.zarr", pixels, (0.5, 0.5))
    segmenter(depths=(1, 1)).float().save(tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(
            image, tmp_path / "model", tmp_path / "out.ome.zarr", intensities=(0.4, 0.7), progress=False, device="cpu"
        )
    assert any("far from the intensities 0.4 and 0.7" in str(one.message) for one in caught) == warned


def test_a_folder_is_predicted_as_it_was_trained(tmp_path):
    pixels = np.random.default_rng(0).normal(2000, 900, (40, 52)).astype(np.float32)
    image = write_ome_zarr(tmp_path / "image.ome.zarr", pixels, (0.5, 0.5))
    segmenter(depths=(1, 1)).float().save(tmp_path / "model")
    options = {"task": "probabilities", "progress": False, "device": "cpu"}

    def probabilities(name, **more):
        return predict(image, tmp_path / "model", tmp_path / name, **options, **more).output.read_bytes()

    plain, told = probabilities("plain.nii"), probabilities("told.nii", intensities=(100, 4000))
    say(tmp_path / "model", intensities=[100, 4000])
    assert probabilities("open.nii") == told != plain
    assert probabilities("identity.nii", intensities=(0, 1)) == plain


def test_a_bundle_scales_as_training_did(tmp_path):
    segmenter("test_rat_3d", depths=(1, 1)).float().save(tmp_path / "model")
    say(tmp_path / "model", intensities=[-1000, 400])
    bundle = export_bundle(tmp_path / "model", tmp_path / "bundle", unit="mm")
    transforms = json.loads((bundle / "configs/inference.json").read_text())["preprocessing"]["transforms"]
    (scaling,) = [one for one in transforms if one["_target_"] == "ScaleIntensityRanged"]
    assert (scaling["a_min"], scaling["a_max"]) == (-1000.0, 400.0)
