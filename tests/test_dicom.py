import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from rat_timm.data import read, read_spacing

TURN = [0.8, 0.6, 0, -0.6, 0.8, 0]  # of rows and columns; the normal is z
SERIES = generate_uid()


def make(path, pixels, position=None, spacing=(0.7, 0.3), series=SERIES, storage=CTImageStorage, **others):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = storage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.SeriesInstanceUID = storage, meta.MediaStorageSOPInstanceUID, series
    data.Rows, data.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    if spacing is not None:
        data.PixelSpacing = list(spacing)
    if position is not None:
        data.ImagePositionPatient, data.ImageOrientationPatient = position, TURN
    for name, value in others.items():
        setattr(data, name, value)
    data.PixelData = pixels.astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def make_series(folder, heights, **others):
    folder.mkdir()
    planes = [np.full((4, 6), 10 * index) for index in range(len(heights))]
    for index, height in enumerate(heights):  # names in another order than places
        make(folder / f"{(7 * index) % 11:02}.dcm", planes[index], [3.0, 5.0, height], SliceThickness=9, **others)
    return folder


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("um", 1e3), ("nm", 1e6)])
def test_one_image(tmp_path, unit, factor):
    path = make(tmp_path / "a.dcm", np.arange(24).reshape(4, 6), RescaleSlope=2, RescaleIntercept=-1000)
    scan = read(path, unit=unit)
    assert scan.spacing == pytest.approx((0.7 * factor, 0.3 * factor), rel=1e-6)
    assert np.array_equal(scan.pixels, 2 * np.arange(24).reshape(1, 4, 6) - 1000)


def test_slices_are_sorted_and_as_far_apart_as_their_positions(tmp_path):
    scan = read(make_series(tmp_path / "s", [-1.0, 1.5, 4.0, 6.5]), unit="mm")
    assert scan.spacing == pytest.approx((2.5, 0.7, 0.3), rel=1e-6)
    assert scan.pixels.shape == (1, 4, 4, 6)
    assert scan.pixels[0, :, 0, 0].tolist() == [0, 10, 20, 30]


def test_slices_that_are_no_volume(tmp_path):
    with pytest.raises(ValueError, match="s: slices must be evenly spaced, distances are 1 to 2 mm"):
        read(make_series(tmp_path / "s", [0.0, 1.0, 3.0]))
    with pytest.raises(ValueError, match="t: slices must be evenly spaced, distances are 0 to"):
        read(make_series(tmp_path / "t", [0.0, 0.0, 1.0]))
    folder = make_series(tmp_path / "u", [0.0, 1.0])
    make(folder / "other.dcm", np.zeros((4, 6)), [3.0, 5.0, 2.0], series=generate_uid())
    with pytest.raises(ValueError, match="u: must have the slices of one series, of one size, got 2 kinds"):
        read(folder)
    folder = make_series(tmp_path / "v", [0.0, 1.0])
    make(folder / "other.dcm", np.zeros((4, 6)))
    with pytest.raises(ValueError, match="v: slices have no position"):
        read(folder)
    (tmp_path / "w").mkdir()
    with pytest.raises(ValueError, match="w: has no DICOM image"):
        read(tmp_path / "w")


def test_a_folder_of_one_slice_is_an_image(tmp_path):
    assert read(make_series(tmp_path / "s", [2.0]), unit="mm").spacing == pytest.approx((0.7, 0.3))


def test_no_pixel_size(tmp_path):
    path = make(tmp_path / "a.dcm", np.zeros((4, 6)), spacing=None, ImagerPixelSpacing=[1, 1])
    with pytest.raises(ValueError, match=r"a\.dcm: no pixel size along y"):
        read(path)
    path = make(tmp_path / "b.dcm", np.zeros((3, 4, 6)))
    with pytest.raises(ValueError, match=r"b\.dcm: no pixel size along z"):
        read(path)


def group(sequence, **values):
    """A functional group with one sequence of one item."""
    item, outer = Dataset(), Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    setattr(outer, sequence, [item])
    return outer


def merge(*groups):
    merged = Dataset()
    for each in groups:
        merged.update(each)
    return merged


MEASURES = group("PixelMeasuresSequence", PixelSpacing=[0.7, 0.3], SpacingBetweenSlices=8.0)
ORIENTATION = group("PlaneOrientationSequence", ImageOrientationPatient=TURN)


def at(height, aside=0.0):
    return group("PlanePositionSequence", ImagePositionPatient=[0, aside, height])


def enhanced(path, frames, shared, **others):
    pixels = np.arange(3 * 24).reshape(3, 4, 6)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    return make(path, pixels, spacing=None, storage=EnhancedMRImageStorage, **groups, **others)


def test_enhanced_images_have_their_sizes_in_groups(tmp_path):
    shared = merge(MEASURES, ORIENTATION)
    scan = read(enhanced(tmp_path / "a.dcm", [at(4), at(2), at(0)], shared), unit="mm")
    assert scan.spacing == pytest.approx((2.0, 0.7, 0.3), rel=1e-6)
    assert torch.equal(scan.pixels.flatten(), torch.arange(3 * 24).to(scan.pixels))
    assert read_spacing(enhanced(tmp_path / "b.dcm", [], shared), "mm") == pytest.approx((8.0, 0.7, 0.3), rel=1e-6)
    with pytest.raises(ValueError, match=r"c\.dcm: slices must be evenly spaced"):
        read(enhanced(tmp_path / "c.dcm", [at(4), at(0), at(2)], shared))  # not in order of place


def test_groups_of_each_frame(tmp_path):
    frames = [merge(at(height), MEASURES, ORIENTATION) for height in (0, 2, 4)]
    empty = group("FrameAnatomySequence", FrameLaterality="U")
    scan = read(enhanced(tmp_path / "a.dcm", frames, empty), unit="mm")
    assert scan.spacing == pytest.approx((2.0, 0.7, 0.3), rel=1e-6)
    frames[1] = merge(at(2), group("PixelMeasuresSequence", PixelSpacing=[0.7, 0.4]), ORIENTATION)
    with pytest.raises(ValueError, match=r"b\.dcm: slices must have one pixel size"):
        read(enhanced(tmp_path / "b.dcm", frames, empty))


def test_enhanced_images_are_rescaled(tmp_path):
    frames = [
        merge(at(2 * n), group("PixelValueTransformationSequence", RescaleSlope=n + 1, RescaleIntercept=-1024))
        for n in range(3)
    ]
    scan = read(enhanced(tmp_path / "a.dcm", frames, merge(MEASURES, ORIENTATION)), unit="mm")
    expected = np.arange(72).reshape(3, 4, 6) * np.array([1, 2, 3]).reshape(3, 1, 1) - 1024
    assert np.array_equal(scan.pixels[0], expected)


def test_a_folder_of_one_file_is_that_file(tmp_path):
    (tmp_path / "e").mkdir()
    enhanced(tmp_path / "e" / "1.dcm", [at(0), at(2), at(4)], merge(MEASURES, ORIENTATION))
    assert read(tmp_path / "e", unit="mm").spacing == pytest.approx((2.0, 0.7, 0.3))
    (tmp_path / "f").mkdir()
    for name in "ab":
        make(tmp_path / "f" / f"{name}.dcm", np.zeros((3, 4, 6)), [0, 0, 0], SpacingBetweenSlices=2)
    for reader in (read, read_spacing):
        with pytest.raises(ValueError, match="f: must have the slices of one series"):
            reader(tmp_path / "f")


def test_slices_have_to_be_parallel_and_above_each_other(tmp_path):
    folder = make_series(tmp_path / "s", [0.0, 1.0])
    make(folder / "other.dcm", np.zeros((4, 6)), [3.0, 5.0, 2.0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    with pytest.raises(ValueError, match="s: slices must be parallel"):
        read(folder)
    frames = [at(2 * n, aside=5 * n) for n in range(3)]
    with pytest.raises(ValueError, match=r"t\.dcm: slices must lie one above the other"):
        read(enhanced(tmp_path / "t.dcm", frames, merge(MEASURES, ORIENTATION)))


@pytest.mark.parametrize(("step", "digits"), [(1.25, 1), (0.3125, 2), (2.5, 6)])
def test_positions_may_be_rounded(tmp_path, step, digits):
    folder = make_series(tmp_path / "s", [round(step * n, digits) for n in range(9)])
    assert read(folder, unit="mm").spacing[0] == pytest.approx(step, abs=0.3 * 10**-digits)


def test_a_missing_slice_is_no_rounding(tmp_path):
    with pytest.raises(ValueError, match="evenly spaced, distances are 1 to 2 mm"):
        read(make_series(tmp_path / "s", [float(n) for n in range(10) if n != 6]))


def test_what_is_no_image_in_a_folder(tmp_path):
    folder = make_series(tmp_path / "s", [0.0, 1.0, 2.0])
    data = pydicom.dcmread(pydicom.data.get_testdata_file("reportsi.dcm", download=False))
    data.save_as(folder / "report.dcm")
    assert read(folder, unit="mm").pixels.shape == (1, 3, 4, 6)
    with pytest.raises(ValueError, match=r"report\.dcm: has no DICOM image"):
        read(folder / "report.dcm")


def test_the_real_files_of_pydicom():
    for name, spacing in {"CT_small.dcm": (0.661468, 0.661468), "MR_small.dcm": (0.3125, 0.3125)}.items():
        path = pydicom.data.get_testdata_file(name, download=False)
        assert read_spacing(path, "mm") == pytest.approx(spacing, rel=1e-6)
    dose = pydicom.data.get_testdata_file("rtdose.dcm", download=False)
    scan = read(dose, unit="mm")
    assert scan.spacing == pytest.approx((5.0, 10.0, 10.0))
    stored = pydicom.dcmread(dose)
    assert np.allclose(scan.pixels[0], stored.pixel_array * float(stored.DoseGridScaling))
