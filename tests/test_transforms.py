import hypothesis
import pytest
import torch
from hypothesis import strategies as st

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
