import io
import math
import shutil
import tracemalloc
import zlib
from typing import NamedTuple

import fuzz_dicom
import numpy as np
import pydicom
import pytest
import torch
from fuzzing import count
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from rat_timm.data import read, read_spacing
from rat_timm.data.errors import ReadError
from rat_timm.data.readers import dicom

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
    with pytest.raises(ReadError, match=r"badVR\.dcm: cannot be read: ValueError: NumberOfFrames must be"):
        read(pydicom.data.get_testdata_file("badVR.dcm", download=False))
    for name, spacing in {"CT_small.dcm": (0.661468, 0.661468), "MR_small.dcm": (0.3125, 0.3125)}.items():
        path = pydicom.data.get_testdata_file(name, download=False)
        assert read_spacing(path, "mm") == pytest.approx(spacing, rel=1e-6)
    dose = pydicom.data.get_testdata_file("rtdose.dcm", download=False)
    scan = read(dose, unit="mm")
    assert scan.spacing == pytest.approx((5.0, 10.0, 10.0))
    stored = pydicom.dcmread(dose)
    assert np.allclose(scan.pixels[0], stored.pixel_array * float(stored.DoseGridScaling))


# what the checks of a series have to tell apart


def cross(a, b):
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def turned(x, z):
    """Rows and columns that are turned by degrees about x, then about z."""
    x, z = math.radians(x), math.radians(z)
    rows = [math.cos(z), math.sin(z), 0.0]
    return [*rows, -math.sin(z) * math.cos(x), math.cos(z) * math.cos(x), math.sin(x)]


class Stack(NamedTuple):
    """Slices as a scanner places them, in the coordinates x, y, z of a patient.

    Attributes:
        step: Millimetres between places.
        places: Of each slice, in steps.
        digits: Decimals that the scanner writes.
        tilt: Degrees from the normal to the direction of the table, towards the columns.
        moved: Index of a slice, and millimetres by which it is moved along its rows.
        orientation: Of rows and columns.
    """

    step: float
    places: list[float]
    digits: int = 6
    tilt: float = 0.0
    moved: tuple[int, float] = (0, 0.0)
    orientation: tuple[float, ...] = tuple(round(part, 6) for part in turned(25, 17))

    def normal(self):
        return cross(self.orientation[:3], self.orientation[3:])

    def positions(self):
        (*rows,), (*columns,) = self.orientation[:3], self.orientation[3:]
        cosine, sine = math.cos(math.radians(self.tilt)), math.sin(math.radians(self.tilt))
        table = [cosine * n + sine * c for n, c in zip(self.normal(), columns, strict=True)]
        aside = [self.moved[1] * (index == self.moved[0]) for index in range(len(self.places))]
        return [
            [round(-123.4 + place * self.step * t + by * r, self.digits) for t, r in zip(table, rows, strict=True)]
            for place, by in zip(self.places, aside, strict=True)
        ]


def is_volume(stack):
    """The oracle: each slice lies across from each other one, as far as their numbers say.

    Rounding may move both on each of three axes, and half a hundredth of a step is no matter. Five times as much is no
    volume; what lies between is no case for a test.
    """
    positions, normal = stack.positions(), stack.normal()
    ordered = sorted(positions, key=lambda position: sum(a * b for a, b in zip(position, normal, strict=True)))
    ends = [b - a for a, b in zip(ordered[0], ordered[-1], strict=True)]
    step = sum(a * b for a, b in zip(ends, normal, strict=True)) / (len(ordered) - 1)
    worst = max(
        math.dist([a + (j - i) * step * n for a, n in zip(ordered[i], normal, strict=True)], ordered[j])
        for j in range(len(ordered))
        for i in range(j)
    )
    rounding = math.sqrt(3) * 10.0**-stack.digits
    assert worst <= rounding + 0.005 * step or worst > 2 * rounding + 0.025 * step, "too close to call"
    return step > 0 and worst <= rounding + 0.005 * step


def position_element(numbers):
    text = "\\".join(str(number) for number in numbers)
    value = (text + " " * (len(text) % 2)).encode()
    return b"\x20\x00\x32\x00DS" + len(value).to_bytes(2, "little") + value


def write_stack(folder, stack, digits=6):
    """Writes slices in another order than they are placed."""
    folder.mkdir()
    cosines = [round(cosine, digits) for cosine in stack.orientation]
    template = make(folder.with_suffix(".template"), np.ones((2, 2)), [1.0, 2.0, 3.0], ImageOrientationPatient=cosines)
    template = template.read_bytes()
    for index, position in enumerate(stack.positions()):
        data = template.replace(position_element([1.0, 2.0, 3.0]), position_element(position))
        (folder / f"{index * 7 % 1009:04}.dcm").write_bytes(data)
    return folder


def line(count, missing=None):
    return [float(n) for n in range(count) if n != missing]


AXIAL, OBLIQUE_3 = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [round(part, 3) for part in turned(25, 17)]
STACKS = {
    **{f"even {step} mm {n}": Stack(step, line(n)) for step in (5, 1.25, 0.6, 0.1, 0.05) for n in (2, 3, 20)},
    **{
        f"rounded {step} mm to {digits} decimals": Stack(step, line(16), digits, orientation=AXIAL)
        for step, digits in ((5, 0), (1.25, 1), (0.625, 1), (0.75, 1), (0.3125, 2), (1 / 3, 2), (0.1, 2), (0.05, 3))
    },
    **{
        f"oblique, rounded {step} mm to {digits} decimals": Stack(step, line(16), digits, orientation=OBLIQUE_3)
        for step, digits in ((5, 1), (2.5, 1), (1.25, 2), (0.3, 3))
    },
    **{
        f"tilted {tilt} degrees {step} mm {n}": Stack(step, line(n), tilt=tilt)
        for tilt in (3, 5, 6.5, 11, 30)
        for step in (5, 1, 0.6, 0.05)
        for n in (2, 12)
    },
    "tilted back": Stack(1, line(20), tilt=-4),
    "tilted, rounded": Stack(1, line(20), 1, tilt=3, orientation=AXIAL),
    "tilted, thin, rounded": Stack(0.6, line(20), 1, tilt=3, orientation=AXIAL),
    **{
        f"slice {missing} of {n} is missing at {step} mm": Stack(step, line(n, missing), digits)
        for step, digits in ((1, 1), (0.1, 3), (0.05, 4))
        for n, missing in ((4, 1), (12, 1), (12, 10))
    },
    "slice 1 of 300 is missing at 0.05 mm": Stack(0.05, line(300, 1)),
    "slice 150 of 300 is missing at 0.1 mm": Stack(0.1, line(300, 150)),
    **{f"one slice is off along {step} mm": Stack(step, [0, 1, 2.2, 3, 4]) for step in (5, 1, 0.1, 0.05)},
    **{
        f"slice {index} is off aside {step} mm": Stack(step, line(16), moved=(index, 0.2 * step))
        for index in (0, 15, 29)
        for step in (5, 1, 0.1, 0.05)
    },
    "leans by a quarter of a degree": Stack(1, line(2), tilt=0.25),
    "steps grow": Stack(1, [n * (1 + 0.0005 * n) for n in range(60)]),
    "steps grow, thin": Stack(0.05, [n * (1 + 0.0005 * n) for n in range(60)]),
    "two step sizes": Stack(1, [n + 0.009 * max(0, n - 30) for n in range(60)]),
    "twice the same": Stack(1, [0, 1, 1, 2, 3]),
    "all twice": Stack(1, [0, 0, 1, 1, 2, 2]),
    "all at one place": Stack(1, [0, 0, 0]),
    "two blocks": Stack(1, [0, 1, 2, 10, 11, 12]),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks(tmp_path, name):
    stack = STACKS[name]
    folder = write_stack(tmp_path / "s", stack)
    if is_volume(stack):
        rounding = math.sqrt(3) * 10.0**-stack.digits / (len(stack.places) - 1)
        assert read_spacing(folder, "mm")[0] == pytest.approx(stack.step, rel=1e-5, abs=rounding)
    else:
        with pytest.raises(ReadError, match="s: slices must"):
            dicom.open_series(folder)


def test_cosines_may_be_rounded(tmp_path):
    stack = Stack(1.0, line(200), orientation=turned(25, 17))
    assert read_spacing(write_stack(tmp_path / "s", stack, digits=3), "mm")[0] == pytest.approx(1, rel=1e-5)


def rewrite(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def changed(number, **values):
    """Changes a series: one of its files has other values, or lacks those that are None."""

    def change(folder):
        file = sorted(folder.iterdir())[number]
        with pydicom.config.disable_value_validation():
            data = pydicom.dcmread(file)
            for keyword, value in values.items():
                if value is None:
                    del data[keyword]
                else:
                    setattr(data, keyword, value)
            data.save_as(file)

    return change


def all_changed(**values):
    def change(folder):
        for number in range(len(list(folder.iterdir()))):
            changed(number, **values)(folder)

    return change


def second_echo(folder):
    """Adds the same slices once more, of another echo."""
    for file in sorted(folder.iterdir()):
        data = pydicom.dcmread(file)
        data.EchoNumbers, data.SOPInstanceUID = 2, generate_uid()
        data.save_as(folder / f"2{file.name}")


def half(keyword, value):
    """Lets the upper half of the slices differ, whose places are right."""

    def change(folder):
        for number, file in enumerate(sorted(folder.iterdir())):
            if pydicom.dcmread(file).ImagePositionPatient[2] > 2:
                changed(number, **{keyword: value})(folder)

    return change


def copy_of_a_slice(folder):
    (folder / "copy.dcm").write_bytes(sorted(folder.iterdir())[0].read_bytes())


NO_SERIES = {
    "orientation of five numbers": all_changed(ImageOrientationPatient=TURN[:5]),
    "orientation of seven numbers": all_changed(ImageOrientationPatient=[*TURN, 0]),
    "orientation of one number": all_changed(ImageOrientationPatient=1),
    "orientation of five numbers in one slice": changed(2, ImageOrientationPatient=TURN[:5]),
    "no orientation": all_changed(ImageOrientationPatient=None),
    "no orientation in one slice": changed(2, ImageOrientationPatient=None),
    "an empty orientation": changed(2, ImageOrientationPatient=""),
    "orientation is zero": all_changed(ImageOrientationPatient=[0] * 6),
    "orientation is no number": all_changed(ImageOrientationPatient=["nan", *TURN[1:]]),
    "orientation is infinite": changed(0, ImageOrientationPatient=["inf", *TURN[1:]]),
    "rows are twice as long": all_changed(ImageOrientationPatient=[1.6, 1.2, 0, -0.6, 0.8, 0]),
    "rows and columns are one direction": all_changed(ImageOrientationPatient=[0.8, 0.6, 0] * 2),
    "rows and columns have no right angle": all_changed(ImageOrientationPatient=[0.8, 0.6, 0, 0, 1, 0]),
    "one slice is turned by a degree": changed(1, ImageOrientationPatient=turned(0, 37.87)),
    "one slice is turned by a right angle": changed(1, ImageOrientationPatient=[-0.6, 0.8, 0, -0.8, -0.6, 0]),
    "one slice is turned over": changed(1, ImageOrientationPatient=[-0.8, -0.6, 0, -0.6, 0.8, 0]),
    "no position": all_changed(ImagePositionPatient=None),
    "no position in one slice": changed(0, ImagePositionPatient=None),
    "an empty position": changed(0, ImagePositionPatient=""),
    "position of two numbers": changed(0, ImagePositionPatient=[3, 5]),
    "position of four numbers": all_changed(ImagePositionPatient=[3, 5, 0, 0]),
    "position is no number": changed(0, ImagePositionPatient=[3, 5, "nan"]),
    "position aside is no number": changed(0, ImagePositionPatient=["nan", 5, 1]),
    "position is infinite": changed(0, ImagePositionPatient=[3, 5, "inf"]),
    "position is beyond all numbers": changed(0, ImagePositionPatient=[3, 5, "1e308"]),
    "position is a text": lambda folder: rewrite(folder / "03.dcm", b"3.0\\5.0\\2.0", b"3.0\\5.0\\abc"),
    "all at one position": all_changed(ImagePositionPatient=[3, 5, 0]),
    "one number of pixel size": all_changed(PixelSpacing=0.7),
    "three numbers of pixel size": all_changed(PixelSpacing=[0.7, 0.3, 1]),
    "pixel size of zero": all_changed(PixelSpacing=[0, 0.3]),
    "pixel size below zero": all_changed(PixelSpacing=[0.7, -0.3]),
    "pixel size is no number": all_changed(PixelSpacing=["nan", 0.3]),
    "another pixel size in one slice": changed(4, PixelSpacing=[0.7, 0.31]),
    "no pixel size in one slice": changed(4, PixelSpacing=None),
    "no pixel size": all_changed(PixelSpacing=None),
    "another series": changed(3, SeriesInstanceUID="1.2.3"),
    "a slice of no series": changed(3, SeriesInstanceUID=None),
    "upper half of another series": half("SeriesInstanceUID", "1.2.3"),
    "upper half of another frame of reference": half("FrameOfReferenceUID", "1.2.3"),
    "upper half of another modality": half("Modality", "PT"),
    "upper half of another echo": half("EchoNumbers", 2),
    "upper half of another echo time": half("EchoTime", 17.5),
    "upper half of another time": half("TemporalPositionIdentifier", 2),
    "upper half of another diffusion": half("DiffusionBValue", 1000.0),
    "upper half of inverse grey": half("PhotometricInterpretation", "MONOCHROME1"),
    "upper half of another quantity": half("RescaleType", "US"),
    "upper half is rescaled": half("RescaleSlope", 2),
    "two echoes": second_echo,
    "a slice twice": copy_of_a_slice,
    "another size": lambda folder: make(folder / "x.dcm", np.ones((4, 5)), [3.0, 5.0, 5.0]),
    "frames": lambda folder: make(folder / "x.dcm", np.ones((2, 4, 6)), [3.0, 5.0, 5.0]),
}


@pytest.mark.parametrize("name", NO_SERIES)
def test_what_is_no_series(tmp_path, name):
    folder = make_series(tmp_path / "s", line(5))
    assert read_spacing(folder, "mm") == pytest.approx((1, 0.7, 0.3))
    NO_SERIES[name](folder)
    for reader in (read, read_spacing):
        with pytest.raises(ValueError, match=r"^" + str(folder)):
            reader(folder, "mm")


def test_the_file_that_differs_is_named(tmp_path):
    folder = make_series(tmp_path / "s", line(4))
    changed(2, EchoTime=3)(folder)
    with pytest.raises(
        ReadError, match=r"s: must have the slices of one .* 07\.dcm has EchoTime 3.*, 00\.dcm has None"
    ):
        dicom.open_series(folder)


# damaged files


@pytest.mark.parametrize("slices", ["first", "last", "middle"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:64],
        lambda data: data[:132],
        lambda data: data[:400],
        lambda data: data[:-20],
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b"DICM", b"DICN"),
        lambda data: b"no image, but a text",
    ],
    ids=["empty", "preamble", "meta", "cut", "cut_pixels", "zeros", "magic", "text"],
)
def test_a_damaged_slice_is_not_left_out(tmp_path, slices, damage):
    folder = make_series(tmp_path / "s", line(5))
    name = {"first": "00.dcm", "last": "06.dcm", "middle": "03.dcm"}[slices]  # of places 0, 4 and 2
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ReadError, match=rf"^{folder / name}: "):
        dicom.open_series(folder).load(...)


def test_a_damaged_slice_of_another_class_is_not_left_out(tmp_path):
    folder = make_series(tmp_path / "s", line(5))
    data = (folder / "00.dcm").read_bytes()
    data = data.replace(CTImageStorage.encode(), b"1.2.840.10008.5.1.4.1.1.9", 1)  # in one of two places
    (folder / "00.dcm").write_bytes(data[: data.index(b"\x28\0\x10\0US")])  # ends in front of Rows
    with pytest.raises(ReadError, match=r"00\.dcm: ends before its image is described"):
        dicom.open_series(folder)


def test_what_may_lie_beside_slices(tmp_path):
    folder = make_series(tmp_path / "s", line(3))
    (folder / "sub").mkdir()
    for name, content in {
        "README": b"Scans of two weeks.\n",
        "notes.txt": "Sch\u00e4del".encode("latin-1"),
        "VERSION": b"3",
        "empty.txt": b"",
        "Thumbs.db": b"\xd0\xcf\0\0",
        ".DS_Store": b"\0\0\0\1",
        "._00.dcm": b"\0\5\x16\7",
        "key.jpg": b"\xff\xd8\xff\0",
        "sub/9.dcm": b"\0",
    }.items():
        (folder / name).write_bytes(content)
    shutil.copy(pydicom.data.get_testdata_file("DICOMDIR", download=False), folder)
    assert read(folder, unit="mm").pixels.shape == (1, 3, 4, 6)
    (folder / "IM0004").write_bytes(b"\0" * 1000)
    with pytest.raises(ReadError, match=rf"^{folder / 'IM0004'}: is no DICOM file"):
        read(folder)
    (folder / "IM0004").unlink()
    (folder / "IM0004").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ReadError, match=rf"^{folder / 'IM0004'}: is no file"):
        read(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"Rows": 0},
        {"Columns": None},
        {"Rows": [4, 4]},
        {"SamplesPerPixel": None},
        {"SamplesPerPixel": 0},
        {"BitsAllocated": None},
        {"BitsAllocated": 12},
        {"PhotometricInterpretation": None},
        {"PixelRepresentation": None},
        {"NumberOfFrames": -1},
        {"NumberOfFrames": 0},
        {"NumberOfFrames": 2_000_000_000},
        {"NumberOfFrames": 2},
        {"Rows": 60_000, "Columns": 60_000},
        {"PixelData": None},
        {"RescaleSlope": 2},
        {"RescaleSlope": "nan", "RescaleIntercept": 0},
        {"RescaleSlope": "1e400", "RescaleIntercept": 0},
        {"DoseGridScaling": "nan"},
    ],
    ids=str,
)
def test_headers_that_cannot_be(tmp_path, values):
    path = make(tmp_path / "a.dcm", np.ones((4, 6)))
    changed(0, **values)(tmp_path)
    with pytest.raises(ReadError, match=rf"^{path}: "):
        dicom.open_series(path).load(...)


@pytest.mark.parametrize("syntax", ["", "1.2.3.4", "1.2.840.10008.1.1", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.2"])
def test_transfer_syntaxes_that_are_not_those_of_the_pixels(tmp_path, syntax):
    path = make(tmp_path / "a.dcm", np.ones((4, 6)))
    rewrite(path, b"1.2.840.10008.1.2.1\0", syntax.encode().ljust(20, b"\0"))
    with pytest.raises(ReadError, match=rf"^{path}: "):
        dicom.open_series(path).load(...)


def test_an_error_in_the_pixels_names_the_slice(tmp_path):
    folder = make_series(tmp_path / "s", line(4))
    series = dicom.open_series(folder)
    changed(2, BitsAllocated=12)(folder)
    with pytest.raises(ReadError, match=rf"^{folder / '07.dcm'}: "):
        series.load(...)
    changed(2, BitsAllocated=16, Rows=3, PixelData=bytes(3 * 12))(folder)
    with pytest.raises(ReadError, match=rf"^{folder / '07.dcm'}: has pixels of \(3, 6\), its header says \(4, 6\)"):
        series.load(...)


# what enhanced images say of each frame


def scaled(index, **values):
    return merge(at(2 * index), group("PixelValueTransformationSequence", **values))


ALL_SCALED = [scaled(n, RescaleSlope=2, RescaleIntercept=n) for n in range(3)]


@pytest.mark.parametrize(
    "frames",
    [
        [*ALL_SCALED[:2], at(4)],
        [at(0), *ALL_SCALED[1:]],
        [*ALL_SCALED[:2], scaled(2, RescaleSlope=2)],
        [*ALL_SCALED[:2], scaled(2, RescaleSlope="nan", RescaleIntercept=0)],
        [*ALL_SCALED[:2], group("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=1)],
        [at(0), at(2), ORIENTATION],
        [at(0), at(2)],
        [at(0), at(2), at(4), at(6)],
        [at(0)],
    ],
    ids=["last", "first", "offset", "nan", "position", "other_position", "fewer", "more", "one"],
)
def test_frames_that_do_not_say_what_others_say(tmp_path, frames):
    with pydicom.config.disable_value_validation():
        path = enhanced(tmp_path / "a.dcm", frames, merge(MEASURES, ORIENTATION))
    with pytest.raises(ReadError, match=rf"^{path}: "):
        dicom.open_series(path).load(...)


def test_positions_need_an_orientation(tmp_path):
    path = enhanced(tmp_path / "a.dcm", [at(0), at(2), at(4)], MEASURES)
    with pytest.raises(ReadError, match=rf"^{path}: slices have no position"):
        read_spacing(path)


def test_frames_are_rescaled_once(tmp_path):
    shared = merge(MEASURES, ORIENTATION, group("PixelValueTransformationSequence", RescaleSlope=3, RescaleIntercept=1))
    frames = [at(0), at(2), at(4)]
    path = enhanced(tmp_path / "a.dcm", frames, shared, RescaleSlope=3, RescaleIntercept=1)  # said twice
    assert np.array_equal(dicom.open_series(path).load(...), 3 * np.arange(72).reshape(3, 4, 6) + 1)


def test_frames_of_times_are_no_volume(tmp_path):
    others = {"SpacingBetweenSlices": 2, "FrameTime": 40}
    path = make(tmp_path / "a.dcm", np.zeros((3, 4, 6)), FrameIncrementPointer=0x00181063, **others)
    with pytest.raises(ReadError, match=rf"^{path}: frames must lie one above the other, .*0018,1063"):
        read_spacing(path)
    path = make(tmp_path / "b.dcm", np.zeros((3, 4, 6)), FrameIncrementPointer=0x00540080, **others)  # SliceVector
    assert read_spacing(path, "mm") == pytest.approx((2, 0.7, 0.3))


def test_doses_have_an_offset_per_frame(tmp_path):
    path = make(tmp_path / "a.dcm", np.zeros((3, 4, 6)), [0, 0, 0], GridFrameOffsetVector=[0, 2.5])
    with pytest.raises(ReadError, match=rf"^{path}: .*GridFrameOffsetVector must be 3 numbers"):
        read_spacing(path)


# sizes


def test_more_pixels_than_the_header_says(tmp_path):
    path = make(tmp_path / "a.dcm", np.arange(24).reshape(4, 6))
    changed(0, PixelData=np.arange(24, dtype="<u2").tobytes() + bytes(10))(tmp_path)  # padding
    assert np.array_equal(dicom.open_series(path).load(...), np.arange(24).reshape(4, 6))
    changed(0, Rows=3)(tmp_path)
    with pytest.raises(ReadError, match=r"a\.dcm: has 58 bytes of pixels, its header says 36"):
        dicom.open_series(path).load(...)


def deflated(path, elements):
    """Writes a file whose elements are `elements`, deflated."""
    data = pydicom.dcmread(make(path, np.ones((4, 6))))
    data.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    written = path.read_bytes()
    start = 144 + int.from_bytes(written[140:144], "little")  # behind group 2
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    path.write_bytes(
        written[:start] + packer.compress(elements(zlib.decompress(written[start:], -15))) + packer.flush()
    )
    return path


def test_deflated_files(tmp_path):
    path = deflated(tmp_path / "a.dcm", lambda plain: plain)
    assert np.array_equal(dicom.open_series(path).load(...), np.ones((4, 6)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ReadError, match=rf"^{path}: is cut off"):
        dicom.open_series(path).load(...)


@pytest.mark.parametrize("where", ["pixels", "behind", "in_front"])
def test_deflate_bombs(tmp_path, where):
    size = 2**25
    zeros = bytes(size)
    element = b"OB\0\0" + size.to_bytes(4, "little") + zeros
    changes = {
        "pixels": lambda plain: plain[:-52] + size.to_bytes(4, "little") + zeros,
        "behind": lambda plain: plain + b"\xfc\xff\xfc\xff" + element,
        "in_front": lambda plain: b"\x08\0\1\0" + element + plain,
    }
    path = deflated(tmp_path / "a.dcm", changes[where])
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    with pytest.raises(ReadError, match=rf"^{path}: "):
        dicom.open_series(path).load(...)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def compressed(path, syntax, frame, rows=4, columns=6, bits=8):
    data = pydicom.dcmread(make(path, np.zeros((rows, columns))))
    data.file_meta.TransferSyntaxUID = syntax
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit = bits - 1
    data.PixelData = encapsulate([frame])
    data["PixelData"].VR = "OB"
    data.save_as(path, enforce_file_format=True)
    return path


def codestream(kind, size, **options):
    buffer = io.BytesIO()
    Image.new("L", size, 77).save(buffer, kind, **options)
    return buffer.getvalue()


SOF = b"\xff\xd8\xff\xfe\0\4ab\xff%c\0\x0b\x10%c%c%c%c\1\1\x11\0"  # a comment, then the start of a frame, 16 bits


@pytest.mark.parametrize(
    ("syntax", "make_frame"),
    [
        (JPEGBaseline8Bit, lambda size: codestream("JPEG", size)),
        (JPEG2000Lossless, lambda size: codestream("JPEG2000", size, irreversible=False, no_jp2=True)),
        (JPEG2000Lossless, lambda size: codestream("JPEG2000", size, irreversible=False)),
    ],
    ids=["jpeg", "j2k", "jp2"],
)
def test_compressed_frames_have_the_size_of_the_header(tmp_path, syntax, make_frame):
    path = compressed(tmp_path / "a.dcm", syntax, make_frame((6, 4)))
    assert np.array_equal(dicom.open_series(path).load(...), np.full((4, 6), 77))
    path = compressed(tmp_path / "b.dcm", syntax, make_frame((3000, 4)))
    with pytest.raises(
        ReadError, match=r"b\.dcm: a compressed frame is of \(4, 3000\) pixels, the header says \(4, 6\)"
    ):
        dicom.open_series(path).load(...)
    path = compressed(tmp_path / "c.dcm", syntax, b"no image at all")
    with pytest.raises(ReadError, match=r"c\.dcm: a compressed frame is of None pixels"):
        dicom.open_series(path).load(...)


def test_components_of_compressed_frames(tmp_path):
    frame = bytearray(codestream("JPEG2000", (6, 4), irreversible=False, no_jp2=True))
    frame[40:42] = (16384).to_bytes(2, "big")  # Csiz, ISO/IEC 15444-1, A.5.1
    path = compressed(tmp_path / "a.dcm", JPEG2000Lossless, bytes(frame))
    with pytest.raises(ReadError, match=r"a\.dcm: .* at most 4 components, got 16384"):
        read(path, "mm")


@pytest.mark.parametrize(("syntax", "marker"), [(JPEGLosslessSV1, 0xC3), (JPEGLSLossless, 0xF7)])
def test_the_frame_size_is_known_without_a_decoder(tmp_path, syntax, marker):
    path = compressed(tmp_path / "a.dcm", syntax, SOF % (marker, 0xFF, 0xFE, 0xFF, 0xFD), bits=16)
    with pytest.raises(ReadError, match=r"a\.dcm: a compressed frame is of \(65534, 65533\) pixels"):
        dicom.open_series(path).load(...)


def test_run_lengths(tmp_path):
    runs = (1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)
    path = compressed(tmp_path / "a.dcm", RLELossless, runs + bytes([257 - 24, 5]))  # 24 times 5
    assert np.array_equal(dicom.open_series(path).load(...), np.full((4, 6), 5))
    path = compressed(tmp_path / "b.dcm", RLELossless, runs + bytes([129, 5]) * 1000)
    with pytest.raises(ReadError, match=r"b\.dcm: a frame has 2064 bytes of run lengths, 176 are enough"):
        dicom.open_series(path).load(...)


# damage of all kinds


def deflated_original(folder):
    return fuzz_dicom.original(deflated(folder / "a.dcm", lambda plain: plain))


def enhanced_original(folder):
    frames = [scaled(n, RescaleSlope=n + 1, RescaleIntercept=-1024) for n in range(3)]
    return fuzz_dicom.original(enhanced(folder / "a.dcm", frames, merge(MEASURES, ORIENTATION)))


def series_original(folder):
    return fuzz_dicom.original(make_series(folder / "s", line(5)))


ORIGINALS = {
    **{name: lambda folder, name=name: fuzz_dicom.real(folder, name) for name in fuzz_dicom.REAL},
    "deflated": deflated_original,
    "enhanced": enhanced_original,
    "series": series_original,
}


@pytest.mark.filterwarnings("ignore")  # of pydicom, which says what it does with damaged elements
@pytest.mark.parametrize("change", [fuzz_dicom.change_bytes, fuzz_dicom.change_metadata])
@pytest.mark.parametrize("name", ORIGINALS)
def test_damage(tmp_path, name, change):
    given = ORIGINALS[name](tmp_path)
    results = fuzz_dicom.run(given, change, range(count(5)))
    assert results["refused"] > 0
    assert np.array_equal(read(given.path, "mm").pixels, given.scan.pixels)
