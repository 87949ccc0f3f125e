import nibabel
import numpy as np
import pytest
import torch
from monai import transforms
from monai.data import MetaTensor, list_data_collate
from torch.utils.data import default_collate

from rat_timm.data import metatensor_spacing, to_metatensor

SPACING = (2.0, 0.5, 0.25)


def test_there_and_back_in_other_units():
    image = to_metatensor(torch.rand(1, 4, 6, 8), SPACING, unit="mm")
    assert metatensor_spacing(image, unit="mm") == pytest.approx(SPACING)
    assert metatensor_spacing(image, unit="um") == pytest.approx([1000 * s for s in SPACING])


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (transforms.Resize((8, 6, 2)), (1.0, 0.5, 1.0)),
        (transforms.Rotate90(k=1, spatial_axes=(0, 2)), (0.25, 0.5, 2.0)),
        (transforms.Flip(0), SPACING),
        (transforms.CenterSpatialCrop((2, 3, 4)), SPACING),
        (transforms.Spacing((1.0, 1.0, 1.0)), (1.0, 1.0, 1.0)),
    ],
)
def test_it_follows_monais_transforms(transform, expected):
    done = transform(to_metatensor(torch.rand(1, 4, 6, 8), SPACING, unit="mm"))
    assert metatensor_spacing(done) == pytest.approx(expected, rel=1e-6)


def test_images_that_are_turned_out_of_the_plane():
    """A slice of a turned volume: its axes have a part along the third axis of the world."""
    turn = np.array([[0.6, 0, -0.8], [0, 1, 0], [0.8, 0, 0.6]]) @ np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([0.5, -0.25, 2.0])
    image = MetaTensor(torch.rand(1, 4, 6), affine=torch.from_numpy(affine), meta={"unit": "mm"})
    assert metatensor_spacing(image) == pytest.approx((0.5, 0.25))


def test_volumes_that_monai_reads(tmp_path):
    affine = np.diag([3.0, 5.0, 7.0, 1.0])
    for unit, name in (("micron", "a.nii"), ("unknown", "b.nii")):
        image = nibabel.Nifti1Image(np.zeros((4, 6, 8), np.int16), affine)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / name)
    load = transforms.LoadImage(ensure_channel_first=True)
    assert metatensor_spacing(load(tmp_path / "a.nii"), "um") == pytest.approx((3.0, 5.0, 7.0), rel=1e-6)
    with pytest.raises(ValueError, match=r"b\.nii: pixel size 3 along axis 0 has no unit"):
        metatensor_spacing(load(tmp_path / "b.nii"))
    assert metatensor_spacing(load(tmp_path / "b.nii"), assumed_unit="mm") == pytest.approx((3.0, 5.0, 7.0))


def test_no_metadata_are_no_spacing_of_one():
    with pytest.raises(ValueError, match="MetaTensor: pixel size 1 along axis 0 has no unit"):
        metatensor_spacing(MetaTensor(torch.rand(1, 4, 4, 4)))
    with pytest.raises(ValueError, match="image must be a MetaTensor with an affine matrix, got Tensor"):
        metatensor_spacing(torch.rand(1, 4, 4, 4))


@pytest.mark.parametrize("collate", [list_data_collate, default_collate])
@pytest.mark.parametrize("axes", [2, 3])
def test_batches(collate, axes):
    grid, sizes = (4, 6, 8)[-axes:], [(2.0, 0.5, 0.25)[-axes:], (1.0, 3.0, 5.0)[-axes:]]
    batch = collate([to_metatensor(torch.rand(1, *grid), size, unit="mm") for size in sizes])
    spacing = metatensor_spacing(batch, "um")
    assert spacing.shape == (2, axes)
    assert spacing.flatten().tolist() == pytest.approx([1000 * s for size in sizes for s in size])
    assert metatensor_spacing(transforms.Flip(0)(batch[1]), "mm") == pytest.approx(sizes[1])


def test_batches_of_files(tmp_path):
    for index, unit in enumerate(("micron", "mm", "unknown")):
        image = nibabel.Nifti1Image(np.zeros((4, 6, 8), np.int16), np.diag([3.0, 5.0, 7.0 + index, 1.0]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / f"{index}.nii")
    images = [transforms.LoadImage(ensure_channel_first=True)(tmp_path / f"{index}.nii") for index in range(3)]
    spacing = metatensor_spacing(list_data_collate(images[:2]), "um")
    torch.testing.assert_close(spacing, torch.tensor([[3.0, 5.0, 7.0], [3e3, 5e3, 8e3]]))
    with pytest.raises(ValueError, match=r"2\.nii: pixel size 3 along axis 0 has no unit"):
        metatensor_spacing(list_data_collate(images[1:]))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_batch_with_one_matrix(axes):
    image = to_metatensor(torch.rand(1, *(4, 6, 8)[-axes:]), SPACING[-axes:], unit="mm")
    for batch in (image[None], torch.stack([image, image])):
        with pytest.raises(ValueError, match=r"or a batch with an affine matrix for each sample, got \[., 1, "):
            metatensor_spacing(batch)
