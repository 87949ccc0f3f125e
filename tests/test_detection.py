import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from helpers import record_images
from rat_timm.dense import fcos, mask_rcnn

SIZE = 80


def discs(count, seed):
    """Images of bright discs, and their boxes and masks."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*[torch.arange(SIZE) + 0.5] * 2, indexing="ij"), dim=-1)
    images, targets = [], []
    for _ in range(count):
        centres = torch.rand(3, 2, generator=generator) * (SIZE - 40) + 20
        radii = torch.rand(3, generator=generator) * 8 + 7
        centres[1:] = torch.where(
            torch.cdist(centres[1:], centres[:1]) < 36, 1000.0, centres[1:]
        )  # apart from the first
        centres[2:] = torch.where(torch.cdist(centres[2:], centres[1:2]) < 36, 1000.0, centres[2:])
        here = centres[:, 0] < SIZE
        centres, radii = centres[here], radii[here]
        distance = (places - centres[:, None, None]).norm(dim=-1)  # [N, H, W]
        image = torch.sigmoid(radii[:, None, None] - distance).amax(0) + 0.1 * torch.randn(
            SIZE, SIZE, generator=generator
        )
        low, high = (centres + sign * radii[:, None] for sign in (-1, 1))
        boxes = torch.cat([low.flip(1), high.flip(1)], dim=1)
        masks = (distance <= radii[:, None, None]).byte()
        images.append(image.expand(3, -1, -1).contiguous())
        targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks})
    return images, targets


def rescale(images, targets, factor):
    """The same scenes with more or fewer pixels."""
    images = [F.interpolate(x[None], scale_factor=factor, mode="bilinear", antialias=factor < 1)[0] for x in images]
    masks = [F.interpolate(t["masks"][None], scale_factor=factor, mode="nearest-exact")[0] for t in targets]
    return images, [{**t, "boxes": t["boxes"] * factor, "masks": m} for t, m in zip(targets, masks, strict=True)]


def without_masks(targets):
    return [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]


def precision(found, targets):
    """COCO's mAP, over IoU 0.5 to 0.95, and that at 0.5."""
    metric = MeanAveragePrecision(max_detection_thresholds=[1, 10, 100])
    metric.update(found, targets)
    result = metric.compute()
    return float(result["map"]), float(result["map_50"])


def small_mask_rcnn(backbone="test_rat", **options):
    sizes = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}
    return mask_rcnn(backbone, 2, 32, (16, 24, 32, 64, 128), **{**sizes, **options})


def train_on_discs(folder):
    torch.manual_seed(0)
    detector = fcos("test_rat", 2, 32)
    images, targets = discs(64, 0)
    optimizer = torch.optim.AdamW(detector.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=75)
    for step in range(75):
        chosen = [(4 * step + i) % 64 for i in range(4)]
        losses = detector([images[i] for i in chosen], without_masks(targets[i] for i in chosen), spacing=1.0)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    torch.save(detector.state_dict(), folder / "weights.pt")


@pytest.fixture(scope="session")
def trained(once):
    """An FCOS that knows discs at the reference spacing."""
    detector = fcos("test_rat", 2, 32).eval()
    detector.load_state_dict(torch.load(once("discs", train_on_discs) / "weights.pt"))
    return detector


@pytest.mark.slow
def test_a_detector_learns_in_seconds(trained):
    images, targets = discs(12, 1)
    with torch.inference_mode():
        found = trained(images, spacing=1.0)
        again = trained(images)  # nothing said: the reference spacing
    mean, at_half = precision(found, without_masks(targets))
    assert at_half > 0.8
    assert mean > 0.4
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"])


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_boxes_follow_the_pixel_size(trained, factor):
    """More pixels of the same scene give the same boxes, in those pixels; untold, they do not."""
    images, targets = discs(4, 2)
    more, of_more = rescale(images, targets, factor)
    with torch.inference_mode():
        found, expected = trained(more, spacing=1 / factor), trained(images, spacing=1.0)
        untold = trained(more)
    for one, other in zip(found, expected, strict=True):
        sure = other["scores"] > 0.5
        iou = box_iou(other["boxes"][sure] * factor, one["boxes"])
        assert (iou.max(1).values > 0.8).all()
    reached = precision(found, without_masks(of_more))[1]
    assert reached > precision(expected, without_masks(targets))[1] - 0.05
    assert precision(untold, without_masks(of_more))[1] < reached - 0.1


def test_images_of_a_batch_have_pixel_sizes_of_their_own(trained):
    images, _ = discs(2, 3)
    (larger,), _ = rescale(images[1:], discs(2, 3)[1][1:], 2)
    spacing = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    with torch.inference_mode():
        together = trained([images[0], larger], spacing=spacing)
        alone = [trained([image], spacing=row)[0] for image, row in zip([images[0], larger], spacing, strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-3, atol=1e-2)


def test_flat_pixels_are_told_per_axis(trained):
    images, targets = discs(6, 4)
    flat = [F.interpolate(x[None], scale_factor=(1.0, 0.5), mode="bilinear", antialias=True)[0] for x in images]
    targets = [{**t, "boxes": t["boxes"] * torch.tensor([0.5, 1.0, 0.5, 1.0])} for t in without_masks(targets)]
    with torch.inference_mode():
        assert precision(trained(flat, spacing=(1.0, 2.0)), targets)[1] > 0.8


@pytest.mark.parametrize("make", [lambda name: fcos(name, 2, 32), small_mask_rcnn], ids=["fcos", "mask_rcnn"])
@pytest.mark.parametrize("name", ["test_rat", "rat_vit_pe_core_tiny_patch16_384"])
def test_a_step_trains_the_backbone(make, name):
    torch.manual_seed(0)
    detector = make(name)
    images, targets = discs(2, 5)
    larger, of_larger = rescale(images[1:], targets[1:], 2)
    images, targets = [images[0], *larger], [targets[0], *of_larger]
    losses = detector(images, targets, spacing=[[1.0, 1.0], [0.5, 0.5]])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    missing = [n for n, p in detector.detector.backbone.named_parameters() if p.grad is None]
    assert not missing
    gradients = [p.grad for p in detector.detector.backbone.body.parameters()]
    assert all(g.isfinite().all() for g in gradients)
    assert sum(float(g.abs().sum()) > 0 for g in gradients) > len(gradients) / 2


def test_masks_come_out_in_the_images_own_pixels():
    detector = small_mask_rcnn(box_score_thresh=0.0).eval()
    image = rescale(*discs(1, 6), 2)[0][0]
    (found,) = detector([image], spacing=0.5)
    assert found["masks"].shape[1:] == (1, 2 * SIZE, 2 * SIZE)
    assert (found["boxes"] <= 2 * SIZE).all()


def test_masks_of_targets_are_brought_to_the_reference(monkeypatch):
    detector = small_mask_rcnn()
    images, targets = rescale(*discs(1, 7), 2)
    before = {name: value.clone() for name, value in targets[0].items()}
    detector.detector.transform.sizes = [(SIZE, SIZE)]
    _, done = detector.detector.transform(images, targets)
    assert done[0]["masks"].shape == (*before["masks"].shape[:1], SIZE, SIZE)
    torch.testing.assert_close(done[0]["boxes"], before["boxes"] / 2)
    assert all(torch.equal(targets[0][name], value) for name, value in before.items())  # the user's are left alone


def test_the_backbone_sees_the_reference_spacing_and_the_fill(monkeypatch):
    detector = fcos("test_rat", 2, 32, {"spacing": 0.5}).eval()
    seen = record_images(monkeypatch)
    detector([torch.randn(3, 64, 80), torch.randn(3, 50, 40)], spacing=[[0.25, 0.5], [0.5, 1.0]])
    (image,) = seen[0].levels
    assert image.grid.shape == (64, 96)  # sizes at the reference: 32 x 80 and 50 x 80, filled up to multiples of 32
    assert image.grid.spacing.tolist() == [[0.5, 0.5]]
    assert image.mask.sum((1, 2)).tolist() == [32 * 80, 50 * 80]


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="out_channels must be a multiple of 32"):
        fcos("test_rat", 2, 48)
    with pytest.raises(ValueError, match="model of images"):
        fcos("test_rat_3d", 2)
    with pytest.raises(ValueError, match="powers of two"):
        fcos("rat_eva02_tiny_patch14_224", 2)
    with pytest.raises(ValueError, match="anchor_sizes must be 5 numbers"):
        mask_rcnn("test_rat", 2, anchor_sizes=(8, 16))
    detector = fcos("test_rat", 2, 32).eval()
    with pytest.raises(ValueError, match="spacing would make"):
        detector([torch.rand(3, 32, 32)], spacing=1e5)
    assert not detector.detector.transform.sizes
    assert math.prod(detector([torch.rand(3, 80, 80)])[0]["boxes"].shape[1:]) == 4
