import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torchvision import tv_tensors

from rat_timm.data import Sample, evaluation_transform, training_transform

GRIDS = {2: (24, 36), 3: (12, 18, 24)}
STEPS = {2: (0.5, 0.25), 3: (2.0, 0.5, 0.25)}
OUT = {2: (16, 12), 3: (10, 12, 8)}


def ramps(axes, mask=True):
    """Channels hold the physical position along each axis; a block is masked."""
    grid, steps = GRIDS[axes], STEPS[axes]
    along = [(torch.arange(n) + 0.5) * s for n, s in zip(grid, steps, strict=True)]
    image = torch.stack(torch.meshgrid(*along, indexing="ij"))
    valid = None
    if mask:
        valid = torch.ones(grid, dtype=torch.bool)
        valid[..., : grid[-1] // 2] = False
    return Sample(image, torch.tensor(steps), valid, 7)


def slopes(image):
    """The change of each channel per step along its axis, in the middle."""
    axes = image.ndim - 1
    found = []
    for axis in range(axes):
        middle = image[axis].movedim(axis, 0)
        for size in middle.shape[1:]:
            middle = middle[:, size // 2]
        found.append(float(middle.diff()[2:-2].mean()))
    return found


@pytest.mark.parametrize("axes", [2, 3])
def test_the_whole_image_is_resized(axes):
    sample = ramps(axes)
    done = evaluation_transform(OUT[axes])(sample)
    assert done.image.shape == (axes, *OUT[axes])
    assert done.mask.shape == OUT[axes]
    ratio = [n / m for n, m in zip(GRIDS[axes], OUT[axes], strict=True)]
    assert done.spacing.tolist() == pytest.approx([s * r for s, r in zip(STEPS[axes], ratio, strict=True)], rel=1e-5)
    assert slopes(done.image) == pytest.approx(done.spacing.tolist(), rel=2e-2)
    assert done.mask.dtype == torch.bool
    assert not done.mask[..., : OUT[axes][-1] // 2].any()
    assert done.mask[..., OUT[axes][-1] // 2 :].all()
    assert done.target == 7
    assert type(done.image) is type(done.mask) is type(done.spacing) is torch.Tensor


@pytest.mark.parametrize("axes", [2, 3])
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=30)
def test_random_crops_keep_image_mask_and_spacing_together(axes, seed):
    torch.manual_seed(seed)
    done = training_transform(OUT[axes], scale=(0.3, 1.0))(ramps(axes))
    assert [abs(slope) for slope in slopes(done.image)] == pytest.approx(done.spacing.tolist(), rel=0.05)
    extent = [n * s for n, s in zip(OUT[axes], done.spacing.tolist(), strict=True)]
    share = torch.tensor([e / (n * s) for e, n, s in zip(extent, GRIDS[axes], STEPS[axes], strict=True)]).prod()
    assert 0.2 <= share <= 1.001
    half = GRIDS[axes][-1] * STEPS[axes][-1] / 2
    sure = (done.image[-1] - half).abs() > 1.5 * done.spacing[-1]
    assert torch.equal(done.mask[sure], (done.image[-1] > half)[sure])


@pytest.mark.parametrize("axes", [2, 3])
def test_chance_is_pytorchs(axes):
    transform, sample = training_transform(OUT[axes]), ramps(axes)

    def draw(seed):
        torch.manual_seed(seed)
        return transform(sample)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.spacing, again.spacing)
    assert not torch.equal(first.image, other.image)
    assert len({tuple(draw(seed).spacing.tolist()) for seed in range(8)}) > 4


@pytest.mark.parametrize("axes", [2, 3])
def test_whole_numbers_become_floats(axes):
    sample = ramps(axes)
    whole = sample._replace(image=sample.image.to(torch.uint8))
    for transform in (evaluation_transform(OUT[axes]), training_transform(OUT[axes])):
        assert transform(whole).image.dtype == torch.float32


@pytest.mark.parametrize("axes", [2, 3])
def test_flips_are_optional_and_masks_too(axes):
    for seed in range(12):
        torch.manual_seed(seed)
        done = training_transform(OUT[axes], flip=False)(ramps(axes, mask=False))
        assert done.mask is None
        assert min(slopes(done.image)) > 0
    signs = set()
    for seed in range(24):
        torch.manual_seed(seed)
        done = training_transform(OUT[axes])(ramps(axes, mask=False))
        signs.add(tuple(slope > 0 for slope in slopes(done.image)))
    assert len(signs) == 2**axes


def centres(labels, grid):
    """The physical position, along each axis, of the pixel whose number a label is."""
    places = torch.unravel_index(labels, grid)
    return torch.stack([(place + 0.5) * s for place, s in zip(places, STEPS[len(grid)], strict=True)])


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("size", [(5, 7, 6), (31, 40, 50)])
def test_a_label_is_that_of_the_nearest_pixel(axes, size):
    """Labels are the numbers of pixels, which no smaller type holds; the ramps say where the new pixels lie."""
    size, grid = size[-axes:], GRIDS[axes]
    labels = torch.arange(torch.tensor(grid).prod()).reshape(grid)
    for transform in [evaluation_transform(size), *[training_transform(size)] * 12]:
        done = transform(ramps(axes, mask=False)._replace(target=2**40 + labels))
        assert done.target.dtype == torch.int64
        away = (centres(done.target - 2**40, grid) - done.image).abs()
        inner = (slice(None), *[slice(2, -2)] * axes) if min(size) > 6 else (slice(None), *[slice(1, -1)] * axes)
        for axis, step in enumerate(STEPS[axes]):  # half a pixel, and what smoothing does to a ramp near a border
            assert away[axis][inner[1:]].max() <= 0.55 * step + 0.05 * done.spacing[axis]


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.float32, torch.float64])
def test_maps_keep_layout_and_type(axes, channels, dtype):
    target = torch.randint(0, 2, channels + GRIDS[axes]).to(dtype)
    for given in (target, target.numpy()):
        for transform in (evaluation_transform(OUT[axes]), training_transform(OUT[axes])):
            done = transform(ramps(axes)._replace(target=given)).target
            assert type(done) is torch.Tensor
            assert done.shape == (*channels, *OUT[axes])
            assert done.dtype == dtype
            assert dtype.is_floating_point == bool(((done > 0) & (done < 1)).any())


@pytest.mark.parametrize("axes", [2, 3])
def test_maps_of_numbers_are_smoothed_as_the_image_is(axes):
    for seed in range(6):
        torch.manual_seed(seed)
        sample = ramps(axes)
        done = training_transform(OUT[axes])(sample._replace(target=sample.image.clone()))
        torch.testing.assert_close(done.target, done.image)


@pytest.mark.parametrize("axes", [2, 3])
def test_masks_and_labels_stay_together(axes):
    for seed in range(6):
        torch.manual_seed(seed)
        sample = ramps(axes)
        done = training_transform(OUT[axes])(sample._replace(target=sample.mask.long()))
        assert torch.equal(done.target > 0, done.mask)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("target", [None, 3, 2.5, "cat", [1, 2], torch.tensor(4), torch.zeros(12), np.arange(3)])
def test_what_is_of_the_whole_stays(axes, target):
    assert training_transform(OUT[axes])(ramps(axes)._replace(target=target)).target is target


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("shape", [(5, 4), (1, 1, 24, 36), (1, 2, 12, 18, 24), (36, 24)])
def test_a_target_whose_meaning_is_not_known(axes, shape):
    with pytest.raises(ValueError, match=r"target must be a map of the image's size .* or have at most one axis"):
        training_transform(OUT[axes])(ramps(axes)._replace(target=torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"target must be a map of the image's size .*, got \(1, 2\)"):
        evaluation_transform(OUT[axes])(ramps(axes)._replace(target=[[1, 2]]))


def objects(box):
    """One object that fills its box, and one that no crop of half an image keeps."""
    masks = torch.zeros(2, *GRIDS[2], dtype=torch.bool)
    masks[0, box[1] : box[3], box[0] : box[2]] = True
    boxes = torch.tensor([box, [0.0, 0.0, 0.25, 0.25]])
    return {"boxes": boxes, "labels": torch.tensor([5, 6]), "masks": masks}


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=30, derandomize=True)
def test_boxes_follow_the_image(seed):
    torch.manual_seed(seed)
    sample = ramps(2, mask=False)._replace(target=objects([6, 4, 30, 20]))
    done = training_transform((48, 60), scale=(0.3, 1.0))(sample)
    assert done.target["labels"].tolist() == [5]  # the other one is too small
    (box,), (mask,) = done.target["boxes"].tolist(), done.target["masks"]
    assert type(done.target["boxes"]) is type(mask) is torch.Tensor
    y, x = mask.nonzero().T.tolist()
    extent = [min(x), min(y), max(x) + 1, max(y) + 1]
    assert box == pytest.approx(extent, abs=1.0)  # the mask's pixels are whole
    inside = done.image[:, mask].T / torch.tensor(STEPS[2]) - torch.tensor([12.0, 18.0])
    assert (inside.abs() < torch.tensor([8.0, 12.0]) + 0.75).all()


def test_boxes_in_other_formats():
    boxes = tv_tensors.BoundingBoxes([[18.0, 12.0, 12.0, 8.0]], format="CXCYWH", canvas_size=GRIDS[2])
    done = evaluation_transform((12, 12))(ramps(2)._replace(target={"boxes": boxes})).target["boxes"]
    assert done.tolist() == [[6.0, 6.0, 4.0, 4.0]]
    assert (done.format, done.canvas_size) == (boxes.format, (12, 12))
    rotated = tv_tensors.BoundingBoxes([[18.0, 12.0, 12.0, 8.0, 30.0]], format="CXCYWHR", canvas_size=GRIDS[2])
    with pytest.raises(ValueError, match="otat"):
        evaluation_transform((12, 12))(ramps(2)._replace(target={"boxes": rotated}))
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert training_transform((8, 8))(ramps(2)._replace(target=none)).target["boxes"].shape == (0, 4)


def test_objects_that_cannot_be_transformed():
    with pytest.raises(ValueError, match="target must be no dict of objects in a volume"):
        training_transform(OUT[3])(ramps(3)._replace(target={"boxes": torch.zeros(1, 6)}))
    for target in ({"boxes": torch.zeros(1, 4), "area": torch.zeros(1)}, {"labels": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"target must be a dict of boxes, labels and masks .*, got \['"):
            training_transform(OUT[2])(ramps(2)._replace(target=target))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="size must be two or three"):
        training_transform((4,))
    with pytest.raises(ValueError, match="scale must be two shares"):
        training_transform((4, 4), scale=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"image must be \[channels, \*grid\] with 2 axes, got \[3, 12, 18, 24\]"):
        evaluation_transform((4, 4))(ramps(3))
    sample = ramps(2)
    with pytest.raises(ValueError, match="mask must be bool"):
        evaluation_transform((4, 4))(sample._replace(mask=sample.mask.float()))
    with pytest.raises(ValueError, match=r"spacing must be 2 floating-point numbers, got torch\.int64"):
        evaluation_transform((4, 4))(sample._replace(spacing=torch.tensor([1, 1])))
