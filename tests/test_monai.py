"""MetaTensors in and out, encoders in MONAI's network, bundles that MONAI itself checks and runs."""

import json
import logging
import math
import sys

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, list_data_collate
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import FlexibleUNet

from helpers import lively
from rat_timm.__main__ import main
from rat_timm.adapters import WithGeometry, register_monai_encoder
from rat_timm.data import read
from rat_timm.dense import Segmenter
from rat_timm.evaluation import sliding_window
from rat_timm.monai import SpacingInferer, export_bundle, nifti_files
from rat_timm.predict import predict

SIZES = {2: (20, 28), 3: (8, 12, 20)}
SPACING = {2: (0.5, 1.5), 3: (2.0, 0.5, 0.8)}


def turned(spacing, signs=(1, 1, 1), angle=0.4):
    """The affine matrix of arrays whose axes are turned in the world and run the other way."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(np.array(signs) * (*spacing, *[1.0] * (3 - len(spacing))))
    affine[:3, 3] = (-3.0, 70.0, 12.0)
    return affine


def image(axes, spacing=None, **meta):
    affine = torch.from_numpy(turned(spacing or SPACING[axes], (-1, 1, -1)))
    return MetaTensor(torch.randn(1, *SIZES[axes]), affine=affine, meta={"unit": "mm", **meta})


def segmenter(axes):
    name = {2: "test_rat", 3: "test_rat_3d"}[axes]
    return lively(Segmenter(name, 2, in_chans=1, width=32)).eval()  # a norm of 2 channels would be all but a sign


@pytest.fixture(params=[2, 3])
def axes(request):
    return request.param


@torch.no_grad()
def test_spacing_is_that_of_the_arrays_axes_and_the_affine_matrix_stays(axes):
    network, x = segmenter(axes), image(axes)
    out = SpacingInferer(unit="mm")(x[None], network)
    expected = network(x.as_tensor()[None], spacing=SPACING[axes])
    assert isinstance(out, MetaTensor)
    assert torch.equal(out.affine, x.affine)
    torch.testing.assert_close(out.as_tensor(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_networks_of_arrays_zyx_get_them(axes):
    network, x = segmenter(axes), image(axes)
    out = SpacingInferer(reverse_axes=True)(x[None], network)
    there = x.as_tensor()[None].permute(0, 1, *range(axes + 1, 1, -1))
    back = network(there, spacing=SPACING[axes][::-1]).permute(0, 1, *range(axes + 1, 1, -1))
    torch.testing.assert_close(out.as_tensor(), back, rtol=1e-4, atol=1e-5)
    assert torch.equal(out.affine, x.affine)


@torch.no_grad()
def test_images_of_a_batch_have_their_own_spacing(axes):
    network, pair = segmenter(axes), [image(axes), image(axes, [1.0, 0.7, 0.9][:axes])]
    together = SpacingInferer()(list_data_collate(pair), network)
    for one, alone in zip(together, (SpacingInferer()(x[None], network)[0] for x in pair), strict=True):
        torch.testing.assert_close(one.as_tensor(), alone.as_tensor(), rtol=1e-4, atol=1e-5)
    assert torch.equal(together.affine, torch.stack([x.affine for x in pair]))


@torch.no_grad()
@pytest.mark.parametrize("reverse", [False, True])
def test_windows_have_the_spacing_of_their_image(axes, reverse):
    network, pair, window = segmenter(axes), [image(axes), image(axes, [1.0, 0.7, 0.9][:axes])], [8, 12, 8][:axes]
    out = SpacingInferer(roi_size=window, reverse_axes=reverse, overlap=0.5)(list_data_collate(pair), network)
    order = (0, 1, *(range(axes + 1, 1, -1) if reverse else range(2, axes + 2)))
    for one, x in zip(out, pair, strict=True):
        spacing, roi = [x.affine[:3, i].norm() for i in range(axes)], window
        if reverse:
            spacing, roi = spacing[::-1], roi[::-1]
        alone = sliding_window(network, x.as_tensor()[None].permute(order), roi, spacing=spacing, overlap=0.5)
        torch.testing.assert_close(one.as_tensor()[None], alone.permute(order), rtol=1e-4, atol=1e-5)


def test_what_is_not_a_map_of_the_pixels_comes_as_it_is():
    made = SpacingInferer()(image(2)[None], lambda x, spacing: spacing)
    assert type(made) is torch.Tensor
    torch.testing.assert_close(made, torch.tensor([SPACING[2]]))


def test_several_maps_come_back_in_the_images_order():
    x = image(3)
    out = SpacingInferer(reverse_axes=True)(
        x[None], lambda x, spacing: {"maps": (x, x[..., ::2]), "class": x[:, :, 0, 0, 0]}
    )
    assert torch.equal(out["maps"][0].as_tensor(), x.as_tensor()[None])
    assert torch.equal(out["maps"][0].affine, x.affine)
    assert torch.equal(out["maps"][1], x.as_tensor()[None, :, ::2])
    assert type(out["maps"][1]) is type(out["class"]) is torch.Tensor
    assert out["class"].shape == (1, 1)


def test_images_without_spacing_or_unit_are_an_error():
    with pytest.raises(ValueError, match="image must be a MetaTensor with an affine matrix, got Tensor"):
        SpacingInferer()(torch.zeros(1, 1, 8, 8), segmenter(2))
    x = image(2, unit=None)[None]
    with pytest.raises(ValueError, match="has no unit"):
        SpacingInferer()(x, segmenter(2))
    assert SpacingInferer(assumed_unit="mm")(x, segmenter(2)).shape == (1, 2, *SIZES[2])
    with pytest.raises(ValueError, match="roi_size must be given"):
        SpacingInferer(overlap=0.5)


def test_monais_own_windows_lose_the_spacing():
    """Why `SpacingInferer` exists: should this fail, it may go."""
    seen = []
    SlidingWindowInferer(8)(image(3)[None], lambda x: seen.append(type(x)) or x)
    assert set(seen) == {torch.Tensor}


@torch.no_grad()
def test_encoders_in_monais_network(axes):
    name = {2: "test_rat", 3: "test_rat_3d"}[axes]
    register_monai_encoder(name)
    network = WithGeometry(FlexibleUNet(1, 2, name, spatial_dims=axes, decoder_channels=(16, 16, 8, 8, 8))).eval()
    x = image(axes)
    out = SpacingInferer()(x[None], network)
    torch.testing.assert_close(out.as_tensor(), network(x.as_tensor()[None], spacing=SPACING[axes]))
    assert torch.equal(out.affine, x.affine)
    assert not torch.allclose(out.as_tensor(), network(x.as_tensor()[None]))


def test_monais_trainer_tells_the_spacing(axes):
    pytest.importorskip("ignite")
    from monai.engines import SupervisedTrainer

    network, x, seen = segmenter(axes), image(axes), []
    network.register_forward_pre_hook(lambda module, args, told: seen.append(told["spacing"]), with_kwargs=True)
    batch = list_data_collate([{"image": x, "label": torch.zeros(1, *SIZES[axes])}] * 2)
    before = network.classifier.weight.clone()
    SupervisedTrainer(
        "cpu",
        1,
        [batch],
        network,
        torch.optim.SGD(network.parameters(), 0.1),
        lambda out, label: torch.nn.functional.cross_entropy(out.as_tensor(), label[:, 0].long()),
        inferer=SpacingInferer(),
    ).run()
    torch.testing.assert_close(seen[0], torch.tensor([SPACING[axes]] * 2))
    assert not torch.equal(network.classifier.weight, before)


@pytest.fixture
def saved(tmp_path):
    return segmenter(3).save(tmp_path / "model")


@pytest.fixture
def scan(tmp_path):
    """A NIfTI file whose axes are turned in the world and run the other way; in micrometres."""
    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).integers(-100, 900, (20, 12, 8), dtype=np.int16)
    stored = nibabel.Nifti1Image(values, turned((0.8, 0.5, 2.0), (-1, 1, 1)))
    stored.header.set_xyzt_units("micron")
    nibabel.save(stored, tmp_path / "images" / "one.nii.gz")
    return tmp_path / "images" / "one.nii.gz"


INTENSITIES = (-100.0, 900.0)


def run_bundle(bundle, scan, **options):
    from monai.bundle import ConfigWorkflow

    workflow = ConfigWorkflow(
        config_file=str(bundle / "configs" / "inference.json"),
        workflow_type="inference",
        bundle_root=str(bundle),
        dataset_dir=str(scan.parent),
        output_dir=str(scan.parent.parent / "out"),
        device="cpu",
        **options,
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    workflow.finalize()
    (made,) = (scan.parent.parent / "out").iterdir()
    return nibabel.load(made)


@pytest.mark.parametrize("task", ["labels", "probabilities"])
def test_a_bundle_predicts_what_the_model_does(task, saved, scan, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ignite")
    command = ["export-bundle", saved, "--output", tmp_path / "bundle", "--task", task, "--intensities", *INTENSITIES]
    monkeypatch.setattr(sys, "argv", ["rat_timm", *map(str, command)])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "bundle")
    made = run_bundle(tmp_path / "bundle", scan)
    source = nibabel.load(scan)
    np.testing.assert_allclose(made.affine, source.affine, rtol=1e-6, atol=1e-6)
    assert made.header.get_xyzt_units()[0] == "micron"
    predict(scan, saved, tmp_path / "own.nii", task=task, intensities=INTENSITIES, progress=False, device="cpu")
    own, found = (np.asarray(file.dataobj) for file in (nibabel.load(tmp_path / "own.nii"), made))
    pixels, step = read(scan, "um").pixels, read(scan, "um").spacing
    with torch.no_grad():
        logits = Segmenter.load(saved)(((pixels + 100.0) / 1000)[None], spacing=step)[0]
    if task == "labels":
        assert found.dtype == np.uint8
        assert 0.05 < found.mean() < 0.95
        assert np.array_equal(found, own)
        assert np.array_equal(found, logits.argmax(0).numpy().T)
    else:
        np.testing.assert_allclose(found, own.reshape(found.shape), atol=1e-5)
        np.testing.assert_allclose(found, logits.softmax(0).numpy().transpose(3, 2, 1, 0), atol=1e-5)


def test_a_bundle_takes_windows_and_files_without_a_unit(saved, scan, tmp_path):
    pytest.importorskip("ignite")
    stored = nibabel.load(scan)
    stored.header.set_xyzt_units("unknown")
    nibabel.save(stored, scan)
    bundle = export_bundle(saved, tmp_path / "bundle", task="probabilities", unit="mm", axes="xyz")
    made = run_bundle(bundle, scan, assumed_unit="mm", roi_size=[16, 12, 8])
    x = torch.from_numpy(np.asarray(stored.dataobj, np.float32))[None, None]
    with torch.no_grad():
        expected = sliding_window(Segmenter.load(saved), x, [16, 12, 8], spacing=(0.8, 0.5, 2.0)).softmax(1)
    np.testing.assert_allclose(np.asarray(made.dataobj), expected[0].movedim(0, -1).numpy(), atol=1e-5)
    assert made.header.get_xyzt_units()[0] == "unknown"


def test_images_have_bundles_too(tmp_path):
    pytest.importorskip("ignite")
    (tmp_path / "images").mkdir()
    values = np.random.default_rng(0).normal(size=(20, 28)).astype(np.float32)
    stored = nibabel.Nifti1Image(values, np.diag([0.5, 1.5, 1.0, 1.0]))
    stored.header.set_xyzt_units("mm")
    nibabel.save(stored, tmp_path / "images" / "one.nii")
    network = lively(Segmenter("test_rat", 1, in_chans=1, width=8)).eval()
    made = run_bundle(
        export_bundle(network.save(tmp_path / "model"), tmp_path / "bundle", unit="mm"), tmp_path / "images" / "one.nii"
    )
    with torch.no_grad():
        expected = network(torch.from_numpy(values.T.copy())[None, None], spacing=(1.5, 0.5))[0, 0] > 0
    assert np.array_equal(np.asarray(made.dataobj), expected.numpy().T)


def test_monai_finds_the_bundle_right(saved, tmp_path):
    from monai import bundle

    made = export_bundle(saved, tmp_path / "bundle", unit="um")
    files = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
    assert files == [
        "LICENSE",
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/config.json",
        "models/model.safetensors",
    ]
    config, meta = (str(made / "configs" / name) for name in ("inference.json", "metadata.json"))
    bundle.verify_net_in_out(
        "network_def", meta_file=meta, config_file=config, device="cpu", any=8, bundle_root=str(made)
    )
    schema = tmp_path / "schema.json"  # what MONAI's asks for; the file itself is on the net
    tensor = ("type", "format", "num_channels", "spatial_shape", "dtype", "value_range")
    needed = "schema version monai_version pytorch_version numpy_version required_packages_version task description"
    inputs = {"type": "object", "additionalProperties": {"type": "object", "required": tensor}}
    schema.write_text(
        json.dumps(
            {
                "required": [*needed.split(), "authors", "copyright", "network_data_format"],
                "properties": {"network_data_format": {"properties": {"inputs": inputs, "outputs": inputs}}},
            }
        )
    )
    bundle.verify_metadata(meta_file=meta, filepath=schema)


def test_what_is_no_bundle_is_an_error(saved, tmp_path, monkeypatch):
    for options, words in (
        ({"task": "boxes"}, "task must be one of"),
        ({"axes": "yxz"}, "axes must be one of"),
        ({"unit": "pixels"}, "unit must be a length"),
        ({"intensities": (1.0, 1.0)}, "intensities must be two numbers"),
        ({"roi_size": (16, 16)}, "roi_size must be 3 numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            export_bundle(saved, tmp_path / "bundle", **options)
        assert not (tmp_path / "bundle").exists()
    with pytest.raises(ValueError, match=r"dataset_dir must be a folder with \.nii or \.nii\.gz files in it, got"):
        nifti_files(tmp_path)  # MONAI would end well and predict none
    monkeypatch.setattr(sys, "argv", ["rat_timm", "export-bundle", str(saved), "--output", str(saved)])
    with pytest.raises(SystemExit, match="exists: delete it"):
        main()


def test_a_licence_is_the_users(saved, tmp_path):
    (tmp_path / "mine.txt").write_text("Mine.")
    made = export_bundle(saved, tmp_path / "bundle", licence=tmp_path / "mine.txt", authors="Me")
    assert (made / "LICENSE").read_text() == "Mine."
    assert json.loads((made / "configs" / "metadata.json").read_text())["authors"] == "Me"


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)
