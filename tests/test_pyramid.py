"""Crops with overviews: where they are, to the last digits, what is masked, and which chunks are read."""

import functools
import pickle
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rat_timm.data import ReadError, collate_crops, crop_levels, levels_of, read_grids, read_levels

zarr = pytest.importorskip("zarr")

# an odd shape, and spacings that no binary fraction is
SHAPE, STEP, FACTORS = (11, 67, 45), ("0.7", "0.13", "0.3"), ((1, 1, 1), (1, 2, 2), (2, 4, 4))
SHIFT = ("100.1", "-7.3", "0.01")


def write(path, axes, placed, common=None):
    """Writes an OME-Zarr whose pixels are their own index; returns the exact spacing and origin of each level."""
    shape, step, shift = SHAPE[-axes:], STEP[-axes:], SHIFT[-axes:]
    group, datasets, exact = zarr.open_group(path, mode="w", zarr_format=3), [], []
    for level, factors in enumerate(FACTORS):
        factors = factors[-axes:]
        size = [-(-n // f) for n, f in zip(shape, factors, strict=True)]
        array = group.create_array(str(level), shape=(1, *size), chunks=(1, *(min(8, n) for n in size)), dtype="int32")
        array[:] = np.arange(np.prod(size)).reshape(1, *size) + 10**6 * level
        scale = [Fraction(s) * f for s, f in zip(step, factors, strict=True)]
        # the first pixel of a coarse level is the mean of so many of the finest
        origin = [Fraction(o) + Fraction(s) * (f - 1) / 2 for o, s, f in zip(shift, step, factors, strict=True)]
        transforms = [{"type": "scale", "scale": [1.0, *map(float, scale)]}]
        if placed:
            transforms.append({"type": "translation", "translation": [0.0, *map(float, origin)]})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
        exact.append((scale, origin if placed else [s / 2 for s in scale]))
    named = [{"name": "c", "type": "channel"}]
    named += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"[-axes:]]
    image = {"axes": named, "datasets": datasets}
    if common is not None:
        image["coordinateTransformations"] = common
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image]}
    return exact


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("placed", [False, True])
def test_grids_are_those_of_the_metadata(tmp_path, axes, placed):
    exact = write(tmp_path / "a.zarr", axes, placed)
    grids = read_grids(tmp_path / "a.zarr")
    for grid, factors, (scale, origin) in zip(grids, FACTORS, exact, strict=True):
        assert grid.shape == tuple(-(-n // f) for n, f in zip(SHAPE[-axes:], factors[-axes:], strict=True))
        torch.testing.assert_close(grid.spacing[0], torch.tensor(list(map(float, scale)), dtype=torch.float64))
        torch.testing.assert_close(grid.origin[0], torch.tensor(list(map(float, origin)), dtype=torch.float64))
    nanometres = read_grids(tmp_path / "a.zarr", "nm")[1]
    torch.testing.assert_close(nanometres.origin, grids[1].origin * 1000)
    torch.testing.assert_close(nanometres.spacing, grids[1].spacing * 1000)


def test_a_translation_that_levels_have_in_common(tmp_path):
    common = [{"type": "scale", "scale": [1.0, 2.0, 3.0]}, {"type": "translation", "translation": [0.0, 5.0, -1.0]}]
    exact = write(tmp_path / "a.zarr", 2, True, common)
    for grid, (scale, origin) in zip(read_grids(tmp_path / "a.zarr"), exact, strict=True):
        assert grid.spacing[0].tolist() == pytest.approx([float(scale[0] * 2), float(scale[1] * 3)], rel=1e-12)
        assert grid.origin[0].tolist() == pytest.approx([float(origin[0] * 2 + 5), float(origin[1] * 3 - 1)], rel=1e-12)


def test_a_translation_before_the_scale_is_refused(tmp_path):
    write(tmp_path / "a.zarr", 2, True, [{"type": "translation", "translation": [0.0, 1.0, 1.0]}])
    with pytest.raises(ReadError, match="must have one scale"):
        read_grids(tmp_path / "a.zarr")


@functools.cache
def written(folder, axes, placed):
    """Writes an OME-Zarr once for all examples; returns what is exact, and its levels."""
    path = folder / f"{placed}.zarr"
    return write(path, axes, placed), read_levels(path)


@pytest.mark.parametrize("axes", [2, 3])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), placed=st.booleans())
def test_pixels_are_where_the_crop_says(tmp_path, axes, data, placed):
    """By fractions: every valid pixel of a crop is the stored pixel at the position that its grid tells."""
    exact, levels = written(tmp_path, axes, placed)
    scale, origin = exact[0]
    at = [data.draw(st.floats(0, 1)) for _ in range(axes)]
    center = [
        float(o + s * Fraction(share) * (n - 1))
        for o, s, share, n in zip(origin, scale, at, SHAPE[-axes:], strict=True)
    ]
    size = [data.draw(st.integers(1, 20)) for _ in range(axes)]
    crop = crop_levels(levels, center, size, [[float(s) for s in scale] for scale, _ in exact])
    for level, (scale, origin) in enumerate(exact):
        image, mask, shape = crop.image[level], crop.mask[level], levels[level].grid.shape
        assert image.shape == (1, *size)
        first = [
            (Fraction(float(here)) - there) / step
            for here, there, step in zip(crop.origin[level], origin, scale, strict=True)
        ]
        starts = [round(index) for index in first]
        assert all(abs(index - start) < 1e-9 for index, start in zip(first, starts, strict=True))
        index = [start + places for start, places in zip(starts, np.indices(size), strict=True)]
        inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, shape, strict=True)], axis=0)
        assert np.array_equal(mask, inside)
        value = np.ravel_multi_index(index, shape, mode="clip") + 10**6 * level
        assert np.array_equal(image[0], np.where(inside, value, 0))
        middle = crop.origin[level] + crop.spacing[level] * (torch.tensor(size) - 1) / 2
        off = (middle - torch.tensor(center, dtype=torch.float64)).abs() / crop.spacing[level]
        assert (off <= 0.5 + 1e-9).all()


def test_only_chunks_of_the_crop_are_read(tmp_path, monkeypatch):
    write(tmp_path / "a.zarr", 3, False)
    levels = read_levels(tmp_path / "a.zarr")
    read = []
    get = zarr.storage.LocalStore.get

    async def count(self, key, *args, **kwargs):
        if "/c/" in key:
            read.append(key)
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(zarr.storage.LocalStore, "get", count)
    # pixels 0..7 x 24..39 x 8..15 of level 0 are 1 x 2 x 1 chunks of 8
    crop_levels(levels, (4 * 0.7, 32 * 0.13, 12 * 0.3), (8, 16, 8), [(0.7, 0.13, 0.3)])
    assert sorted(read) == ["0/c/0/0/3/1", "0/c/0/0/4/1"]


@pytest.mark.parametrize("axes", [2, 3])
def test_levels_in_memory_are_averages(axes):
    pixels = np.random.default_rng(0).random((2, *(16, 24, 32)[-axes:]))
    spacing = STEP[-axes:]
    fine, coarse = levels_of(pixels, list(map(float, spacing)), (1, 4))
    whole = [slice(None)] * axes
    assert torch.equal(fine.read(whole), torch.from_numpy(pixels).float())
    assert coarse.grid.shape == tuple(n // 4 for n in pixels.shape[1:])
    assert coarse.read(whole).mean() == pytest.approx(pixels.mean(), abs=0.02)
    assert coarse.grid.origin[0].tolist() == pytest.approx([float(s) * 2 for s in spacing])
    with pytest.raises(ValueError, match="factors must be numbers of at least 1"):
        levels_of(pixels, [1.0] * axes, (0.5,))


@pytest.mark.parametrize(("name", "axes"), [("test_rat", 2), ("test_rat_3d", 3)])
def test_models_take_crops(name, axes):
    pixels = np.random.default_rng(0).random((1, *(24, 96, 96)[-axes:]))
    levels = levels_of(pixels, [1.0] * axes, (1, 2))
    size = (8, 32, 32)[-axes:]
    crops = [crop_levels(levels, [c] * axes, size, (1.0, 2.0))._replace(target=i) for i, c in enumerate((5.0, 20.0))]
    batch = collate_crops(crops)
    assert batch.target.tolist() == [0, 1]
    assert batch.mask[1] is not None
    model = timm.create_model(name, in_chans=1, num_classes=3).eval()
    with torch.no_grad():
        logits = model(batch.image, spacing=batch.spacing, mask=batch.mask, origin=batch.origin)
        alone = collate_crops(crops[1:])
        own = model(alone.image, spacing=alone.spacing, mask=alone.mask, origin=alone.origin)
    torch.testing.assert_close(logits[1:], own, rtol=1e-4, atol=1e-4)


def test_levels_go_to_other_processes(tmp_path):
    write(tmp_path / "a.zarr", 2, True)
    levels = read_levels(tmp_path / "a.zarr")
    region = [slice(3, 9), slice(2, 5)]
    assert torch.equal(pickle.loads(pickle.dumps(levels))[1].read(region), levels[1].read(region))


def test_what_does_not_fit_is_an_error():
    levels = levels_of(np.zeros((1, 8, 8)), (1.0, 1.0))
    with pytest.raises(ValueError, match="center must have 2 values"):
        crop_levels(levels, (1.0,), (4, 4), (1.0,))
    with pytest.raises(ValueError, match="size must have 2 values"):
        crop_levels(levels, (1.0, 1.0), (4,), (1.0,))
    with pytest.raises(ValueError, match="center must be such that each level shows some of the image"):
        crop_levels(levels, (99.0, 1.0), (4, 4), (1.0,))
    one, two = crop_levels(levels, (4.0, 4.0), (4, 4), (1.0,)), crop_levels(levels, (4.0, 4.0), (4, 3), (1.0,))
    with pytest.raises(ValueError, match="crops must have the same levels"):
        collate_crops([one, two])
    with pytest.raises(ValueError, match="crops must all have a target, or none, got 1 of 2 without"):
        collate_crops([one, one._replace(target=1)])
