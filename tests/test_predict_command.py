"""What the command may be told: each option against the model on the whole image, and each wrong input in one line."""

import errno
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from test_predict import call, probabilities, stored
from test_predict_receptive import segmenter

from helpers import write_ome_zarr
from hub_client import run
from hub_server import Repo, environment, serving
from rat_timm import data
from rat_timm.dense import Segmenter
from rat_timm.predict import predict
from rat_timm.predict.network import Network
from rat_timm.predict.store import Store

zarr = pytest.importorskip("zarr")
SIZE = (64, 80)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


@pytest.fixture
def image(tmp_path, pixels):
    return write_ome_zarr(tmp_path / "image.ome.zarr", pixels, (0.5, 0.5))


@pytest.fixture
def saved(tmp_path):
    segmenter(depths=(1, 1)).float().save(tmp_path / "model")
    return tmp_path / "model"


def whole(saved, pixels, spacing, **told):
    return probabilities(Segmenter.load(saved), torch.from_numpy(np.asarray(pixels))[None], spacing=spacing, **told)


ALWAYS = ["--task", "probabilities", "--tile", 12, "--quiet"]


@pytest.mark.parametrize("dtype", ["float64"])
def test_other_dtypes_are_as_far_from_the_truth_as_the_whole_is_with_them(tmp_path, image, pixels, saved, dtype):
    call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", *ALWAYS, "--dtype", dtype, "--device", "cpu")
    x = torch.from_numpy(pixels)[None]
    truth = probabilities(Segmenter.load(saved).double(), x.double(), spacing=0.5)
    own = Segmenter.load(saved).to(getattr(torch, dtype))
    with torch.no_grad():
        logits = own(x[None].to(getattr(torch, dtype)), spacing=0.5)
    error = np.abs(logits.double().softmax(dim=1)[0].numpy() - truth)
    found = np.abs(stored(tmp_path / "out.ome.zarr") - truth)
    assert found.max() <= max(2 * error.max(), 1e-6)
    assert found.mean() <= max(1.2 * error.mean(), 1e-6)


def test_lengths_are_in_the_unit_that_is_said(tmp_path, pixels, saved):
    """A model whose pixels are of 1 mm sees an image of 500 um at 0.5."""
    image = write_ome_zarr(tmp_path / "image.ome.zarr", pixels, (500.0, 500.0))
    call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", *ALWAYS, "--unit", "mm")
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), whole(saved, pixels, 0.5), atol=1e-5)
    assert data.read_grids(tmp_path / "out.ome.zarr", unit="um")[0].spacing.tolist() == [[500.0, 500.0]]


def test_a_file_without_a_unit_takes_the_one_that_is_said(tmp_path, pixels, saved):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(pixels.T[:, :, None], np.diag([500.0, 500.0, 1.0, 1.0])), tmp_path / "image.nii")
    command = [tmp_path / "image.nii", "--model", saved, "--output", tmp_path / "out.ome.zarr", *ALWAYS]
    with pytest.raises(SystemExit, match="has no unit: say which with assumed_unit"):
        call(*command, "--unit", "mm")
    call(*command, "--unit", "mm", "--assumed-unit", "um")
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), whole(saved, pixels, 0.5), atol=1e-5)


def test_what_writes_is_imported_before_anything_is_computed(tmp_path, image, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "ome_zarr.writer", None)
    with pytest.raises(SystemExit, match=r"import of ome_zarr\.writer halted; None in sys\.modules$"):
        call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", *ALWAYS)


def test_a_spacing_is_taken_in_place_of_the_file_s(tmp_path, image, pixels, saved):
    call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", *ALWAYS, "--spacing", 0.7, 1.2)
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), whole(saved, pixels, (0.7, 1.2)), atol=1e-5)


def test_a_background_that_is_a_file_masks(tmp_path, image, pixels, saved):
    mask = np.random.default_rng(1).random(SIZE) > 0.3
    write_ome_zarr(tmp_path / "mask.ome.zarr", mask.astype(np.uint8), (0.5, 0.5))
    options = [*ALWAYS, "--background", tmp_path / "mask.ome.zarr"]
    call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", *options)
    expected = whole(saved, pixels, 0.5, mask=torch.from_numpy(mask)[None])
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), np.where(mask, expected, 0), atol=1e-5)


def test_levels_of_the_command(tmp_path, image, saved, monkeypatch):
    seen = []
    call_ = Network.__call__
    monkeypatch.setattr(Network, "__call__", lambda net, x, *given: seen.append(len(x)) or call_(net, x, *given))
    for levels, count in ((["--levels", 1.0, "overview"], 3), (["--levels"], 1), ([], 1)):
        seen.clear()
        arguments = [*ALWAYS, "--halo", 4, *levels, "--restart"]
        output = tmp_path / f"out{len(levels)}.ome.zarr"
        call(image, "--model", saved, "--output", output, *arguments)
        assert set(seen) == {count}
    with pytest.raises(SystemExit, match=r"levels must be pixel sizes and 'overview', got -1\.0"):
        call(image, "--model", saved, "--output", tmp_path / "other.ome.zarr", "--levels", -1)


@pytest.mark.parametrize("ending", [".nii.gz", ".ome.tif"])
def test_regions_keep_their_place_in_other_formats(tmp_path, image, pixels, saved, ending):
    output = tmp_path / f"out{ending}"
    call(image, "--model", saved, "--output", output, *ALWAYS, "--region", "10:50,8:")
    scan = data.read(output, unit="um")
    assert scan.spacing == pytest.approx((0.5, 0.5))
    expected = whole(saved, pixels, 0.5)[:, 10:50, 8:]
    np.testing.assert_allclose(scan.pixels.numpy(), expected, atol=1e-5)


def test_a_folder_of_dicom(tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import make_series

    folder = make_series(tmp_path / "series", [0.0, 1.5, 3.0, 4.5, 6.0, 7.5])
    model = segmenter("test_rat_3d", depths=(1, 1), spacing=(1.5, 0.7, 0.3)).float()
    model.save(tmp_path / "model")
    output = tmp_path / "out.nii.gz"
    call(folder, "--model", tmp_path / "model", "--output", output, *ALWAYS, "--unit", "mm")
    scan = data.read(folder, unit="mm")
    expected = probabilities(Segmenter.load(tmp_path / "model"), scan.pixels.float(), spacing=scan.spacing)
    np.testing.assert_allclose(data.read(output, unit="mm").pixels, expected, atol=1e-5)


def test_a_model_of_the_hub(tmp_path, image, pixels, saved):
    """In a process of its own, since huggingface_hub reads its environment when it is imported."""
    with serving() as server:
        server.repos["me/cells"] = Repo()
        server.repos["me/cells"].commit({file.name: file.read_bytes() for file in saved.iterdir()})
        code = (
            "import sys; sys.argv = ['rat_timm', *sys_argv]\n"
            "from rat_timm.__main__ import main\n"
            "try:\n    main()\nexcept SystemExit as error:\n    print(error)\n"
        )
        for name in ("me/cells", "me/none"):
            words = [image, "--model", f"hf-hub:{name}", "--output", tmp_path / "out.nii", *ALWAYS]
            argv = ["predict", *map(str, words)]
            said = run(f"sys_argv = {argv!r}\n{code}", environment(server, str(tmp_path / "home")))
            assert said == "" if name == "me/cells" else said.startswith("rat_timm predict: "), said
            assert said.count("\n") == (name == "me/none")
            if name == "me/cells":
                found = data.read(tmp_path / "out.nii", unit="um").pixels.numpy()
                np.testing.assert_allclose(found, whole(saved, pixels, 0.5), atol=1e-5)
                (tmp_path / "out.nii").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "device must be one that PyTorch finds here, got 'gpu'"),
        (["--device", "cuda:7"], "device must be one that PyTorch finds here, got 'cuda:7'"),
        (["--preview", "look.jpg"], r"preview must be a .png in a folder that is there, got 'look.jpg'"),
        (["--preview", "none/look.png"], r"preview must be a .png in a folder"),
        (["--scheduler", "slurm"], "scheduler must be"),
        (["--workers", "-1"], "workers not negative"),
        (["--background", "none.nii"], "none.nii: there is no such file"),
        (["--task", "features", "--stage", "7"], "stage must be from 0 to 1"),
        (["--intensities", "5", "1"], "intensities must be two numbers, the lower first"),
        (["--time", "2"], "time"),
        (["--out", "-1"], "out must"),
        (["--threshold", "2", "--task", "instances", "--scale", "8"], "threshold must be between 0 and 1"),
        (["--task", "instances", "--scale", "-8"], "scale must be a positive length"),
        (["--task", "instances", "--scale", "8", "--largest", "-1"], "largest must"),
        (["--task", "instances", "--scale", "8", "--depth", "-1"], "depth must be a positive length"),
        (["--task", "instances", "--scale", "8", "--min-size", "-1"], "min_size must not be negative"),
    ],
)
def test_wrong_options_are_one_line_before_work_starts(tmp_path, image, saved, arguments, message):
    output = tmp_path / "out.ome.zarr"
    with pytest.raises(SystemExit, match=message) as error:
        call(image, "--model", saved, "--output", output, "--quiet", *arguments)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("rat_timm predict: ")
    assert not output.with_name("out.ome.zarr.partial").exists()


def full(monkeypatch, name, after):
    """A disk that is full when a method was called so often."""
    method, count = getattr(Store, name), [0]

    def fail(*given):
        count[0] += 1
        if count[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return method(*given)

    monkeypatch.setattr(Store, name, fail)


@pytest.mark.parametrize(
    ("task", "name", "after"),
    [
        ("labels", "create", 0),
        ("labels", "write", 4),
        ("labels", "write_metadata", 0),
        ("labels", "finish", 0),
        ("instances", "write", 1),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_done_stays(tmp_path, image, saved, monkeypatch, task, name, after):
    words = ["--model", saved, "--task", task, "--scale", 2, "--largest", 2, "--tile", 10, "--quiet"]
    output = tmp_path / "out.ome.zarr"
    with monkeypatch.context() as patch:
        full(patch, name, after)
        with pytest.raises(SystemExit, match=r"rat_timm predict: .*No space left on device") as error:
            call(image, *words, "--output", output)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("the same command goes on)") == (name != "create")
    assert not output.exists()
    call(image, *words, "--output", output)
    call(image, *words, "--output", tmp_path / "whole.ome.zarr")
    assert np.array_equal(stored(output), stored(tmp_path / "whole.ome.zarr"))


def test_an_interrupt_is_one_line(tmp_path, image, saved, monkeypatch, capsys):
    """As from the keyboard, after the first tile."""
    write, output = Store.write, tmp_path / "out.ome.zarr"

    def interrupted(*given):
        write(*given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Store, "write", interrupted)
    # Ray Train leaves a handler of its own, and shells let what runs in the background ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            call(image, "--model", saved, "--output", output, "--tile", 5, "--quiet")
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert said.startswith("rat_timm predict: interrupted (what was done stays in ")
    assert said.count("\n") == 1
    assert not output.exists()


@pytest.mark.slow
def test_paths_may_be_relative_where_workers_began_elsewhere(tmp_path, image, saved, monkeypatch):
    """Workers of a cluster that runs began in folders of their own."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tmp_path)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, protocol="tcp", host="127.0.0.1", dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        (tmp_path / "elsewhere").mkdir()
        client.run(os.chdir, str(tmp_path / "elsewhere"))
        address = ["--scheduler", cluster.scheduler_address]
        call("image.ome.zarr", "--model", "model", "--output", "out.ome.zarr", *ALWAYS, *address)
    call(image, "--model", saved, "--output", tmp_path / "here.ome.zarr", *ALWAYS)
    np.testing.assert_allclose(stored(tmp_path / "out.ome.zarr"), stored(tmp_path / "here.ome.zarr"), atol=1e-6)


def test_work_that_outlives_its_run_writes_nothing(tmp_path, image, saved):
    """A worker of a cluster goes on for a while when the program that began the run was killed."""
    said = json.loads('{"model": "another"}')
    from rat_timm.predict.manifest import Manifest

    manifest = Manifest(tmp_path / "out.ome.zarr.partial")
    manifest.begin(said, resume=True)
    with pytest.raises(FileNotFoundError, match="the run has ended"):
        manifest.check(said)
    (manifest.partial / "data").mkdir()
    manifest.write(said)
    manifest.check(said)
    with pytest.raises(FileNotFoundError, match="the run has ended"):
        manifest.check({"model": "mine"})


def test_a_folder_that_is_none_of_a_run_is_not_removed(tmp_path, image, saved):
    other = tmp_path / "out.ome.zarr.partial"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is no folder of a run"):
        call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", "--quiet", "--restart")
    assert (other / "notes.txt").read_text() == "mine"


def test_quiet_runs_compute_no_forecast(tmp_path, image, saved, monkeypatch):
    calls = []
    monkeypatch.setattr("rat_timm.predict.run._forecast", lambda *_: calls.append(1) or "")
    call(image, "--model", saved, "--output", tmp_path / "out.ome.zarr", "--quiet")
    assert not calls
    predict(image, saved, tmp_path / "other.ome.zarr", progress=True)
    assert calls
