import nibabel
import numpy as np
import pytest
import tifffile
import torch

from rat_timm.data import read, read_spacing

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
