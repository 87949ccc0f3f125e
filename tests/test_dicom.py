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
    with pytest.raises(ValueError, match="w: has no DICOM files"):
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


def enhanced(path, heights, **others):
    measures = Dataset()
    measures.PixelSpacing, measures.SpacingBetweenSlices = [0.7, 0.3], 8.0
    orientation = Dataset()
    orientation.ImageOrientationPatient = TURN
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    frames = []
    for height in heights:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, height]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    groups = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames}
    pixels = np.arange(3 * 24).reshape(3, 4, 6)
    return make(path, pixels, spacing=None, storage=EnhancedMRImageStorage, **groups, **others)


def test_enhanced_images_have_their_sizes_in_groups(tmp_path):
    scan = read(enhanced(tmp_path / "a.dcm", [4.0, 2.0, 0.0]), unit="mm")
    assert scan.spacing == pytest.approx((2.0, 0.7, 0.3), rel=1e-6)
    assert torch.equal(scan.pixels.flatten(), torch.arange(3 * 24).to(scan.pixels))
    assert read_spacing(enhanced(tmp_path / "b.dcm", []), "mm") == pytest.approx((8.0, 0.7, 0.3), rel=1e-6)
    with pytest.raises(ValueError, match=r"c\.dcm: slices must be evenly spaced"):
        read(enhanced(tmp_path / "c.dcm", [4.0, 0.0, 2.0]))  # not in order of place


def test_the_real_files_of_pydicom(monkeypatch):
    files = {"CT_small.dcm": (0.661468, 0.661468), "MR_small.dcm": (0.3125, 0.3125), "liver_1frame.dcm": None}
    for name, spacing in files.items():
        path = pydicom.data.get_testdata_file(name, download=False)
        if spacing is not None:
            assert read_spacing(path, "mm") == pytest.approx(spacing, rel=1e-6)
    dose = pydicom.data.get_testdata_file("rtdose.dcm", download=False)
    assert read(dose, unit="mm").pixels.shape == (1, 15, 10, 10)
    assert read_spacing(dose, "mm") == pytest.approx((5.0, 10.0, 10.0))
