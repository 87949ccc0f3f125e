import pytest
import timm
import torch
from torch.utils.data import DataLoader

import rat_timm  # noqa: F401
from rat_timm.data import Sample, collate


def sample(*size, spacing=None, mask=False, target=None):
    spacing = torch.full((len(size),), 0.5) if spacing is None else torch.tensor(spacing)
    return Sample(torch.rand(1, *size), spacing, torch.rand(size) > 0.5 if mask else None, target)


@pytest.mark.parametrize("size", [(4, 6), (3, 4, 6)])
def test_samples_of_different_spacing(size):
    parts = [sample(*size, spacing=[float(i + 1)] * len(size), target=i) for i in range(3)]
    batch = collate(parts)
    assert torch.equal(batch.image, torch.stack([part.image for part in parts]))
    assert batch.spacing[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert batch.mask is None
    assert batch.target.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("one", "other"), [((4, 6), (5, 3)), ((2, 4, 6), (3, 5, 3))])
def test_samples_of_different_size_are_filled_up(one, other):
    parts = [sample(*one), sample(*other, mask=True)]
    batch = collate(parts)
    for index, (part, size) in enumerate(zip(parts, (one, other), strict=True)):
        inside = tuple(slice(n) for n in size)
        assert torch.equal(batch.image[(index, slice(None), *inside)], part.image)
        assert batch.mask[index].sum() == (part.mask.sum() if part.mask is not None else part.image[0].numel())
        assert torch.equal(batch.mask[(index, *inside)], torch.ones(size) > 0 if part.mask is None else part.mask)
    assert batch.target is None


def test_a_loader_feeds_a_model():
    model = timm.create_model("test_rat", in_chans=1, num_classes=3)
    data = [sample(32 + 8 * i, 48, spacing=[0.5 + i, 1.0], target=i) for i in range(3)]
    loader = DataLoader(data, batch_size=3, collate_fn=collate, num_workers=1)
    batch = next(iter(loader)).to("cpu")
    logits = model(batch.image, spacing=batch.spacing, mask=batch.mask)
    alone = model(data[2].image[None], spacing=data[2].spacing[None])
    torch.testing.assert_close(logits[2:], alone)  # it is the largest: nothing was filled up


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="samples must agree in channels and axes"):
        collate([sample(4, 4), sample(4, 4, 4)])
    with pytest.raises(ValueError, match="spacing must be 2 floating-point numbers"):
        collate([sample(4, 4, spacing=[1.0])])
    for mask in (torch.ones(9, 9) > 0, torch.ones(2, 2) > 0, torch.ones(1, 4, 6) > 0, torch.ones(4, 6)):
        with pytest.raises(ValueError, match=r"mask must be bool \[4, 6\]"):
            collate([sample(4, 6)._replace(mask=mask)])
    with pytest.raises(ValueError, match="all have a target, or none, got 1 of 2 without"):
        collate([sample(4, 4, target=1), sample(4, 4)])
