import copy
import math
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from torchvision.transforms.v2.functional._utils import _KERNEL_REGISTRY

from rat_timm.data import Sample, Spacing, collate

SIZE = (40, 60)


def spacing(y=0.5, x=0.25):
    return Spacing((y, x), canvas_size=SIZE)


def values(result):
    return result.tolist()


@pytest.mark.parametrize(
    ("transform", "expected", "size"),
    [
        (v2.Resize((20, 15)), (1.0, 1.0), (20, 15)),
        (v2.Resize(20), (1.0, 0.5), (20, 30)),
        (v2.CenterCrop((8, 9)), (0.5, 0.25), (8, 9)),
        (v2.RandomCrop((8, 9)), (0.5, 0.25), (8, 9)),
        (v2.Pad((1, 2, 3, 4)), (0.5, 0.25), (46, 64)),
        (v2.Pad(2, padding_mode="reflect"), (0.5, 0.25), (44, 64)),
        (v2.RandomHorizontalFlip(1.0), (0.5, 0.25), SIZE),
        (v2.RandomVerticalFlip(1.0), (0.5, 0.25), SIZE),
        (v2.RandomRotation((90, 90), expand=True), (0.25, 0.5), (60, 40)),
        (v2.RandomRotation((180, 180)), (0.5, 0.25), SIZE),
        (v2.RandomAffine(0, scale=(2, 2)), (0.25, 0.125), SIZE),
        (v2.RandomAffine(0, translate=(0.5, 0.5)), (0.5, 0.25), SIZE),
        (v2.ToDtype(torch.float32, scale=True), (0.5, 0.25), SIZE),
        (v2.ColorJitter(0.5), (0.5, 0.25), SIZE),
    ],
)
def test_it_follows_the_image(transform, expected, size):
    image, result = transform(tv_tensors.Image(torch.rand(3, *SIZE)), spacing())
    assert values(result) == pytest.approx(expected, rel=1e-6)
    assert result.canvas_size == size == tuple(image.shape[-2:])
    assert result.dtype == torch.float64


def test_a_step_of_the_cropped_image_is_as_long_as_its_spacing_says():
    """A ramp of physical positions goes through the transform too; its slope there is the spacing."""
    y, x = torch.meshgrid(
        *((torch.arange(n) + 0.5) * s for n, s in zip((400, 600), (0.5, 0.25), strict=True)), indexing="ij"
    )
    ramps = tv_tensors.Image(torch.stack((y, x)))
    for seed in range(20):
        torch.manual_seed(seed)
        cropped, result = v2.RandomResizedCrop((110, 120))(ramps, Spacing((0.5, 0.25), canvas_size=(400, 600)))
        slopes = cropped[0, 5:-5, 60].diff().mean(), cropped[1, 50, 5:-5].diff().mean()
        assert values(result) == pytest.approx([float(slope) for slope in slopes], rel=1e-3)


@hypothesis.given(angle=st.floats(-360, 360), zoom=st.floats(0.25, 4), size=st.floats(0.01, 100))
def test_square_pixels_may_be_turned_by_any_angle(angle, zoom, size):
    given = Spacing((size, size), canvas_size=SIZE)
    turned = functional.affine(given, angle=angle, translate=[3, 4], scale=zoom, shear=[0.0, 0.0])
    assert values(turned) == pytest.approx([size / zoom] * 2, rel=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomRotation((30, 30)),
        v2.RandomAffine(0, shear=(20, 20)),
        v2.RandomPerspective(p=1.0),
        v2.ElasticTransform(),
        v2.FiveCrop(8),
        v2.TenCrop(8),
    ],
)
def test_pixels_without_one_size_are_an_error(transform):
    with pytest.raises(ValueError, match=r"pixels (of|would)"):
        transform(torch.rand(3, *SIZE), spacing())


def test_every_map_of_torchvision_that_moves_points_is_known():
    known = {kernel for kernel, types in _KERNEL_REGISTRY.items() if tv_tensors.KeyPoints in types}
    without = {kernel.__name__ for kernel in known if Spacing not in _KERNEL_REGISTRY[kernel]}
    assert without <= {"get_size", "to_dtype"}
    assert "rotate" in {kernel.__name__ for kernel in known}


@pytest.mark.parametrize("data", [(1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan), (1.0, 2.0, 3.0)])
def test_it_is_two_positive_numbers(data):
    with pytest.raises(ValueError, match="spacing must be two positive numbers"):
        Spacing(data, canvas_size=SIZE)


def test_it_can_be_copied_and_shown():
    twin = copy.deepcopy(spacing())
    assert values(twin) == [0.5, 0.25]
    assert values(v2.Resize((20, 30))(tv_tensors.Image(torch.rand(1, *SIZE)), twin)[1]) == [1.0, 0.5]
    assert "canvas_size=(40, 60)" in repr(spacing())
    assert type(spacing() * 2) is torch.Tensor


@pytest.fixture(scope="module")
def albumentations():
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks a server for its last version
    return pytest.importorskip("albumentations")


@pytest.mark.parametrize("seed", range(20))
def test_the_way_through_albumentations(albumentations, seed):
    """A ramp of physical positions goes through the transform too; its slope there is the spacing."""
    a = albumentations
    y, x = torch.meshgrid(
        *((torch.arange(n) + 0.5) * s for n, s in zip((400, 600), (0.5, 0.25), strict=True)), indexing="ij"
    )
    image = torch.stack((y, x), dim=2).numpy()
    given = Spacing((0.5, 0.25), canvas_size=image.shape[:2])
    turns = [a.RandomResizedCrop((110, 120)), a.HorizontalFlip(), a.RandomRotate90(), a.Transpose()]
    transform = a.Compose(turns, keypoint_params=a.KeypointParams("xy", remove_invisible=False), seed=seed)
    done = transform(image=image, keypoints=given.corners())
    spacing = given.follow(done["keypoints"], canvas_size=done["image"].shape[:2])
    moved = torch.from_numpy(done["image"])
    steps = [moved.diff(dim=axis)[20:-20, 20:-20].norm(dim=2).mean() for axis in (0, 1)]
    assert values(spacing) == pytest.approx([float(step) for step in steps], rel=1e-3)
    assert spacing.canvas_size == tuple(moved.shape[:2])


def test_albumentations_hands_on_what_it_does_not_know(albumentations):
    """Why a sample refuses the spacing of another image, and what refuses it before."""
    a, image = albumentations, torch.rand(*SIZE, 3).numpy()
    done = a.Compose([a.Resize(20, 30)])(image=image, spacing=spacing())
    assert values(done["spacing"]) == [0.5, 0.25]  # which is wrong
    with pytest.raises(ValueError, match=r"spacing is that of an image of \(40, 60\) pixels, got one of \(20, 30\)"):
        collate([Sample(torch.from_numpy(done["image"]).movedim(2, 0), done["spacing"])])
    with pytest.raises(ValueError, match="spacing"):
        a.Compose([a.Resize(20, 30)], strict=True)(image=image, spacing=spacing())


def test_corners_that_are_no_longer_at_right_angles():
    with pytest.raises(ValueError, match=r"pixels of \[0\.5, 0\.25\] \(y, x\) would have no right angles"):
        spacing().follow([(0, 0), (60, 0), (20, 40)], canvas_size=SIZE)
