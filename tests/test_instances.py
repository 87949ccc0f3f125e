import itertools
import sys

import numpy as np
import pytest
import torch

from rat_timm.dense import Segmenter, instance_loss, instance_targets, instances

SPACINGS = {2: [(1.0, 1.0), (0.3, 1.1)], 3: [(1.0, 1.0, 1.0), (2.0, 0.5, 0.7)]}


def blobs(size, count=4, seed=0):
    """Labels that touch each other and the border: the nearest of some points, or background."""
    generator = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), axis=-1)[..., None, :]
    distance = np.linalg.norm(places - generator.random((count, len(size))) * size, axis=-1)
    return torch.from_numpy(np.where(distance.min(-1) < min(size) / 2.5, distance.argmin(-1) + 1, 0))


def slow_distance(labels, spacing, valid):
    """The distance of each pixel's centre to the nearest face, edge or corner that valid pixels of two labels share."""
    size, spacing = labels.shape, np.asarray(spacing, dtype=np.float64)
    out, faces = np.full(size, np.inf), []
    steps = [s for s in itertools.product((-1, 0, 1), repeat=len(size)) if any(s)]
    for place, step in itertools.product(np.ndindex(*size), steps):
        other = tuple(p + s for p, s in zip(place, step, strict=True))
        there = all(0 <= o < n for o, n in zip(other, size, strict=True))
        if there and valid[place] and valid[other] and labels[place] != labels[other]:
            # what two neighbouring boxes share: a face, an edge or a corner; from low to high along each axis
            middle, half = np.add(place, other) / 2, np.where(np.asarray(step) == 0, 0.5, 0.0)
            faces.append((middle - half, middle + half))
    for place in np.ndindex(*size):
        for low, high in faces:
            gap = (np.clip(place, low, high) - place) * spacing
            out[place] = min(out[place], np.sqrt((gap**2).sum()))
    return out


@pytest.mark.parametrize("size", [(9, 11), (1, 8), (5, 6, 4)])
@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_distances_are_those_to_the_faces_between_labels(size, case, masked):
    labels, spacing = blobs(size), SPACINGS[len(size)][case]
    valid = torch.from_numpy(np.random.default_rng(1).random(size) > 0.2) if masked else torch.ones(size).bool()
    given = torch.where(valid, labels, 77)  # is not looked at
    found = instance_targets(given[None], spacing, 3.0, valid[None] if masked else None)
    inside = (labels > 0) & valid
    expected = np.tanh(slow_distance(labels.numpy(), spacing, valid.numpy()) / 3.0) * inside.numpy()
    assert found.dtype == torch.float32
    assert torch.equal(found[0, 0], inside.float())
    torch.testing.assert_close(found[0, 1].double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(14, 18), (6, 8, 7)])
def test_smaller_pixels_have_the_same_distances_at_the_same_places(size):
    """The centre of a pixel is the middle of three times as small ones."""
    labels, spacing = blobs(size), SPACINGS[len(size)][1]
    small = labels
    for axis in range(len(size)):
        small = small.repeat_interleave(3, dim=axis)
    found = instance_targets(small[None], [s / 3 for s in spacing], 2.0)
    middle = (slice(None), slice(None), *(slice(1, None, 3) for _ in size))
    torch.testing.assert_close(found[middle], instance_targets(labels[None], spacing, 2.0), rtol=1e-5, atol=1e-6)


def test_a_cut_object_has_no_boundary_at_the_images_border():
    labels = torch.zeros(1, 10, 10, dtype=torch.uint8)
    labels[:, :, :4] = 1
    distance = instance_targets(labels, 0.5, 1.0)[0, 1]
    expected = torch.tanh(torch.tensor([1.75, 1.25, 0.75, 0.25, 0, 0, 0, 0, 0, 0])).expand(10, -1)
    torch.testing.assert_close(distance, expected)
    whole = instance_targets(torch.ones(1, 4, 4, dtype=torch.int64), 1.0, 1.0)
    assert torch.equal(whole, torch.ones(1, 2, 4, 4))


def test_what_is_not_annotated_has_no_loss_and_bounds_objects():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :, 4:] = -1
    labels[:, 2:6, 2:5] = 5
    targets, background = (instance_targets(given, 1.0, 2.0) for given in (labels, labels.clamp(min=0)))
    assert torch.equal(targets[:, 1], background[:, 1])
    assert torch.equal(targets[:, 0], labels.sign().float())
    logits = torch.randn(1, 2, 8, 8)
    expected = instance_loss(logits, background, labels >= 0)
    torch.testing.assert_close(instance_loss(logits, targets), expected)
    logits[:, :, 0, 6], mask = torch.nan, torch.rand(1, 8, 8) > 0.5
    expected = instance_loss(logits, background, (labels >= 0) & mask)
    torch.testing.assert_close(instance_loss(logits, targets, mask), expected)


def test_samples_of_a_batch_have_spacings_of_their_own():
    labels, spacing = torch.stack([blobs((12, 9)), blobs((12, 9), seed=5)]), torch.tensor([[1.0, 1.0], [0.5, 2.0]])
    together = instance_targets(labels, spacing, 2.0)
    logits = network_that_is_right(together)
    objects = instances(logits, spacing, scale=2.0)
    for i in range(2):
        assert torch.equal(together[i : i + 1], instance_targets(labels[i : i + 1], spacing[i], 2.0))
        assert torch.equal(objects[i : i + 1], instances(logits[i : i + 1], spacing[i], scale=2.0))


def network_that_is_right(targets):
    return torch.stack([20 * targets[:, 0] - 10, targets[:, 1].clamp(max=1 - 1e-6).atanh()], dim=1)


def balls(size, spacing, centres, radius):
    """Balls of a physical radius, in order; where two overlap a place goes to the nearer one."""
    axes = [(np.arange(n) + 0.5) * s for n, s in zip(size, spacing, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)[..., None, :]
    distance = np.linalg.norm(places - np.asarray(centres, dtype=np.float64), axis=-1)
    return torch.from_numpy(np.where(distance.min(-1) <= radius, distance.argmin(-1) + 1, 0))


BALLS = {
    "2D": ((1.0, 1.0), [(20, 20), (20, 37), (45, 30), (44, 48)]),
    "2D, flat pixels": ((0.5, 2.0), [(20, 20), (20, 37), (45, 30), (44, 48)]),
    "3D": ((2.0, 2.0, 2.0), [(20, 20, 20), (20, 20, 37), (20, 44, 30), (35, 20, 20)]),
    "3D, thick slices": ((5.0, 1.5, 1.5), [(20, 20, 20), (20, 20, 37), (20, 44, 30), (36, 20, 20)]),
}


@pytest.mark.parametrize("name", BALLS)
def test_touching_objects_are_separated(name):
    spacing, centres = BALLS[name]
    size = tuple(round(60 / s) for s in spacing)
    labels = balls(size, spacing, centres, radius=9.0)
    targets = instance_targets((labels > 0)[None].long() * labels, spacing, 5.0)
    found = instances(network_that_is_right(targets), spacing, scale=5.0)[0]
    assert found.dtype == torch.int32
    assert found.max() == 4
    for i in range(1, 5):
        true = labels == i
        best = max(float(((found == j) & true).sum() / ((found == j) | true).sum()) for j in range(1, 5))
        assert best > 0.97


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.uint16, torch.int32])
def test_labels_of_any_kind_and_logits_with_gradients(kind):
    labels = (blobs((20, 24))[None] > 0).to(kind)
    targets = instance_targets(labels, 1.0, 3.0)
    assert torch.equal(targets, instance_targets(labels.long(), 1.0, 3.0))
    logits = network_that_is_right(targets)
    found = instances(logits.bfloat16().requires_grad_(), 1.0, scale=3.0)
    assert torch.equal(found > 0, labels.bool())


@pytest.mark.parametrize("name", BALLS)
def test_objects_are_the_same_in_another_unit(name):
    """Twice the spacing and all lengths: not a pixel differs, with noise on top."""
    spacing, centres = BALLS[name]
    labels = balls(tuple(round(60 / s) for s in spacing), spacing, centres, radius=9.0)
    logits = network_that_is_right(instance_targets(labels[None], spacing, 5.0))
    logits += 0.2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    lengths = {"scale": 5.0, "depth": 0.4, "smoothing": 1.0, "min_distance": 8.0}
    found = instances(logits, spacing, **lengths, min_size=30.0)
    assert found.max() >= 4
    doubled = {key: 2 * value for key, value in lengths.items()}
    twice = instances(logits, [2 * s for s in spacing], **doubled, min_size=30.0 * 2 ** len(spacing))
    assert torch.equal(found, twice)


def rod(length):
    """A foreground of one rod, whose distance has two maxima of the same height and a dip of 0.3 between them."""
    r = torch.full((1, 1, 11, length), 0.5)
    r[..., 5, 5] = r[..., 5, length - 6] = 0.8
    return torch.cat([torch.full_like(r, 9.0), r.atanh()], dim=1)


def test_maxima_are_one_where_the_dip_is_shallow_or_the_way_short():
    logits, options = rod(31), {"scale": 10.0, "smoothing": 0.0}
    assert instances(logits, 1.0, **options, depth=2.9).max() == 2
    assert instances(logits, 1.0, **options, depth=3.1).max() == 1
    assert instances(logits, 1.0, **options, depth=2.9, min_distance=20).max() == 2  # they are 20 apart
    assert instances(logits, 1.0, **options, depth=2.9, min_distance=20.1).max() == 1
    assert instances(logits, (1.0, 0.5), **options, depth=2.9, min_distance=10.1).max() == 1
    apart = logits.clone()
    apart[:, 0, :, 15] = -9.0  # background between them
    assert instances(apart, 1.0, **options, depth=2.9, min_distance=23).max() == 2


def test_each_part_of_the_foreground_is_an_object():
    """However flat its distance is; diagonal neighbours are one part."""
    inside = torch.zeros(1, 20, 20, dtype=torch.bool)
    inside[:, 2, 2] = inside[:, 3, 3] = True
    inside[:, 10:14, 10:14] = True
    logits = torch.stack([torch.where(inside, 5.0, -5.0), torch.full((1, 20, 20), -1.0)], dim=1)
    found = instances(logits, 1.0, scale=5.0)
    assert torch.equal(found > 0, inside)
    assert found.unique().tolist() == [0, 1, 2]
    assert found[0, 2, 2] == found[0, 3, 3]


def test_small_objects_are_removed_and_numbers_are_consecutive():
    inside = torch.zeros(1, 30, 30)
    inside[:, 1:3, 1:3] = inside[:, 10:15, 10:15] = inside[:, 20:26, 20:26] = 1
    logits = network_that_is_right(torch.stack([inside, inside * 0.5], dim=1))
    for least, count in ((0.0, 3), (1.0, 3), (1.01, 2), (6.25, 2), (6.3, 1), (9.1, 0)):  # areas: 1, 6.25, 9
        found = instances(logits, 0.5, scale=2.0, min_size=least)
        assert found.unique().tolist() == list(range(count + 1))


def test_masked_places_hold_no_object():
    logits = torch.full((1, 2, 16, 16), 3.0)
    mask = torch.ones(1, 16, 16, dtype=torch.bool)
    mask[:, 6:9] = False
    logits[:, :, 6:9] = torch.nan
    found = instances(logits, 1.0, scale=2.0, mask=mask)
    assert torch.equal(found > 0, mask)
    assert found.max() == 2
    assert not instances(torch.zeros(1, 2, 8, 8), 1.0, scale=2.0).any()  # what a segmenter gives where all is masked
    assert instances(logits[:0], 1.0, scale=2.0).shape == (0, 16, 16)


def slow_loss(logits, targets, mask):
    """Pixel by pixel, in float64."""
    entropy, errors, product, total = [], {0: [], 1: []}, 0.0, 0.0
    for b, *place in mask.nonzero().tolist():
        here = (b, slice(None), *place)
        (logit, r), (inside, distance) = logits[here].double(), targets[here].double()
        p = 1 / (1 + torch.exp(-logit))
        entropy.append(-(inside * p.log() + (1 - inside) * (1 - p).log()))
        gap = (r.tanh() - distance).abs()
        errors[int(inside)].append(gap**2 / 0.2 if gap < 0.1 else gap - 0.05)
        product, total = product + p * inside, total + p + inside
    dice = 1 - (2 * product + 1e-5) / (total + 1e-5)
    return sum(entropy) / len(entropy) + dice + sum(sum(e) / max(len(e), 1) for e in errors.values()) / 2


@pytest.mark.parametrize("size", [(7, 9), (4, 5, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_valid_pixels(size, masked):
    torch.manual_seed(0)
    targets = instance_targets(torch.stack([blobs(size), blobs(size, seed=3)]), 1.0, 2.0)
    logits = torch.randn(2, 2, *size, requires_grad=True)
    mask = torch.rand(2, *size) > 0.3 if masked else torch.ones(2, *size, dtype=torch.bool)
    loss = instance_loss(logits, targets, mask if masked else None)
    torch.testing.assert_close(loss.double(), slow_loss(logits, targets, mask), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(slow_loss(logits, targets, mask), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    wild = torch.where(mask.unsqueeze(1), logits.detach(), torch.nan)
    assert torch.equal(instance_loss(wild, targets, mask if masked else None), loss)


@pytest.mark.parametrize("share", [0, 1])
def test_the_loss_of_one_kind_of_pixels_is_finite(share):
    logits = torch.randn(1, 2, 6, 6, requires_grad=True)
    targets = torch.full((1, 2, 6, 6), float(share))
    for mask in (None, torch.zeros(1, 6, 6, dtype=torch.bool)):
        loss = instance_loss(logits, targets, mask)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_a_network_that_is_right_has_no_loss():
    targets = instance_targets(blobs((20, 20))[None], 1.0, 3.0)
    right = network_that_is_right(targets)
    assert instance_loss(right, targets) < 1e-3
    assert instance_loss(-right, targets) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: instance_targets(torch.zeros(1, 4, 4), 1.0, 1.0), "labels must be whole"),
        (lambda: instance_targets(torch.zeros(4, 4).long(), 1.0, 1.0), "labels must be whole"),
        (lambda: instance_targets(torch.zeros(1, 4, 4).long(), (1.0,) * 3, 1.0), "spacing must be"),
        (lambda: instance_targets(torch.zeros(1, 4, 4).long(), 1.0, 0.0), "scale must be a positive length"),
        (lambda: instance_targets(torch.zeros(1, 4, 4).long(), 1.0, 1.0, torch.ones(4, 4) > 0), "mask must be"),
        (lambda: instance_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), "logits must be"),
        (lambda: instance_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4)), "targets must have"),
        (lambda: instances(torch.zeros(1, 2, 4, 4), 1.0, scale=-1.0), "scale must be"),
        (lambda: instances(torch.zeros(1, 2, 4, 4), 1.0, scale=1.0, threshold=1.0), "threshold must be"),
        (lambda: instances(torch.zeros(1, 2, 4, 4), 1.0, scale=1.0, depth=0.0), "depth must be"),
        (lambda: instances(torch.zeros(1, 2, 4, 4), 1.0, scale=1.0, min_size=-1.0), "min_size must not be"),
        (lambda: instances(torch.zeros(1, 2, 4, 4), 1.0, scale=1.0, smoothing=float("nan")), "smoothing must not be"),
    ],
)
def test_what_does_not_fit_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "edt", None)
    with pytest.raises(ImportError, match="rat-timm\\[dense\\]"):
        instance_targets(torch.ones(1, 4, 4).long(), 1.0, 1.0)


@pytest.mark.parametrize(("name", "size"), [("test_rat", (40, 48)), ("test_rat_3d", (8, 24, 32))])
def test_a_segmenter_trains_on_instances(name, size):
    torch.manual_seed(0)
    labels, spacing = torch.stack([blobs(size), blobs(size, seed=1)]), SPACINGS[len(size)][1]
    mask = torch.ones(labels.shape, dtype=torch.bool)
    mask[..., -9:] = False
    model = Segmenter(name, 2, width=16, in_chans=1, spacing=spacing)
    image = (labels > 0).float()[:, None] + 0.1 * torch.randn(2, 1, *size)
    targets = instance_targets(labels, spacing, 3.0, mask)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        losses.append(instance_loss(model(image, spacing=spacing, mask=mask), targets, mask))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    found = instances(model.eval()(image, spacing=spacing, mask=mask), spacing, scale=3.0)
    assert found.shape == labels.shape
    assert not found[~mask].any()
