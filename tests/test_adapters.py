import pytest
import segmentation_models_pytorch as smp
import torch
from monai.networks.nets import FlexibleUNet

from rat_timm.adapters import WithGeometry, register_monai_encoder
from recording import record_images


def networks():
    register_monai_encoder("test_rat_3d")
    register_monai_encoder("test_rat")
    return {
        "smp": (smp.Unet("tu-test_rat", encoder_weights=None, classes=2), (3, 45, 70)),
        "monai": (FlexibleUNet(1, 2, "test_rat_3d", spatial_dims=3), (1, 33, 40, 37)),
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


def test_whole_multiples_need_no_fill(case):
    network, x = case
    whole = x.new_zeros(1, x.shape[1], *(64,) * (x.ndim - 2))
    torch.testing.assert_close(WithGeometry(network)(whole), network(whole))


def test_monais_network_by_itself_takes_any_size():
    network, size = networks()["monai"]
    assert network(torch.randn(1, *size)).shape == (1, 2, 64, 64, 64)


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
