"""Distillation: teachers of all kinds, their maps at the student's places, slices of volumes."""

import pytest
import timm
import torch
from torch import nn

from helpers import lively, places
from rat_timm import hub
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.pretrain import Distiller, Lesson, Teacher, lessons

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8, "in_chans": 1}
SIZE, SPACING = (12, 20, 16), (2.0, 0.5, 0.75)


class Coordinates(nn.Module):
    """A teacher whose map says where each place is in the image that it is given, and how bright."""

    spatial_dims = 2

    def __init__(self):
        super().__init__()
        self.num_features = 3

    def forward(self, image):
        grid = image.grid
        x = torch.cat((grid.coordinates().expand(len(image.x), *grid.shape, 2), image.x), dim=-1)
        return Tokens(x, grid, image.mask)


def student_at(size, spacing, channels, batch=2):
    """A student's map of twice as large places that says where they are."""
    grid = Grid.create([n // 2 for n in size], [2 * step for step in spacing])
    x = grid.coordinates().expand(batch, *grid.shape, len(size))
    return Tokens(torch.cat((x, x.new_zeros(*x.shape[:-1], channels - len(size))), dim=-1), grid)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_are_compared_where_they_are(axis, masked):
    plane = [other for other in range(3) if other != axis]
    volume = places(SIZE, SPACING)[None, [axis]].repeat(2, 1, 1, 1, 1)  # as bright as the place across the slices
    mask = torch.rand(2, *SIZE) > 0.2 if masked else None
    start = torch.tensor([[0.0], [0.99]])
    (lesson,) = lessons(Coordinates(), volume, spacing=SPACING, mask=mask, planes=[axis], slices=3, start=start)
    own, taught, valid = lesson.compare(student_at(SIZE, SPACING, 4))
    assert own.shape[1 + axis] == taught.shape[1 + axis] == 3
    assert bool(valid.any())
    torch.testing.assert_close(taught[..., :2][valid], own[..., plane][valid], rtol=0, atol=1e-4 if not masked else 1.0)
    torch.testing.assert_close(taught[..., 2][valid], own[..., axis][valid], rtol=0, atol=SPACING[axis] / 2 + 1e-4)
    n, step = SIZE[axis], SIZE[axis] // 3
    last = n - 2 * step - 1
    for sample, first in enumerate((0, last)):
        across = taught[sample, ..., 2].movedim(axis, 0)[valid[sample].movedim(axis, 0)]
        expected = {(first + i * step + 0.5) * SPACING[axis] for i in range(3)}
        assert {round(float(value), 4) for value in across.unique()} <= {round(value, 4) for value in expected}
        assert len(across.unique()) == 3


def test_slices_of_a_thin_volume_and_of_several_pixel_sizes():
    rows = torch.tensor([[2.0, 0.5, 0.5], [3.0, 1.0, 1.0]], dtype=torch.float64)
    volume = torch.randn(2, 1, 2, 8, 8)
    first, second = lessons(Coordinates(), volume, spacing=rows, planes=(0, 2), slices=4)
    assert first.maps.x.shape == (2, 2, 8, 8, 3)
    torch.testing.assert_close(first.maps.grid.spacing, rows)
    torch.testing.assert_close(first.maps.grid.origin, rows / 2)
    assert second.maps.x.shape == (2, 2, 8, 4, 3)
    torch.testing.assert_close(second.maps.grid.spacing, rows * torch.tensor([1, 1, 2]))
    torch.testing.assert_close(first.maps.x[1, 0, 3, 5, :2].float(), torch.tensor([3.5, 5.5]))
    with pytest.raises(ValueError, match=r"slices must be positive and planes among \[0, 1, 2\], got 4, \[3\]"):
        lessons(Coordinates(), volume, planes=[3])
    with pytest.raises(ValueError, match="image must have the teacher's 2 axes, got 3"):
        Teacher.create("test_rat", pretrained=False, in_chans=1)(Tokens(volume.movedim(1, -1), Grid.create((2, 8, 8))))


def test_the_loss_is_that_of_places_which_both_have():
    student = student_at((8, 8), (1.0, 1.0), 3, batch=2)
    student = student._replace(mask=torch.rand(2, 4, 4) > 0.3)
    maps = Tokens(torch.randn(2, 5, 4, 3), Grid.create((5, 4), 1.3), torch.rand(2, 5, 4) > 0.5)
    own, taught, valid = Lesson(maps).compare(student)
    errors = [[], []]
    for sample, y, x in valid.nonzero().tolist():
        difference = (own[sample, y, x].double() - taught[sample, y, x].double()).abs()
        errors[sample].append(torch.where(difference < 1, difference**2 / 2, difference - 0.5).mean())
    expected = torch.stack([torch.stack(each).mean() for each in errors]).float()
    torch.testing.assert_close(Lesson(maps).loss(student), expected)
    nothing = Lesson(maps._replace(mask=torch.zeros(2, 5, 4, dtype=torch.bool)))
    assert nothing.loss(student).tolist() == [0, 0]


def normalised(x):
    x = x.double()
    return ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).float()


@torch.no_grad()
def test_teachers_of_this_package_know_the_pixel_size():
    image, spacing = torch.randn(2, 1, 40, 32), (0.8, 1.25)
    mask = torch.rand(2, 40, 32) > 0.2
    for name, args in (("test_rat", {"in_chans": 1}), ("rat_vit_small_patch16_dinov3", SMALL)):
        teacher = Teacher.create(name, pretrained=False, **args)
        (lesson,) = lessons(teacher, image, spacing=spacing, mask=mask)
        out = teacher.model.forward_intermediates(
            image, 1, norm=True, output_dict=True, intermediates_only=True, spacing=spacing, mask=mask
        )
        there = out["masks"][0]
        torch.testing.assert_close(
            lesson.maps.x[there], normalised(out["image_intermediates"][0].movedim(1, -1))[there], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(lesson.maps.grid.origin[:1], out["grids"][0].origin[:1])
        assert lesson.maps.x.shape[-1] == teacher.num_features
        assert torch.equal(lesson.maps.mask, there)
        assert not teacher.train().model.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())


@torch.no_grad()
def test_teachers_of_timm_are_given_pixels_of_a_size_of_theirs():
    teacher = Teacher.create("test_resnet", pretrained=False, in_chans=1, spacing=(0.5, 0.5))
    image = torch.rand(1, 1, 32, 24)
    (lesson,) = lessons(teacher, image, spacing=(1.0, 1.0))
    assert lesson.maps.grid.shape == (2, 2)  # 64 x 48 pixels in places of 32
    assert lesson.maps.grid.spacing.tolist() == [[16.0, 16.0]]
    assert lesson.maps.grid.origin.tolist() == [[8.0, 8.0]]
    second = Teacher(teacher.model, 1)
    (other,) = lessons(second, image, spacing=2.0, mask=torch.arange(24).expand(1, 32, 24) < 8)
    stride = teacher.model.feature_info[1]["reduction"]
    assert other.maps.grid.spacing.tolist() == [[2.0 * stride] * 2]
    assert other.maps.mask.sum() == 32 // stride * (8 // stride)
    filled = torch.where(torch.arange(24) < 8, image, 0.0)
    (expected,) = second.model.forward_intermediates(filled, indices=[1], intermediates_only=True)
    torch.testing.assert_close(other.maps.x, normalised(expected.movedim(1, -1)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="model must have forward_intermediates and feature_info, got Linear"):
        Teacher(nn.Linear(1, 1))


def test_a_saved_folder_teaches_in_its_own_numbers(tmp_path):
    saved = timm.create_model("test_rat", in_chans=1, num_classes=0, spacing=0.5)
    hub.save(saved, tmp_path / "teacher")
    teacher = Teacher.create(tmp_path / "teacher", -2)
    assert teacher.model.reference_spacing == (0.5, 0.5)
    student = timm.create_model("test_rat", in_chans=1)
    student.pretrained_cfg = {**student.pretrained_cfg, "mean": (0.5,), "std": (0.25,)}
    teacher.model.pretrained_cfg = {**teacher.model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.8)}
    raw = torch.rand(1, 1, 32, 32)
    plain = lessons(teacher, (raw - 0.2) / 0.6)[0].maps.x
    teacher.rescale(student)
    torch.testing.assert_close(lessons(teacher, (raw - 0.5) / 0.25)[0].maps.x, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d", "vit"])
def test_students_project_their_maps(name):
    args = SMALL if name == "vit" else {"in_chans": 1}
    student = lively(Distiller("rat_vit_small_patch16_dinov3" if name == "vit" else name, 6, **args))
    size, spacing = (SIZE, SPACING) if name == "test_rat_3d" else ((40, 32), (0.8, 1.25))
    image, mask = torch.randn(2, 1, *size), torch.rand(2, *size) > 0.2
    made = student(image, spacing=spacing, mask=mask)
    student.eval()
    with torch.no_grad():
        assert torch.equal(student(torch.where(mask[:, None], image, torch.nan), spacing=spacing, mask=mask).x, made.x)
        out = student.backbone.forward_intermediates(
            image, norm=True, output_dict=True, spacing=spacing, mask=mask, intermediates_only=True
        )
        finest = -1 if name == "vit" else -2
        projection = student.projections[-1]
        if name == "vit":
            expected = projection(out["image_intermediates"][-1].movedim(1, -1))[out["masks"][-1]]
            torch.testing.assert_close(made.x[made.mask], expected)
    assert made.x.shape == (2, *out["grids"][finest].shape, 6)
    torch.testing.assert_close(made.grid.origin, out["grids"][finest].origin)
    rows = torch.tensor([spacing, [1.5 * step for step in spacing]])
    both = student(image, spacing=rows)
    for index in range(2):
        alone = student(image[index : index + 1], spacing=rows[index].tolist())
        part = both.x[(slice(index, index + 1), *map(slice, alone.grid.shape))]
        torch.testing.assert_close(part, alone.x, rtol=1e-4, atol=1e-5)
    teacher = Teacher.create("test_rat", pretrained=False, in_chans=1)
    student = Distiller(student.backbone, teacher.num_features)
    taught = lessons(teacher, image, spacing=spacing, mask=mask, planes=range(len(size)), slices=2)
    assert len(taught) == (3 if len(size) == 3 else 1)
    said = student(image, spacing=spacing, mask=mask)
    torch.stack([lesson.loss(said) for lesson in taught]).mean().backward()
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
