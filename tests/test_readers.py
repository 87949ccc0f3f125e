import contextlib
import gzip
import io
import json
import os
import re
import shutil
import sys
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from fuzzing import guarded
from test_dicom import make
from torch.utils.data import DataLoader

from rat_timm.data import ReadError, read, read_grids, read_lazy, read_spacing
from rat_timm.data.readers import formats
from rat_timm.data.readers.source import Format, StoredImage
from rat_timm.data.units import Length

MICROMETRES = {"nm": 1e-3, "um": 1.0, "mm": 1e3}
LONG = {"nm": "nanometer", "um": "micrometer", "mm": "millimeter"}
SIZES = (0.25, 0.065, 0.13)  # z, y, x, in micrometres
VOLUME = np.arange(4 * 6 * 8, dtype=np.uint16).reshape(4, 6, 8)


def write_tiff(path, array, axes, sizes=SIZES, unit="um", **options):
    """The sizes, in micrometres, are written in ``unit``."""
    metadata = {"axes": axes}
    for axis, size in zip("ZYX"[-len(sizes) :], sizes, strict=True):
        metadata[f"PhysicalSize{axis}"] = size / MICROMETRES[unit]
        metadata[f"PhysicalSize{axis}Unit"] = {"um": "µm"}.get(unit, unit)
    tifffile.imwrite(path, array, metadata=metadata, **options)
    return path


def write_zarr(path, array, axes, sizes=SIZES, unit="um", version="0.5", levels=(2,)):
    ome_zarr = pytest.importorskip("ome_zarr")
    scale = {axis: size / MICROMETRES[unit] for axis, size in zip("zyx"[-len(sizes) :], sizes, strict=True)}
    scale = {axis: scale.get(axis, 1.0) for axis in axes}
    units = {axis: LONG[unit] for axis in axes if axis in "zyx"}
    image = ome_zarr.OMEZarrImage(array, axes, scale, units)
    ome_zarr.OMEZarrMultiscale(image, list(levels), method="nearest").to_ome_zarr(str(path), version=version)
    return path


def write_nifti(path, array, sizes, unit, code=True):
    """``array`` is in the file's own order (x, y, z), and so are the sizes."""
    image = nibabel.Nifti1Image(array, np.diag([*(size / MICROMETRES[unit] for size in sizes), 1.0]))
    if code:
        image.header.set_xyzt_units({"um": "micron"}.get(unit, unit))
    nibabel.save(image, path)
    return path


def edit_xml(path, old, new):
    """Writes other metadata into an OME-TIFF."""
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.ome_metadata
    assert old in xml
    tifffile.tiffcomment(path, xml.replace(old, new).encode())


@pytest.mark.parametrize("asked", ["nm", "um", "mm"])
@pytest.mark.parametrize("written", ["nm", "um", "mm"])
def test_ome_tiff_in_any_unit(tmp_path, written, asked):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", unit=written)
    scan = read(path, unit=asked)
    assert scan.spacing == pytest.approx([size / MICROMETRES[asked] for size in SIZES], rel=1e-6)
    assert torch.equal(scan.pixels, torch.from_numpy(VOLUME)[None])
    assert read_spacing(path, asked) == scan.spacing


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("YX", (6, 8), (1, 6, 8)),
        ("CYX", (3, 6, 8), (3, 6, 8)),
        ("YXS", (6, 8, 3), (3, 6, 8)),
        ("ZCYX", (4, 3, 6, 8), (3, 4, 6, 8)),
        ("TCZYX", (1, 3, 4, 6, 8), (3, 4, 6, 8)),
        ("ZYX", (1, 6, 8), (1, 6, 8)),
    ],
)
def test_axes_are_put_in_order(tmp_path, axes, shape, expected):
    array = np.arange(np.prod(shape), dtype=">u2").reshape(shape)
    photometric = {"photometric": "rgb"} if "S" in axes else {"photometric": "minisblack"}
    scan = read(write_tiff(tmp_path / "a.ome.tiff", array, axes, **photometric))
    assert scan.pixels.shape == expected
    assert scan.spacing == pytest.approx(SIZES[-len(expected) + 1 :], rel=1e-6)
    places = np.einsum(f"{axes.lower()}->{''.join(a for a in 'tcszyx' if a in axes.lower())}", array)
    assert np.array_equal(scan.pixels.flatten().numpy(), places.flatten())


def test_one_of_several_times(tmp_path):
    array = np.stack([VOLUME, VOLUME + 1000])
    path = write_tiff(tmp_path / "a.ome.tif", array, "TZYX")
    with pytest.raises(ValueError, match=r"a\.ome\.tif: has 2 times: choose one"):
        read(path)
    assert torch.equal(read(path, time=1).pixels[0], torch.from_numpy(VOLUME + 1000))
    with pytest.raises(ValueError, match="time must be from 0 to 1, got 2"):
        read(path, time=2)
    with pytest.raises(ValueError, match="time must be 0 or None where there is one time, got 7"):
        read(write_tiff(tmp_path / "b.ome.tif", VOLUME, "ZYX"), time=7)


def test_one_of_several_images(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for index, size in enumerate((0.5, 3.0)):
            metadata = {"axes": "YX", "PhysicalSizeX": size, "PhysicalSizeY": size}
            tiff.write(VOLUME[index], metadata=metadata, contiguous=False)
    for reader in (read, read_spacing):
        with pytest.raises(ValueError, match=r"a\.ome\.tif: has 2 images .* choose one with image"):
            reader(path)
    scan = read(path, image=1)
    assert scan.spacing == (3.0, 3.0)
    assert np.array_equal(scan.pixels[0], VOLUME[1])
    with pytest.raises(ValueError, match="image must be from 0 to 1, got 2"):
        read(path, image=2)
    edit_xml(path, '<Image ID="Image:0"', '<Image ID="Image:7"><Pixels/></Image><Image ID="Image:0"')
    with pytest.raises(ValueError, match=r"metadata are of 3 images, the file has 2|cannot be read"):
        read(path, image=0)


def test_planes_in_files_that_are_not_there(tmp_path):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib")
    edit_xml(path, 'SizeZ="4"', 'SizeZ="5"')
    with pytest.raises(ValueError, match=r"a\.ome\.tif: (planes are missing|cannot be read)"):
        read(path)


def test_levels_of_a_pyramid_in_ome_tiff(tmp_path):
    path, image = tmp_path / "a.ome.tif", np.random.default_rng(0).integers(0, 255, (64, 96), dtype=np.uint8)
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, subifds=2, metadata=metadata)
        for step in (2, 4):
            tiff.write(image[::step, ::step], subfiletype=1)
    assert read(path).spacing == (0.25, 0.5)  # the unit that OME has where none is written is the micrometre
    scan = read(path, level=2, unit="nm")
    assert scan.spacing == pytest.approx((1000, 2000))
    assert np.array_equal(scan.pixels[0], image[::4, ::4])
    with pytest.raises(ValueError, match=r"level must be from 0 to 2, got 3"):
        read(path, level=3)
    edit_xml(path, 'PhysicalSizeX="0.5"', 'PhysicalSizeX="1_0"')
    with pytest.raises(ReadError, match=r"no pixel size along x, got '1_0'"):
        read(path, level=2)


@pytest.mark.parametrize("level", [0, 1])
def test_parts_of_levels_of_a_pyramid_in_ome_tiff(level, tmp_path):
    pytest.importorskip("zarr")
    path, image = tmp_path / "a.ome.tif", np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, subifds=1, metadata=metadata, photometric="rgb")
        tiff.write(image[::2, ::2], subfiletype=1, photometric="rgb")
    region = (slice(3, 20), slice(5, 40))
    scan = read(path, level=level, region=region)
    expected = image[:: 1 + level, :: 1 + level][region]
    assert np.array_equal(scan.pixels, np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (' PhysicalSizeY="0.065" PhysicalSizeYUnit="µm"', "", "no pixel size along y, got None"),
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="0"', "cannot measure 0 µm along x"),
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="-0.13"', "cannot measure -0.13"),
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="nan"', "cannot measure nan"),
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="1.3e-7"', "cannot measure 1.3e-07"),  # metres, as if micrometres
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="2e6"', r"cannot measure 2e\+06 µm"),
        ('PhysicalSizeXUnit="µm"', 'PhysicalSizeXUnit="pixel"', "unit along x must be a length, got 'pixel'"),
        ('PhysicalSizeXUnit="µm"', 'PhysicalSizeXUnit="reference frame"', "must be a length, got 'reference frame'"),
    ],
)
def test_absurd_metadata_are_errors_with_the_files_name(tmp_path, old, new, message):
    path = write_tiff(tmp_path / "b.ome.tif", VOLUME, "ZYX")
    edit_xml(path, old, new)
    for reader in (read, read_spacing):
        with pytest.raises(ValueError, match=rf"b\.ome\.tif: .*{message}"):
            reader(path)


def test_tiffs_without_metadata(tmp_path):
    tifffile.imwrite(tmp_path / "none.ome.tif", VOLUME, metadata={"axes": "ZYX"}, photometric="minisblack")
    with pytest.raises(ValueError, match=r"none\.ome\.tif: no pixel size along z"):
        read(tmp_path / "none.ome.tif", assumed_unit="um")
    tifffile.imwrite(tmp_path / "plain.ome.tif", VOLUME, ome=False, photometric="minisblack")
    with pytest.raises(ValueError, match=r"plain\.ome\.tif: must be an OME-TIFF"):
        read(tmp_path / "plain.ome.tif")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("written", ["nm", "um", "mm"])
def test_ome_zarr_in_any_unit_at_any_level(tmp_path, written, version):
    path = write_zarr(tmp_path / "a.ome.zarr", VOLUME[None], "czyx", unit=written, version=version)
    scan = read(path, unit="nm")
    assert scan.spacing == pytest.approx([size * 1e3 for size in SIZES], rel=1e-6)
    assert torch.equal(scan.pixels, torch.from_numpy(VOLUME)[None])
    coarse = read(path, unit="um", level=1)
    ratio = [a / b for a, b in zip(VOLUME.shape, coarse.pixels.shape[1:], strict=True)]
    assert max(ratio) == 2
    assert coarse.spacing == pytest.approx([s * r for s, r in zip(SIZES, ratio, strict=True)], rel=1e-6)
    with pytest.raises(ValueError, match=r"a\.ome\.zarr: level must be from 0 to 1, got 2"):
        read(path, level=2)


def to_06(path, named=str, shifted=True):
    """Rewrites the metadata of OME-Zarr 0.5 as 0.6 has them, with a second system of coordinates."""
    file = path / "zarr.json"
    whole = json.loads(file.read_text())
    ome = whole["attributes"]["ome"]
    (image,) = ome["multiscales"]
    ome["version"] = "0.6"
    for dataset in image["datasets"]:
        parts = dataset["coordinateTransformations"] if shifted else dataset["coordinateTransformations"][:1]
        ends = {"input": {"path": dataset["path"]}, "output": named("scanner")}
        part = {"type": "sequence", "transformations": parts} if len(parts) > 1 else parts[0]
        dataset["coordinateTransformations"] = [{**part, **ends}]
    axes = image.pop("axes")
    other = [{**axis, "unit": "meter"} for axis in axes]
    image["coordinateSystems"] = [{"name": "atlas", "axes": other}, {"name": "scanner", "axes": axes}]
    image["coordinateTransformations"] = [
        {"type": "scale", "scale": [5.0] * len(axes), "input": {"name": "scanner"}, "output": {"name": "atlas"}}
    ]
    file.write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize("named", [str, lambda name: {"name": name}])
@pytest.mark.parametrize("shifted", [True, False])
def test_ome_zarr_with_systems_of_coordinates(tmp_path, named, shifted):
    """Pixel sizes are those of the system that levels are put in, whatever leads from it to others."""
    before = read_grids(write_zarr(tmp_path / "a.ome.zarr", VOLUME, "zyx"), unit="um")
    path = to_06(tmp_path / "a.ome.zarr", named, shifted)
    after = read_grids(path, unit="um")
    assert [grid.shape for grid in after] == [grid.shape for grid in before]
    for grid, expected in zip(after, before, strict=True):
        assert torch.equal(grid.spacing, expected.spacing)
        assert torch.equal(grid.origin, expected.origin) or not shifted
    assert torch.equal(read(path, unit="um").pixels[0], torch.from_numpy(VOLUME))


SCALED = {"type": "scale", "scale": [1.0, 1.0, 1.0], "output": "scanner"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{**SCALED, "type": "affine"}], "must have one scale"),
        ([{**SCALED, "type": "sequence"}], "must have one scale"),
        ([{**SCALED, "type": "sequence", "transformations": [5, SCALED]}], "must have one scale"),
        ([{**SCALED, "scale": [1.0, 1.0]}], "must have one scale of 3 numbers"),
        ([{**SCALED, "output": "nowhere"}], "must be an image of OME-Zarr 0.4 or later"),
        ([{**SCALED, "output": {"name": ["scanner"]}}], "must be an image of OME-Zarr 0.4 or later"),
        ([SCALED, SCALED], "must be an image of OME-Zarr 0.4 or later"),
        ([5], "must be an image of OME-Zarr 0.4 or later"),
        (None, "must be an image of OME-Zarr 0.4 or later"),
    ],
)
def test_absurd_systems_of_coordinates(tmp_path, parts, message):
    path = to_06(write_zarr(tmp_path / "a.zarr", VOLUME, "zyx", levels=()))
    group = pytest.importorskip("zarr").open_group(path, mode="r+")
    ome = group.attrs["ome"]
    (dataset,) = ome["multiscales"][0]["datasets"]
    dataset["coordinateTransformations"] = [SCALED]
    group.attrs["ome"] = ome
    assert read(path, unit="um").spacing == pytest.approx((1.0, 1.0, 1.0))
    dataset["coordinateTransformations"] = parts
    group.attrs["ome"] = ome
    with pytest.raises(ReadError, match=rf"^{path}: {message}"):
        read(path)


def test_ome_zarr_with_a_scale_for_all_levels(tmp_path):
    zarr = pytest.importorskip("zarr")
    path = write_zarr(tmp_path / "a.zarr", VOLUME[:, 0], "yx", sizes=(2.0, 3.0))
    group = zarr.open_group(path, mode="r+")
    ome = group.attrs["ome"]
    ome["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [0.1, 0.5]}]
    group.attrs["ome"] = ome
    assert read_spacing(path, "um") == pytest.approx((0.2, 1.5))


def test_ome_zarr_without_units_or_scales(tmp_path):
    ome_zarr, zarr = pytest.importorskip("ome_zarr"), pytest.importorskip("zarr")
    path = tmp_path / "b.ome.zarr"
    ome_zarr.OMEZarrMultiscale(ome_zarr.OMEZarrImage(VOLUME, "zyx"), [2]).to_ome_zarr(str(path))
    with pytest.raises(ValueError, match=r"b\.ome\.zarr: pixel size 1 along z has no unit: .* assumed_unit"):
        read(path)
    assert read(path, assumed_unit="mm").spacing == (1000.0,) * 3
    group = zarr.open_group(path, mode="r+")
    ome = group.attrs["ome"]
    for dataset in ome["multiscales"][0]["datasets"]:
        del dataset["coordinateTransformations"]
    group.attrs["ome"] = ome
    with pytest.raises(ValueError, match=r"b\.ome\.zarr: must be an image of OME-Zarr 0\.4 or later"):
        read(path, assumed_unit="mm")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("written", ["um", "mm"])
def test_nifti_comes_in_array_order(tmp_path, name, written):
    array = VOLUME.T.astype(np.int16)  # x, y, z
    scan = read(write_nifti(tmp_path / name, array, SIZES[::-1], written), unit="um")
    assert scan.spacing == pytest.approx(SIZES, rel=1e-6)
    assert np.array_equal(scan.pixels[0], VOLUME)


def test_nifti_whose_axes_are_turned(tmp_path):
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, -1]]) * [0.5, 0.7, 3.0]
    affine = np.eye(4)
    affine[:3, :3] = turn
    image = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii")
    assert read_spacing(tmp_path / "a.nii", "mm") == pytest.approx((3.0, 0.7, 0.5), rel=1e-6)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0.5, 0.5, 0), (0.5, -1, 1)])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_whose_size_is_not_positive_in_the_file(tmp_path, sizes, name):
    """nibabel puts 1 for 0, and turns the sign of what is negative."""
    header = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), None).header
    header.set_xyzt_units("mm")
    header["sform_code"] = header["qform_code"] = 0
    nibabel.save(nibabel.Nifti1Image(VOLUME.T.astype(np.int16), None, header), tmp_path / "whole.nii")
    content = bytearray((tmp_path / "whole.nii").read_bytes())
    content[80:92] = np.array(sizes, "<f4").tobytes()  # pixdim[1:4]
    with nibabel.openers.ImageOpener(tmp_path / name, "wb") as file:
        file.write(bytes(content))
    with pytest.raises(ValueError, match=rf"{name}: a pixel cannot measure (0|-1) mm"):
        read(tmp_path / name)


def test_nifti_that_is_no_volume_of_numbers(tmp_path):
    shear = np.eye(4)
    shear[0, 1] = 0.5
    image = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), shear)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii: voxels must have right angles"):
        read(tmp_path / "a.nii")
    colours = np.zeros((4, 6, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(colours, np.eye(4))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "b.nii")
    with pytest.raises(ValueError, match=r"b\.nii: pixels must be numbers"):
        read(tmp_path / "b.nii")
    image = nibabel.Nifti1Image(np.zeros((2,) * 6, np.int16), np.eye(4))
    nibabel.save(image, tmp_path / "c.nii")
    with pytest.raises(ValueError, match=r"c\.nii: must have at most 5 axes"):
        read(tmp_path / "c.nii")


def test_one_time_of_many_is_read_alone(tmp_path):
    array = np.stack([VOLUME.T, VOLUME.T + 1], axis=-1).astype(np.int16)  # x, y, z, t
    image = nibabel.Nifti1Image(array, np.eye(4))
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "a.nii")
    assert np.array_equal(read(tmp_path / "a.nii", time=1).pixels[0], VOLUME + 1)


def test_ome_zarr_by_the_type_of_its_axes(tmp_path):
    zarr = pytest.importorskip("zarr")
    write_zarr(tmp_path / "p.zarr" / "0", VOLUME, "cyx", sizes=SIZES[1:])  # an image in a container
    group = zarr.open_group(tmp_path / "p.zarr" / "0", mode="r+")
    ome = group.attrs["ome"]
    for axis, name in zip(ome["multiscales"][0]["axes"], ("channel", "Y", "X"), strict=True):
        axis["name"] = name
    group.attrs["ome"] = ome
    scan = read(tmp_path / "p.zarr" / "0")
    assert scan.spacing == pytest.approx(SIZES[1:])
    assert scan.pixels.shape == (4, 6, 8)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=r"empty\.zarr"):
        read(tmp_path / "empty.zarr")


def test_files_that_are_not_what_they_are_called(tmp_path):
    for name in ("a.ome.tif", "a.nii", "a.dcm"):
        (tmp_path / name).write_bytes(b"something else, long enough to be a header" * 20)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read: \w+"):
            read(tmp_path / name)


def test_nifti_without_unit_or_size(tmp_path):
    path = write_nifti(tmp_path / "b.nii", VOLUME.T.astype(np.int16), (1, 1, 1), "um", code=False)
    with pytest.raises(ValueError, match=r"b\.nii: pixel size 1 along z has no unit"):
        read(path)
    assert read_spacing(path, "um", assumed_unit="mm") == (1000.0,) * 3
    header = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), np.eye(4)).header
    header.set_xyzt_units("mm")
    header.set_sform(np.diag([0.0, 1, 1, 1]), code=1)
    nibabel.save(nibabel.Nifti1Image(VOLUME.T.astype(np.int16), None, header), tmp_path / "c.nii")
    with pytest.raises(ValueError, match=r"c\.nii: a pixel cannot measure 0 mm along x"):
        read(tmp_path / "c.nii")


def test_what_is_no_such_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png: must be one of \.ome\.tif, .* or a folder of DICOM"):
        read(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.nii"):
        read(tmp_path / "missing.nii")
    path = write_nifti(tmp_path / "b.nii", VOLUME.T.astype(np.int16), (1, 1, 1), "mm")
    with pytest.raises(ValueError, match="level must be 0"):
        read(path, level=1)
    with pytest.raises(ValueError, match="'second'"):
        read(path, unit="second")


def write_levels(path, arrays, axes, sizes=SIZES, version="0.5", **options):
    """Writes OME-Zarr with zarr alone; options are those of its arrays."""
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for level, array in enumerate(arrays):
        group.create_array(str(level), data=array, **options)
        scale = [dict(zip("zyx"[-len(sizes) :], sizes, strict=True)).get(axis, 1.0) * 2**level for axis in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    named = [{"name": axis, **kinds.get(axis, {"type": "space", "unit": "micrometer"})} for axis in axes]
    image = {"multiscales": [{"axes": named, "datasets": datasets}]}
    group.attrs.update({"ome": {"version": "0.5", **image}} if version == "0.5" else image)
    return path


def test_a_new_format_is_a_reader_and_a_row_of_the_table(tmp_path, monkeypatch):
    def open_numpy(source, level, image, max_bytes):
        array, sizes = np.load(source.place), {axis: Length(2.0, "um") for axis in "zyx"}
        return StoredImage("zyx", array.shape, array.dtype, array.shape, array.shape, sizes, lambda part: array[part])

    monkeypatch.setattr(formats, "FORMATS", (Format("NumPy", (".npy",), open_numpy), *formats.FORMATS))
    np.save(tmp_path / "a.npy", VOLUME)
    scan = read(tmp_path / "a.npy", "nm", region=[slice(1, 3)] * 3)
    assert scan.spacing == pytest.approx((2000,) * 3)
    assert np.array_equal(scan.pixels[0], VOLUME[1:3, 1:3, 1:3])
    assert np.array_equal(read_lazy(tmp_path / "a.npy").pixels[0].compute(), VOLUME)
    with pytest.raises(ReadError, match="level must be 0 in a format without pyramids"):
        read(tmp_path / "a.npy", level=1)


@pytest.mark.parametrize("ending", [ending for form in formats.FORMATS for ending in form.endings])
@pytest.mark.parametrize("content", [b"", bytes(400), b"no image\n" * 99])
def test_what_is_no_image_is_refused_by_every_format(tmp_path, ending, content):
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    with pytest.raises(ReadError, match=f"^{re.escape(str(path))}: "):
        read(path)


ENDINGS = [".ome.tif", ".ome.zarr", ".nii", ".nii.gz"]


def write_any(path):
    """Writes the volume in the format of the path's ending; NIfTI has bytes in the order of other machines."""
    if path.suffix == ".tif":
        return write_tiff(path, VOLUME, "ZYX", compression="zlib", tile=(16, 16))
    if path.suffix == ".zarr":
        return write_levels(path, [VOLUME], "zyx", chunks=(2, 3, 4))
    header = nibabel.Nifti1Header(endianness=">")
    header.set_xyzt_units("micron")
    nibabel.save(nibabel.Nifti1Image(VOLUME.T.astype(">i2"), np.diag([*SIZES[::-1], 1]), header), path)
    return path


def only_volume(scan, region=()):
    return np.array_equal(scan.pixels, VOLUME[None][(0, *region)][None]) and scan.spacing == pytest.approx(SIZES)


@pytest.mark.parametrize("lazily", [False, True], ids=["read", "read_lazy"])
def test_forked_workers_read_what_their_parent_has_read(tmp_path, lazily):
    paths = [write_any(tmp_path / f"a{ending}") for ending in ENDINGS]

    def load(path):
        pixels = read_lazy(path).pixels.compute(scheduler="synchronous") if lazily else read(path).pixels
        return torch.as_tensor(np.asarray(pixels).astype(int))

    expected = [load(path) for path in paths]
    if lazily:
        read_lazy(paths[1]).pixels.compute()  # starts Dask's pool
    loader = DataLoader(
        paths * 2, batch_size=None, collate_fn=load, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, wanted in zip(loader, expected * 2, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_read_does_not_change_with_the_file(tmp_path, ending):
    path = write_any(tmp_path / f"a{ending}")
    if ending == ".nii":  # in the order of this machine's bytes, and of the axes that come out
        write_nifti(path, VOLUME.T.astype(np.int16), SIZES[::-1], "um")
    read(path)  # whatever is opened once
    before = len(os.listdir("/proc/self/fd"))
    scans = [read(path) for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(path) not in Path("/proc/self/maps").read_text()
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        file.write_bytes(bytes(file.stat().st_size))
        os.truncate(file, 10)
    assert all(only_volume(scan) for scan in scans)
    scans[0].pixels[:] = 0  # memory of its own, that may be written


@pytest.mark.parametrize("options", [{"compression": "lzw"}, {"compression": "jpeg2000"}, {"compression": "zstd"}])
def test_compressions_of_tiff(tmp_path, options):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", **options)
    assert only_volume(read(path))


def test_jpeg_in_tiff(tmp_path):
    colours = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    options = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}}
    scan = read(write_tiff(tmp_path / "a.ome.tif", colours, "YXS", SIZES[1:], **options))
    assert (scan.pixels.permute(1, 2, 0) - torch.tensor([200.0, 100, 50])).abs().max() < 4


def damage_pixels(path):
    """Changes a byte in the middle of what is compressed."""
    if path.is_dir():
        path = path / "0" / "c" / "1" / "1" / "1"
        place = path.stat().st_size - 6  # the checksum
    elif path.suffix == ".tif":
        with tifffile.TiffFile(path) as tiff:
            place = tiff.pages[2].dataoffsets[0] + tiff.pages[2].databytecounts[0] // 2
    else:
        place = path.stat().st_size - 6 if path.suffix == ".gz" else 0
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("ending", [".ome.tif", ".ome.zarr", ".nii.gz"])
def test_damaged_pixels_are_errors_with_the_files_name(tmp_path, ending):
    zarr = pytest.importorskip("zarr")
    path = write_any(tmp_path / f"a{ending}")
    if ending == ".ome.zarr":
        write_levels(path, [VOLUME], "zyx", chunks=(2, 3, 4), compressors=[zarr.codecs.GzipCodec()])
    assert read_spacing(path) == pytest.approx(SIZES)
    damage_pixels(path)
    with pytest.raises(ReadError, match=rf"^{path}: cannot be read: \w+"):
        read(path)
    with pytest.raises(ReadError, match=rf"^{path}: cannot be read: \w+"):
        read_lazy(path).pixels.compute(scheduler="synchronous")
    if ending == ".nii.gz":  # cut off
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ReadError, match=rf"^{path}: cannot be read: EOFError"):
            read(path)


def test_a_tile_that_is_not_there_is_no_black_tile(tmp_path):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib", tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[1].tags["TileByteCounts"].overwrite([0])
    for region in (None, [slice(1, 2), slice(0, 2), slice(0, 2)]):
        with pytest.raises(ReadError, match=r"a\.ome\.tif: a strip or tile is not in the file"):
            read(path, region=region)


def edit_json(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_memory_is_limited_before_it_is_taken(tmp_path):
    huge = np.iinfo(np.int16).max
    nifti = {name: write_any(tmp_path / name) for name in ("a.nii", "a.nii.gz")}
    for path in nifti.values():
        with nibabel.openers.ImageOpener(path) as file:
            content = bytearray(file.read())
        content[42:48] = np.array([huge] * 3, ">i2").tobytes()  # dim[1:4]
        with nibabel.openers.ImageOpener(path, "wb") as file:
            file.write(bytes(content))
    tiff = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib", tile=(16, 16))
    edit_xml(tiff, 'SizeX="8"', 'SizeX="999999999"')
    with tifffile.TiffFile(tiff, mode="r+") as file:
        for page in file.pages:
            page.tags["ImageWidth"].overwrite(999999999)
    shape = write_any(tmp_path / "a.ome.zarr")
    edit_json(shape / "0" / "zarr.json", "4,\n    6,\n    8", "1000000,\n    1000000,\n    8")
    chunk = write_any(tmp_path / "b.ome.zarr")
    edit_json(chunk / "0" / "zarr.json", "2,\n        3,\n        4", "20000000,\n        300000,\n        4")
    promises = [nifti["a.nii.gz"], tiff, shape, chunk]
    for path in promises:
        with guarded(tmp_path, seconds=10):
            assert read_spacing(path) == pytest.approx(SIZES, rel=1e-4)
            with pytest.raises(ReadError, match=rf"^{path}: (takes .* GiB .* max_bytes|must have)"):
                read(path)
    with pytest.raises(ReadError, match=rf"^{nifti['a.nii']}: must have \d+ bytes, as its header says, got"):
        read(nifti["a.nii"])
    for number in (10**30, 10**400):  # more than NumPy or a float has
        endless = write_levels(tmp_path / "c.ome.zarr", [VOLUME], "zyx", chunks=(2, 3, 4))
        edit_json(endless / "0" / "zarr.json", "4,\n    6,\n    8", f"{number},\n    6,\n    8")
        for reader in (read, read_lazy):
            with guarded(tmp_path), pytest.raises(ReadError, match=rf"^{endless}: takes .* GiB to read pixels"):
                reader(endless)
    small = [slice(0, 1), slice(0, 6), slice(0, 8)]
    assert np.array_equal(read(shape, region=small).pixels[0], VOLUME[:1])


def codecs_of(version):
    """The codecs of zarr's users, by name."""
    if version == "0.4":
        numcodecs = pytest.importorskip("numcodecs")
        kinds = {"gzip": "GZip", "zlib": "Zlib", "bz2": "BZ2", "lzma": "LZMA", "zstd": "Zstd", "blosc": "Blosc"}
        return {name: getattr(numcodecs, kind)() for name, kind in {**kinds, "lz4": "LZ4"}.items()}
    codecs = pytest.importorskip("zarr.codecs")
    numcodecs = pytest.importorskip("zarr.codecs.numcodecs")
    own = {"gzip": codecs.GzipCodec(), "zstd": codecs.ZstdCodec(), "blosc": codecs.BloscCodec(cname="lz4")}
    return own | {"zlib": numcodecs.Zlib(), "bz2": numcodecs.BZ2(), "lzma": numcodecs.LZMA(), "lz4": numcodecs.LZ4()}


CODECS = ("gzip", "zlib", "bz2", "lzma", "zstd", "blosc", "lz4")
KINDS_OF_ZARR = pytest.mark.parametrize(
    ("version", "sharded"), [("0.4", False), ("0.5", False), ("0.5", True)], ids=["v2", "v3", "shards"]
)


def write_bomb(path, planes, version, sharded, **options):
    """Writes an image of one chunk of so many planes, then metadata that promise 4."""
    volume, chunks = np.ones((planes, 64, 64), np.uint8), (planes, 64, 64)
    shards = {"shards": chunks} if sharded else {}
    write_levels(path, [volume], "zyx", version=version, chunks=chunks, **shards, **options)
    for file in path.rglob("*"):
        if file.name in ("zarr.json", ".zarray", ".zmetadata"):
            file.write_text(re.sub(rf"\b{planes}\b", "4", file.read_text()))
    return path


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
@pytest.mark.parametrize("codec", [*CODECS, "two"])
@KINDS_OF_ZARR
def test_chunks_of_ome_zarr_decode_to_no_more_than_they_promise(tmp_path, version, sharded, codec):
    codecs = codecs_of(version)
    filters = {"filters": [codecs["gzip"]]} if (version, codec) == ("0.4", "two") else {}
    compressors = [codecs[name] for name in (("gzip", "zstd")[bool(filters) :] if codec == "two" else (codec,))]
    good = write_bomb(tmp_path / "good.zarr", 4, version, sharded, compressors=compressors, **filters)
    assert np.array_equal(read(good).pixels, np.ones((1, 4, 64, 64)))
    assert np.array_equal(read_lazy(good).pixels.compute(scheduler="synchronous"), np.ones((1, 4, 64, 64)))
    path = write_bomb(tmp_path / "a.zarr", 2**10 + 1, version, sharded, compressors=compressors, **filters)
    tracemalloc.start()
    with pytest.raises(ReadError, match=rf"^{path}: cannot be read: ValueError: a chunk does not decode to at most"):
        read(path)
    with pytest.raises(ReadError, match=rf"^{path}: cannot be read: ValueError: a chunk does not decode to at most"):
        read_lazy(path).pixels.compute(scheduler="synchronous")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21  # the chunk decodes to 2**22 bytes


@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3")
def test_codecs_that_only_change_pixels(tmp_path):
    numcodecs, codecs = pytest.importorskip("numcodecs"), pytest.importorskip("zarr.codecs")
    numbers = pytest.importorskip("zarr.codecs.numcodecs")
    old = {"version": "0.4", "chunks": (2, 3, 4)}
    new = {"chunks": (2, 3, 4)}
    backwards = codecs.TransposeCodec(order=(2, 1, 0))
    inner = codecs.ShardingCodec(chunk_shape=(2, 3, 4), codecs=[codecs.BytesCodec(), codecs.GzipCodec()])
    for index, options in enumerate(
        [
            old | {"compressors": None},
            old | {"filters": [numcodecs.Delta("<u2")], "compressors": numcodecs.Zstd()},
            old | {"filters": [numcodecs.Shuffle(2), numcodecs.CRC32()], "compressors": numcodecs.LZ4()},
            new | {"filters": [backwards, numbers.Delta(dtype="<u2")]},
            new | {"filters": [numbers.AsType(encode_dtype="<f4", decode_dtype="<u2")]},
            new | {"compressors": [codecs.ZstdCodec(), codecs.Crc32cCodec()]},
            new | {"shards": (4, 6, 8), "filters": [backwards]},
            {"chunks": (4, 6, 8), "serializer": inner, "compressors": [codecs.GzipCodec()]},
        ]
    ):
        assert only_volume(read(write_levels(tmp_path / f"{index}.zarr", [VOLUME], "zyx", **options)))


@pytest.mark.parametrize(
    "config", ['{"id": "base64"}', '{"id": "astype", "encode_dtype": "<u2", "decode_dtype": "<U999"}']
)
def test_codecs_that_may_decode_to_anything(tmp_path, config):
    path = write_levels(tmp_path / "a.zarr", [VOLUME], "zyx", version="0.4", compressors=None)
    edit_json(path / "0" / ".zarray", '"filters": null', f'"filters": [{config}]')
    with (
        guarded(path),
        pytest.raises(ReadError, match=rf"^{path}: cannot be read: ValueError: codec .*(one of|numbers)"),
    ):
        read(path)


def test_other_codecs_are_read_without_a_limit(tmp_path):
    numcodecs = pytest.importorskip("numcodecs")
    path = write_levels(tmp_path / "a.zarr", [VOLUME > 9], "zyx", version="0.4", filters=[numcodecs.PackBits()])
    with pytest.raises(ReadError, match=r"codec must be one of .*, or max_bytes None for any, got 'packbits'"):
        read(path)
    assert np.array_equal(read(path, max_bytes=None).pixels[0], VOLUME > 9)
    assert read_spacing(path) == pytest.approx(SIZES)


def test_inner_chunks_are_counted(tmp_path):
    path = write_levels(tmp_path / "a.zarr", [VOLUME], "zyx", chunks=(2, 3, 4), shards=(4, 6, 8))
    text = re.sub(r"\s+", "", (path / "0" / "zarr.json").read_text())
    text = text.replace("[4,6,8]", "[4000000,6,8]").replace("[2,3,4]", "[1,1,1]")
    (path / "0" / "zarr.json").write_text(text)
    for reader in (read, read_lazy):
        with guarded(tmp_path), pytest.raises(ReadError, match=rf"^{path}: takes 183\.1 GiB to read pixels"):
            reader(path)


@pytest.mark.parametrize("compression", ["zlib", "zstd", "lzw", "lzma", "packbits", "jpeg", "jpeg2000", "png"])
def test_tiles_of_ome_tiff_decode_to_no_more_than_they_promise(tmp_path, compression):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    path, size = tmp_path / "a.ome.tif", 2048
    image = np.ones((size, size), np.uint8)
    tile = {"tile": (size, size), "photometric": "minisblack"}
    write_tiff(path, image, "YX", SIZES[1:], compression=compression, **tile)
    for region in (None, [slice(3, 9)] * 2):
        read(path, region=region)  # whatever is imported once
    for axis in "XY":
        edit_xml(path, f'Size{axis}="{size}"', f'Size{axis}="32"')
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for tag in ("ImageLength", "TileLength", "ImageWidth", "TileWidth"):
            tiff.pages[0].tags[tag].overwrite(32)
    for region in (None, [slice(3, 9)] * 2):
        peak = peak_of(lambda region=region: read(path, region=region), path, compression in ("lzw", "lzma"))
        assert peak < 2**20  # the tile decodes to 2**22 bytes


def peak_of(reader, path, may_read):
    """Returns the bytes that a refusal takes; some decoders read no further than they need."""
    tracemalloc.start()
    with contextlib.nullcontext() if may_read else pytest.raises(ReadError, match=rf"^{path}: "):
        reader()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_gzipped_nifti_is_inflated_no_further_than_its_pixels(tmp_path):
    path = write_any(tmp_path / "a.nii.gz")
    read(path)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**24)))
    for region in (None, [slice(1, 2)] * 3):
        assert peak_of(lambda region=region: read(path, region=region), path, False) < 2**20


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_limit_of_memory_is_the_callers(tmp_path, ending):
    path = write_any(tmp_path / f"a{ending}")
    with pytest.raises(ReadError, match=r"max_bytes allows 383: raise it, or read a region"):
        read(path, max_bytes=383)
    assert only_volume(read(path, max_bytes=16 * 1024))
    assert only_volume(read(path, max_bytes=None))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_region_is_the_same_part_of_the_whole(tmp_path, ending):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    path = write_any(tmp_path / f"a{ending}")
    for region in (
        [slice(1, 3), slice(2, 6), slice(3, 4)],
        [slice(None), slice(None), slice(None)],
        [slice(2, None), slice(None, 5), slice(0, 8, 1)],
        (slice(3, 4), slice(None), slice(None)),
    ):
        scan = read(path, region=region)
        assert only_volume(scan, region)
        assert scan.pixels.is_contiguous()
    for region, message in (
        ([slice(0, 2)] * 2, "region must have one slice for each of z, y, x, got 2"),
        ([slice(0, 9)] * 3, r"region along z must be in slice\(0, 4\)"),
        ([slice(2, 2)] * 3, "region along z"),
        ([slice(-2, None)] * 3, "region along z"),
        ([slice(None), slice(None, None, 2), slice(None)], "region along y"),
    ):
        with pytest.raises(ValueError, match=rf"^{path}: {message}"):
            read(path, region=region)


def test_regions_of_colours_and_times(tmp_path):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    colours = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    path = write_tiff(tmp_path / "a.ome.tif", colours, "YXS", SIZES[1:], photometric="rgb", tile=(16, 16))
    region = (slice(3, 30), slice(20, 45))
    assert np.array_equal(read(path, region=region).pixels, colours[region].transpose(2, 0, 1))
    times = np.arange(3 * 2 * 5 * 20 * 30, dtype=np.uint16).reshape(3, 2, 5, 20, 30)
    region = (slice(1, 3), *(slice(2, 18),) * 2)
    for path, axes in ((tmp_path / "b.ome.tif", "TCZYX"), (tmp_path / "b.ome.zarr", "tczyx")):
        write_tiff(path, times, axes) if axes.isupper() else write_levels(path, [times], axes, chunks=(1, 1, 2, 8, 8))
        assert np.array_equal(read(path, time=2).pixels, times[2])
        assert np.array_equal(read(path, time=2, region=region).pixels, times[2][(slice(None), *region)])
        assert np.array_equal(read_lazy(path, time=2).pixels.compute(), times[2])


def test_a_region_reads_only_the_chunks_that_it_needs(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    region = (slice(2, 14), slice(3, 12))
    path = write_levels(tmp_path / "a.zarr", [image], "yx", SIZES[1:], chunks=(16, 16))
    for file in (path / "0" / "c").rglob("*"):
        if file.is_file() and file != path / "0" / "c" / "0" / "0":
            file.write_bytes(b"damaged")
    assert np.array_equal(read(path, region=region).pixels[0], image[region])
    path = write_tiff(tmp_path / "a.ome.tif", image, "YX", SIZES[1:], compression="zlib", tile=(16, 16))
    with tifffile.TiffFile(path) as tiff:
        offsets = tiff.pages[0].dataoffsets
    content = bytearray(path.read_bytes())
    for offset in offsets[1:]:
        content[offset + 10] ^= 0xFF
    path.write_bytes(content)
    assert np.array_equal(read(path, region=region).pixels[0], image[region])
    dask = pytest.importorskip("dask")
    with dask.config.set({"array.chunk-size": "300B"}):
        assert np.array_equal(read_lazy(path).pixels[0][region].compute(), image[region])
    volume = np.arange(64**3, dtype=np.int16).reshape(64, 64, 64)
    path = write_nifti(tmp_path / "a.nii", volume.T, SIZES[::-1], "um")
    file = Counting(path.read_bytes())
    part = [slice(5, 7), slice(None), slice(None)]
    assert np.array_equal(read(file, format=".nii", region=part).pixels[0], volume[5:7])
    assert file.count < 3 * 64**2 * 2


class Counting(io.BytesIO):
    count = 0

    def read(self, size=-1):
        content = super().read(size)
        self.count += len(content)
        return content

    def readinto(self, target):
        size = super().readinto(target)
        self.count += size
        return size


@pytest.mark.parametrize("ending", [".ome.tif", ".nii", ".nii.gz"])
def test_file_objects(tmp_path, ending):
    content = write_any(tmp_path / f"a{ending}").read_bytes()
    for file in (io.BytesIO(content), (tmp_path / f"a{ending}").open("rb")):
        with contextlib.closing(file):
            file.seek(7)
            assert only_volume(read(file, format=ending))
            assert only_volume(read(file, format=f"0001{ending}"))
            assert read_spacing(file, format=ending) == pytest.approx(SIZES)
            assert not file.closed
    with (tmp_path / f"a{ending}").open("rb") as file:  # has a name
        assert only_volume(read(file))
    with pytest.raises(ReadError, match=rf"^cells{ending}: "):
        read(io.BytesIO(content[:300]), format=f"cells{ending}")
    with pytest.raises(ValueError, match=r"^BytesIO: must be one of \.ome\.tif"):
        read(io.BytesIO(content))
    with pytest.raises(ValueError, match=r"read_lazy reads paths"):
        read_lazy(io.BytesIO(content), format=ending)
    with pytest.raises(ValueError, match=r"OME-Zarr must be a path, an address or a zarr\.Group"):
        read(io.BytesIO(content), format=".zarr")
    for source in (5, None, content):
        with pytest.raises(ValueError, match=r"source must be a path, an address, .*, got (int|NoneType|bytes)"):
            read(source, format=ending)


@pytest.mark.parametrize("ending", ENDINGS)
def test_addresses(tmp_path, ending):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    fsspec = pytest.importorskip("fsspec")
    path = write_any(tmp_path / f"a{ending}")
    files = fsspec.filesystem("memory")
    files.put(str(path), f"/rat/{path.name}", recursive=True)
    try:
        for address in (f"memory://rat/{path.name}", f"file://{path}"):
            assert only_volume(read(address))
            assert only_volume(read(address, region=[slice(1, 3)] * 3), [slice(1, 3)] * 3)
            assert read_spacing(address) == pytest.approx(SIZES)
            assert np.array_equal(read_lazy(address).pixels.compute(scheduler="synchronous")[0], VOLUME)
    finally:
        files.rm("/rat", recursive=True)
    with pytest.raises(FileNotFoundError, match=rf"memory://rat/{path.name}: there is no such file"):
        read(f"memory://rat/{path.name}")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_groups_of_zarr(tmp_path, version):
    zarr = pytest.importorskip("zarr")
    path = write_levels(tmp_path / "a.zarr", [VOLUME, VOLUME[::2, ::2, ::2]], "zyx", version=version, chunks=(2, 3, 4))
    group = zarr.open_group(path, mode="r")
    assert only_volume(read(group))
    assert read(group, level=1).spacing == pytest.approx([2 * size for size in SIZES])
    assert np.array_equal(read_lazy(group, level=1).pixels[0].compute(), VOLUME[::2, ::2, ::2])
    memory = zarr.create_group(zarr.storage.MemoryStore())
    with pytest.raises(ReadError, match=r"^memory://.*: must be an image of OME-Zarr 0\.4 or later"):
        read(memory)


@pytest.mark.parametrize("ending", ENDINGS)
def test_lazy_pixels_are_those_that_are_read(tmp_path, ending):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    path = write_any(tmp_path / f"a{ending}")
    lazy, whole = read_lazy(path, "nm"), read(path, "nm")
    assert lazy.spacing == whole.spacing
    assert lazy.pixels.shape == whole.pixels.shape
    assert lazy.pixels.dtype == whole.pixels.numpy().dtype
    for part in (np.s_[:], np.s_[:, 1:3, ::2, 5], np.s_[0, ::-1, 2:, ::-2], np.s_[:, [2, 0], :, 1:2]):
        assert np.array_equal(lazy.pixels[part].compute(scheduler="synchronous"), whole.pixels.numpy()[part])
    with pytest.raises(ReadError, match="max_bytes allows 10"):
        read_lazy(path, max_bytes=10)


def test_rescaled_nifti(tmp_path):
    image = nibabel.Nifti1Image(VOLUME.T.astype(np.int16), np.eye(4))
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii.gz")
    stored = nibabel.load(tmp_path / "a.nii.gz")
    assert np.array_equal(read(tmp_path / "a.nii.gz").pixels[0], np.asarray(stored.dataobj).T)
    assert read_lazy(tmp_path / "a.nii.gz").pixels.dtype == read(tmp_path / "a.nii.gz").pixels.numpy().dtype


def test_planes_in_other_files_of_the_folder_and_of_no_other(tmp_path):
    pytest.importorskip("zarr")  # with which parts of TIFF's planes are read
    first, second = tmp_path / "set" / "a.ome.tif", tmp_path / "set" / "b.ome.tif"
    first.parent.mkdir()
    for path, planes in ((first, VOLUME[:2]), (second, VOLUME[2:])):
        write_tiff(path, planes, "ZYX", compression="zlib")
    edit_xml(first, 'SizeZ="2"', 'SizeZ="4"')
    with tifffile.TiffFile(first) as tiff:
        xml = tiff.ome_metadata
    start = xml.index("<TiffData")
    end = xml.index("/>", start) + 2
    planes = "".join(
        f'<TiffData FirstZ="{z}" IFD="0" PlaneCount="2"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
        for z, name in ((0, "a.ome.tif"), (2, "b.ome.tif"))
    )
    tifffile.tiffcomment(first, (xml[:start] + planes + xml[end:]).encode())
    assert only_volume(read(first))
    for _ in range(2):  # zarr keeps a loop of its own from the first time on
        before = len(os.listdir("/proc/self/fd"))
        assert only_volume(read(first, region=(slice(1, 3), slice(2, 5), slice(2, 5))), np.s_[1:3, 2:5, 2:5])
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ReadError, match=r"planes are missing: (.* )?other files have its planes"):
        read(io.BytesIO(first.read_bytes()), format=".ome.tif")
    shutil.copy(second, tmp_path / "b.ome.tif")
    for elsewhere in ("../b.ome.tif", str(tmp_path / "b.ome.tif"), "..\\b.ome.tif", "http://localhost/b.ome.tif"):
        broken = tmp_path / "set" / "c.ome.tif"
        tifffile.imwrite(broken, VOLUME[:2], metadata=None, photometric="minisblack", compression="zlib")
        text = (xml[:start] + planes + xml[end:]).replace("b.ome.tif", elsewhere)
        tifffile.tiffcomment(broken, text.encode())
        with guarded(broken.parent), pytest.raises(ReadError, match=rf"^{broken}: planes must be in files of the same"):
            read(broken)


def test_a_file_that_was_renamed_after_its_metadata_were_written(tmp_path):
    """As Bio-Formats writes them: each plane by itself, with the name that the file had."""
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        xml = tiff.ome_metadata
    start = xml.index("<TiffData")
    end = xml.index("/>", start) + 2
    uuid = '<UUID FileName="before.ome.tif">urn:uuid:1</UUID>'
    planes = "".join(f'<TiffData FirstZ="{z}" IFD="{z}" PlaneCount="1">{uuid}</TiffData>' for z in range(4))
    opening = xml.index("<OME ") + len("<OME ")
    root = xml[:opening] + re.sub(r'UUID="[^"]*"', "", xml[opening:start])
    tifffile.tiffcomment(path, (root.replace("<OME ", '<OME UUID="urn:uuid:1" ') + planes + xml[end:]).encode())
    assert only_volume(read(path))


@pytest.mark.parametrize(
    "elsewhere", ["../b.zarr/0", "/b.zarr/0", "0/../../b.zarr/0", "file:///etc", "s3://a/b", "", "."]
)
def test_levels_in_no_other_folder(tmp_path, elsewhere):
    for name in ("a.zarr", "b.zarr"):
        write_levels(tmp_path / name, [VOLUME], "zyx")
    path = tmp_path / "a.zarr"
    edit_json(path / "zarr.json", '"path": "0"', f'"path": "{elsewhere}"')
    with guarded(path), pytest.raises(ReadError, match=rf"^{path}: a level must be in the image's own folder"):
        read(path)


def test_no_pickles_in_ome_zarr(tmp_path):
    path = write_levels(tmp_path / "a.zarr", [VOLUME], "zyx", version="0.4", compressors=None)
    for name, codec in (("compressor", '{"id": "pickle", "protocol": 5}'), ("filters", '[{"id": "pickle"}]')):
        other = shutil.copytree(path, tmp_path / f"{name}.zarr")
        edit_json(other / "0" / ".zarray", f'"{name}": null', f'"{name}": {codec}')
        if (other / ".zmetadata").exists():
            (other / ".zmetadata").unlink()
        with guarded(other), pytest.raises(ReadError, match=rf"^{other}: (cannot be read|pixels must not be pickled)"):
            read(other)


def test_ome_zarr_without_zarr(tmp_path, monkeypatch):
    path, tiff = write_levels(tmp_path / "a.zarr", [VOLUME], "zyx"), write_any(tmp_path / "a.ome.tif")
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert only_volume(read(tiff, region=[slice(1, 3), slice(None), slice(None)]), [slice(1, 3)])
    message = r"^zarr is not installed: pip install 'rat-timm\[data\]'$"
    for version in ((3, 11, 0), (3, 10, 13)):  # there the extra leaves zarr out
        monkeypatch.setattr(sys, "version_info", version)
        for image, region in ((path, None), (tiff, [slice(1, 3)] * 3)):
            with pytest.raises(ImportError, match=message):
                read(image, region=region)
        message = r"^OME-Zarr and regions of OME-TIFF need Python 3\.11 or later, for zarr does; this is 3\.10$"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"scale": [', '"scale": [1.0, ', "must have one scale of 3 numbers"),
        ('"type": "scale"', '"type": "affine"', "must have one scale"),
        ("0.065", "true", "must have one scale of 3 numbers"),
        ("0.065", '"0.065"', "must have one scale of 3 numbers"),
        ("0.065", "-1", "a pixel cannot measure -1 micrometer along y"),
        ("0.065", "1" + "0" * 400, "a pixel cannot measure"),
        ('"name": "z"', '"name": "y"', "axes must differ"),
        ('"name": "z"', '"name": "depth"', r"has 4 entries along the axis '\?'"),
        ('"axes"', '"axis"', "must be an image of OME-Zarr 0.4 or later"),
        ('"multiscales"', '"plate"', "must be an image of OME-Zarr 0.4 or later"),
        ('"path": "0"', '"path": "1"', "cannot be read: KeyError"),
        ('"micrometer"', '"?m"', "unit along z must be a length"),
        ('"micrometer"', "5", "unit along z must be a length"),
    ],
)
def test_absurd_metadata_of_ome_zarr(tmp_path, old, new, message):
    path = write_levels(tmp_path / "a.zarr", [VOLUME], "zyx")
    file = path / "zarr.json"
    compact = " ".join(file.read_text().split()).replace("[ ", "[")
    file.write_text(compact)
    edit_json(file, old, new)
    with pytest.raises(ReadError, match=rf"^{path}: {message}"):
        read(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="true"', "no pixel size along x, got 'true'"),
        ('PhysicalSizeX="0.13"', 'PhysicalSizeX="1_000"', "no pixel size along x, got '1_000'"),
        ('PhysicalSizeXUnit="µm"', 'PhysicalSizeXUnit="?m"', r"unit along x must be a length, got '\?m'"),
        ('PhysicalSizeXUnit="µm"', 'PhysicalSizeXUnit="9**9**9**9*um"', "unit along x must be a length"),
        ('PhysicalSizeXUnit="µm"', 'PhysicalSizeXUnit="m"', "a pixel cannot measure 0.13 m along x"),
        ('Type="uint16"', 'Type="int16"', "pixels must be of the type 'int16' of the metadata, got uint16"),
        ('Type="uint16"', 'Type="five"', "cannot be read: TypeError"),
        ('SizeZ="4"', 'SizeZ="3"', "planes are missing or too many"),
        ('SizeZ="4"', 'SizeZ="4000000000"', "cannot be read: SizeZ must be a number"),
        ('SizeZ="4"', 'SizeZ="-4"', "cannot be read: SizeZ must be a number"),
        ('SizeT="1"', 'SizeT="999999999"', "planes are missing or too many"),
        ('PlaneCount="4"', 'PlaneCount="999999999"', "planes are missing or too many"),
        ('IFD="0"', 'IFD="1"', "planes are missing"),
        ('SizeX="8"', 'SizeX="9"', "planes are missing"),
        ('SizeX="8"', 'SizeX="999999999"', "planes are missing"),
    ],
)
def test_absurd_metadata_of_ome_tiff(tmp_path, old, new, message):
    path = write_tiff(tmp_path / "a.ome.tif", VOLUME, "ZYX", compression="zlib")
    edit_xml(path, old, new)
    with guarded(tmp_path, seconds=5), pytest.raises(ReadError, match=rf"^{path}: {message}"):
        read(path)


def test_a_header_of_nifti_that_is_not_of_its_pixels(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        path = write_any(tmp_path / name)
        with nibabel.openers.ImageOpener(path) as file:
            content = bytearray(file.read())
        for place, value in ((43, 7), (43, 9), (108, 0x7F), (344, 0x40)):  # dim[1], vox_offset, magic
            changed = content.copy()
            changed[place] = value
            with nibabel.openers.ImageOpener(path, "wb") as file:
                file.write(bytes(changed))
            with pytest.raises(ReadError, match=rf"^{path}: "):
                read(path)


def test_dicom_from_file_objects_and_addresses(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    path = make(tmp_path / "a.dcm", VOLUME[0], spacing=(0.7, 0.3))
    content = path.read_bytes()
    files = fsspec.filesystem("memory")
    files.pipe("/rat/a.dcm", content)
    for source, form in ((io.BytesIO(content), "0001.dcm"), ("memory://rat/a.dcm", None), (path, None)):
        scan = read(source, "mm", format=form, region=(slice(1, 4), slice(2, 7)))
        assert scan.spacing == pytest.approx((0.7, 0.3))
        assert np.array_equal(scan.pixels[0], VOLUME[0, 1:4, 2:7])
        with pytest.raises(ReadError, match=r"a\.dcm|0001\.dcm: takes .* max_bytes allows 100"):
            read(source, format=form, max_bytes=100)
    files.rm("/rat", recursive=True)
    with pytest.raises(ReadError, match=r"^0001\.dcm: "):
        read(io.BytesIO(content[:200]), format="0001.dcm")
    with pytest.raises(ValueError, match=r"a\.dcm: read_lazy reads paths of OME-TIFF, OME-Zarr, NIfTI"):
        read_lazy(path)
