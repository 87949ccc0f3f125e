import pytest
import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import tv_tensors

import rat_timm  # noqa: F401
from rat_timm.data import Sample, Spacing, collate


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


@pytest.mark.parametrize("channels", [(), (2,)])
@pytest.mark.parametrize(
    ("dtype", "expected", "fill"),
    [
        (torch.uint8, torch.int64, -1),
        (torch.int32, torch.int64, -1),
        (torch.int64, torch.int64, -1),
        (torch.bool, torch.bool, False),
        (torch.float64, torch.float64, 0.0),
    ],
)
@pytest.mark.parametrize(("one", "other"), [((4, 6), (5, 3)), ((2, 4, 6), (3, 5, 3))])
def test_maps_are_filled_up(one, other, dtype, expected, fill, channels):
    maps = [torch.randint(1, 200, channels + size).to(dtype) for size in (one, other)]
    parts = [sample(*size)._replace(target=target) for size, target in zip((one, other), maps, strict=True)]
    batch = collate([parts[0], parts[1]._replace(target=maps[1].numpy())])
    most = [max(pair) for pair in zip(one, other, strict=True)]
    assert batch.target.shape == (2, *channels, *most)
    assert batch.target.dtype == expected
    for index, size in enumerate((one, other)):
        assert torch.equal(batch.target[(index, ..., *map(slice, size))], maps[index].to(expected))
        assert (batch.target[index][..., ~batch.mask[index]] == fill).all()
    assert collate([parts[0]]).target.dtype == expected  # whether or not anything is filled up


@pytest.mark.parametrize("size", [(4, 6), (3, 4, 6)])
def test_the_fill_is_not_learned(size):
    parts = [sample(*size, target=None), sample(*[n + 2 for n in size])]
    parts = [part._replace(target=torch.randint(3, part.image.shape[1:])) for part in parts]
    batch = collate(parts)
    logits = torch.randn(2, 3, *batch.image.shape[2:])
    loss = cross_entropy(logits, batch.target, ignore_index=-1, reduction="sum")
    alone = [
        cross_entropy(
            logits[(slice(i, i + 1), ..., *map(slice, part.target.shape))], part.target[None], reduction="sum"
        )
        for i, part in enumerate(parts)
    ]
    torch.testing.assert_close(loss, sum(alone))


def test_objects_stay_dicts():
    boxes = tv_tensors.BoundingBoxes([[0, 0, 2, 3]], format="XYXY", canvas_size=(4, 6))
    objects = [{"boxes": boxes, "labels": torch.tensor([1]), "name": "a"}, {"boxes": torch.zeros(0, 4), "name": "b"}]
    parts = [sample(4 + i, 6)._replace(target=one) for i, one in enumerate(objects)]
    loader = DataLoader(parts, batch_size=2, collate_fn=collate, num_workers=1)
    batch = next(iter(loader)).to("meta")
    assert [one["boxes"].shape for one in batch.target] == [(1, 4), (0, 4)]
    assert [one["name"] for one in batch.target] == ["a", "b"]
    assert batch.target[0]["labels"].is_meta
    assert batch.target[1]["boxes"].is_meta
    assert objects[0]["labels"].device.type == "cpu"
    assert batch.image.is_meta
    assert batch.mask.is_meta
    assert collate(parts).target == objects
    assert collate([sample(4, 6)]).to("meta").target is None


def test_targets_that_do_not_fit_together():
    with pytest.raises(ValueError, match="target must be a dict in all samples, or in none, got 1 of 2"):
        collate([sample(4, 4, target={}), sample(4, 4, target=1)])
    with pytest.raises(
        ValueError, match=r"target must have one shape in all .* map of each image's size, got \[\[3\], "
    ):
        collate([sample(4, 4, target=torch.zeros(3)), sample(4, 4, target=torch.zeros(2))])
    with pytest.raises(ValueError, match="target must have one shape in all samples, or be a map"):
        collate([sample(4, 4, target=torch.zeros(4, 4)), sample(5, 5, target=torch.zeros(4, 4))])


def test_a_spacing_of_another_image():
    part = sample(4, 6)._replace(spacing=Spacing((0.5, 0.5), canvas_size=(4, 6)))
    assert collate([part]).spacing.tolist() == [[0.5, 0.5]]
    with pytest.raises(ValueError, match=r"spacing is that of an image of \(4, 6\) pixels, got one of \(2, 3\)"):
        collate([part._replace(image=part.image[:, ::2, ::2])])


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
