import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from monai.networks.nets import FlexibleUNet
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import rat_timm
from helpers import record_images
from rat_timm import Grid
from rat_timm.adapters import BackboneWithFpn, DetectorWithGeometry, WithGeometry, register_monai_encoder
from rat_timm.geometry import Tokens, sample_at
from rat_timm.geometry.resample import resample


def networks():
    register_monai_encoder("test_rat_3d", physical_stem=False)
    register_monai_encoder("test_rat", physical_stem=False)
    return {
        "smp": (smp.Unet("tu-test_rat", encoder_weights=None, classes=2, physical_stem=False), (3, 45, 70)),
        "monai": (FlexibleUNet(1, 2, "test_rat_3d", spatial_dims=3), (1, 33, 20, 31)),
        "monai, images": (FlexibleUNet(3, 2, "test_rat", spatial_dims=2), (3, 45, 70)),
    }


@pytest.fixture(params=["smp", "monai", "monai, images"])
def case(request):
    network, size = networks()[request.param]
    return network.eval(), torch.randn(2, *size)


def test_any_size_goes_in_and_comes_out(case):
    network, x = case
    out = WithGeometry(network)(x)
    assert out.shape == (2, 2, *x.shape[2:])
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    assert sum(p.grad is not None for p in network.parameters()) > 20


def test_what_is_known_reaches_the_backbone(case, monkeypatch):
    network, x = case
    mask = torch.ones(2, *x.shape[2:], dtype=torch.bool)
    mask[:, 30:] = False
    wrapped = WithGeometry(network)
    seen = record_images(monkeypatch)
    wrapped(x, spacing=0.25, mask=mask, origin=[3.0] * (x.ndim - 2))
    (image,) = seen[0].levels
    assert set(image.grid.spacing.flatten().tolist()) == {0.25}
    assert set(image.grid.origin.flatten().tolist()) == {3.0}
    inside = (slice(None), *(slice(n) for n in x.shape[2:]))
    assert torch.equal(image.mask[inside], mask)
    assert int(image.mask.sum()) == int(mask.sum())
    assert image.grid.shape == tuple(-(-n // 32) * 32 for n in x.shape[2:])


@pytest.mark.parametrize("masked", [False, True])
def test_a_physical_stem_gives_maps_of_the_images_pixels(masked):
    """As if the user had resampled the image, and sampled the result at its pixels."""
    network = WithGeometry(smp.Unet("tu-test_rat", encoder_weights=None, classes=2).eval())
    x, spacing = torch.randn(3, 3, 45, 70), torch.tensor([[0.7, 0.7], [1.0, 1.0], [2.0, 1.3]])
    mask = torch.rand(3, 45, 70) > 0.3 if masked else None
    together = network(x, spacing=spacing, mask=mask)
    assert together.shape == (3, 2, 45, 70)
    for i in range(3):
        valid = None if mask is None else mask[i : i + 1]
        image = Tokens(x[i : i + 1].movedim(1, -1), Grid.create((45, 70), spacing[i]), valid)
        small = resample(image, (1.0, 1.0))
        out = network(small.x.movedim(-1, 1), spacing=1.0, mask=small.mask, origin=small.grid.origin)
        back = sample_at(Tokens(out.movedim(1, -1), small.grid, small.mask), image.grid, reach=1.0).x.movedim(-1, 1)
        expected = back if valid is None else torch.where(valid, back, 0.0)
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(x), network(x, spacing=1.0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pixels_past_the_end_of_a_resampled_image_have_maps():
    network = WithGeometry(smp.Unet("tu-test_rat", encoder_weights=None, classes=2).eval())
    out = network(torch.randn(1, 3, 101, 64), spacing=0.25)  # 25.25 pixels of the reference, so 25
    assert (out != 0).all()


def test_whole_multiples_need_no_fill(case):
    network, x = case
    whole = x.new_zeros(1, x.shape[1], *(64,) * (x.ndim - 2))
    torch.testing.assert_close(WithGeometry(network)(whole), network(whole))


def test_monais_network_by_itself_takes_any_size():
    network, size = networks()["monai"]
    assert network(torch.randn(1, *size)).shape == (1, 2, 64, 32, 32)


def test_tokens_at_masked_places_take_no_fill():
    wrapped = WithGeometry(smp.Unet("tu-test_rat", encoder_weights=None, mask_token=True)).eval()
    assert wrapped(torch.randn(1, 3, 32, 64)).shape == (1, 1, 32, 64)
    with pytest.raises(ValueError, match="x must have sizes that are multiples of 32"):
        wrapped(torch.randn(1, 3, 32, 60))


def test_other_strides_are_no_encoders_of_monai():
    with pytest.raises(ValueError, match="must have maps at strides 4, 8, 16 and 32"):
        register_monai_encoder("test_rat", output_stride=8)


def test_other_sizes_are_an_error():
    with pytest.raises(ValueError, match="network must give maps of the size"):
        WithGeometry(torch.nn.Conv2d(3, 2, 3, stride=2))(torch.randn(1, 3, 32, 32))


def test_masks_that_do_not_fit_are_an_error(case):
    network, x = case
    with pytest.raises(ValueError, match="mask must be"):
        WithGeometry(network)(x, mask=torch.ones(1, *x.shape[2:], dtype=torch.bool))


def backbone_with_fpn(**kwargs):
    return BackboneWithFpn(timm.create_model("test_rat", features_only=True, **kwargs), out_channels=8)


def faster_rcnn(physical_stem=False, **kwargs):
    return FasterRCNN(
        backbone_with_fpn(physical_stem=physical_stem),
        num_classes=2,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=1),
        rpn_post_nms_top_n_train=20,
        rpn_post_nms_top_n_test=20,
        **{"min_size": 64, "max_size": 96, **kwargs},
    )


def boxes(*rows):
    return {"boxes": torch.tensor(rows, dtype=torch.float32), "labels": torch.ones(len(rows), dtype=torch.int64)}


@pytest.mark.parametrize("detector", [faster_rcnn, lambda: RetinaNet(backbone_with_fpn(), 2, min_size=64, max_size=96)])
def test_torchvisions_detectors_train_and_detect(detector):
    detector = detector()
    images = [torch.rand(3, 32, 40), torch.rand(3, 32, 32)]
    losses = detector.train()(images, [boxes([2, 2, 20, 20]), boxes([4, 8, 30, 30])])
    sum(losses.values()).backward()
    parameters = dict(detector.backbone.body.named_parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters.values())
    assert any(p.grad.abs().sum() > 0 for name, p in parameters.items() if "stages.0" in name)
    for image, found in zip(images, detector.eval()(images), strict=True):
        assert set(found) == {"boxes", "labels", "scores"}
        limits = torch.tensor([*image.shape[:0:-1]] * 2)
        assert ((found["boxes"] >= 0) & (found["boxes"] <= limits)).all()


def test_maps_are_those_of_the_model_then_the_pyramid_network():
    backbone, x = backbone_with_fpn().eval(), torch.randn(2, 3, 64, 96)
    found = backbone(x)
    assert list(found) == ["0", "1", "2", "3", "pool"]
    maps = {str(i): m for i, m in enumerate(backbone.body(x))}
    for name, expected in backbone.fpn(maps).items():
        torch.testing.assert_close(found[name], expected)


def test_maps_keep_their_strides_at_any_spacing():
    backbone = backbone_with_fpn().eval()
    x = torch.randn(1, 3, 96, 128)
    for spacing in (None, 1.0, 0.7, 2.0):
        with rat_timm.geometry(spacing=spacing):
            maps = backbone(x)
        assert [tuple(m.shape[2:]) for m in maps.values()] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
    with rat_timm.geometry(spacing=0.7):
        assert backbone.body(x)[0].shape[2:] != (24, 32)  # the image was resampled


def test_samples_of_different_spacing_have_the_maps_they_have_alone():
    backbone, x = backbone_with_fpn().eval(), torch.randn(3, 3, 64, 96)
    mask, spacing = torch.rand(3, 64, 96) < 0.9, torch.tensor([[1.0, 1.0], [0.5, 0.7], [2.0, 1.0]])
    with rat_timm.geometry(spacing=spacing, mask=mask, origin=spacing):
        found = backbone(x)
    for i in range(3):
        with rat_timm.geometry(spacing=spacing[i], mask=mask[i : i + 1], origin=spacing[i]):
            for name, expected in backbone(x[i : i + 1]).items():
                torch.testing.assert_close(found[name][i : i + 1], expected)


def test_a_detector_knows_what_it_has_resized_and_filled(monkeypatch):
    detector = DetectorWithGeometry(faster_rcnn(min_size=64, max_size=80)).eval()
    seen = record_images(monkeypatch)
    images = [torch.rand(3, 32, 80), torch.rand(3, 32, 32)]
    detector(images, spacing=[[0.5, 1.0], [0.25, 0.25]])
    sizes = [(32, 80), (64, 64)]  # after resizing: 32 x 80 is as it was
    read = [pyramid.levels[0] for pyramid in seen]
    assert [image.grid.shape for image in read] == [(64, 96)] * 2
    assert [image.grid.spacing.tolist() for image in read] == [[[0.5, 1.0]], [[0.125, 0.125]]]
    for image, (rows, columns) in zip(read, sizes, strict=True):
        assert image.mask[:, :rows, :columns].all()
        assert int(image.mask.sum()) == rows * columns
    assert not detector.detector.transform._forward_hooks
    detector([torch.rand(3, 64, 64)])
    assert seen[2].levels[0].mask is None
    assert seen[2].levels[0].grid.spacing.unique().tolist() == [1.0]
    losses = detector.train()(images, [boxes([2, 2, 20, 20]), boxes([4, 8, 30, 30])], spacing=0.5)
    assert all(loss.isfinite() for loss in losses.values())
    with pytest.raises(ValueError, match="spacing must be"):
        detector(images, spacing=[1.0, 1.0, 1.0])


def test_a_physical_stem_keeps_torchvisions_resizing_out(monkeypatch):
    detector = DetectorWithGeometry(faster_rcnn(True, min_size=64, max_size=80)).eval()
    seen = record_images(monkeypatch)
    images = [torch.rand(3, 32, 80), torch.rand(3, 32, 32)]
    detector(images, spacing=[[0.5, 1.0], [2.0, 2.0]])
    image = seen[0].levels[0]
    assert image.grid.shape == (64, 96)  # 16 x 80 and 64 x 64, filled up
    assert image.grid.spacing.tolist() == [[1.0, 1.0]]
    assert image.mask.sum((1, 2)).tolist() == [16 * 80, 64 * 64]
    detector(images[:1])  # of which nothing is told: torchvision's size, 32 x 80
    assert seen[1].levels[0].grid.shape == (32, 96)


def test_maps_of_a_plain_vit_have_the_strides_of_a_hierarchy():
    backbone = BackboneWithFpn(timm.create_model("rat_vit_pe_core_tiny_patch16_384", features_only=True), 8)
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    with pytest.raises(ValueError, match="powers of two"):
        BackboneWithFpn(timm.create_model("rat_classic", features_only=True), 8)
