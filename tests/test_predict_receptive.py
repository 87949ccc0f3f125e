import pytest
import timm
import torch
from torch import nn

from rat_timm.dense import Segmenter
from rat_timm.geometry.box import Box, part_of
from rat_timm.geometry.grid import Grid
from rat_timm.predict.network import Network
from rat_timm.predict.receptive import receptive_field, unbounded_layers

LOCAL = {"embed_dim": (16, 16), "depths": (1, 2), "num_heads": 2, "attn_kernel_size": 3}


def segmenter(name="test_rat", **options):
    """A tiny model of windows and sparse groupings whose classes depend on its features."""
    model = Segmenter(name, 2, **{"width": 8, "in_chans": 1, **LOCAL, **options}).double().eval()
    nn.init.normal_(model.classifier.weight, std=0.3)
    return model


@pytest.mark.parametrize("decoder", ["groups", "fpn"])
@pytest.mark.parametrize("detail", ["contrast", "pixels", False])
def test_gradients_stay_in_the_receptive_field_and_nearly_fill_it(decoder, detail):
    model = segmenter(decoder=decoder, detail=detail, stem_stride=2)
    reach = receptive_field(model).pixels[0]
    size = 2 * reach + 24
    x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    middle = size // 2
    model(x)[0, 0, middle, middle].backward()
    seen = x.grad[0, 0].abs().amax(dim=0).nonzero()[:, 0]
    left, right = middle - int(seen[0]), int(seen[-1]) - middle
    assert max(left, right) <= reach
    assert max(left, right) > reach - 2 * 4  # by less than two of the coarsest stage's places


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("test_rat", (61, 90), {"iters": 2, "kernel_size": 5, "stem_stride": 1}),
        ("test_rat", (90, 57), {"decoder": "fpn", "attn_kernel_size": (2, 5), "neighborhood_kernel": 5}),
        ("test_rat", (70, 45), {"sga_attention_type": "none", "stride": (1, 2), "detail": False, "output_stride": 4}),
        ("test_rat", (61, 90), {"block_types": ("conv", "attention"), "conv_kernel_size": (5, 3)}),
        ("test_rat", (61, 90), {"stem_kernel_size": (7,), "stem_pool": True}),
        ("test_rat", (61, 90), {"detail": "pixels"}),
        ("test_rat", (70, 45), {"block_types": "conv", "output_stride": 4, "detail": False}),
        ("test_rat_3d", (17, 26, 40), {"stem_stride": (1, 2, 4), "group_first": True}),
    ],
)
def test_what_is_needed_gives_what_the_whole_gives(name, size, options):
    network = Network(segmenter(name, **options), "labels")
    grid, x = Grid.create(size), torch.randn(1, 1, *size, dtype=torch.float64)
    mask = torch.rand(1, *size) > 0.3
    x[~mask[:, None]] = float("nan")
    maps = network.map_grid(grid)
    with torch.no_grad():
        whole, _ = network([x], [[grid]], [mask])
        assert whole.shape[1:-1] == maps.shape
        for first in (0.0, 0.3, 0.8):
            start = tuple(int(first * n) for n in maps.shape)
            box = Box(start, tuple(min(a + 5, n) for a, n in zip(start, maps.shape, strict=True)))
            seen = network.needed(grid, box).aligned(network.stride(grid)).clipped(size)
            index, part = (..., *seen.slices), part_of(grid, seen)
            values, _ = network([x[index]], [[part]], [mask[index]])
            ratio = (maps.spacing / grid.spacing)[0].round().long().tolist()
            inner = box.moved([-a // r for a, r in zip(seen.start, ratio, strict=True)])
            torch.testing.assert_close(values[(0, *inner.slices)], whole[(0, *box.slices)], atol=1e-6, rtol=1e-5)


def test_a_field_is_in_the_units_of_the_reference_spacing_and_per_axis():
    backbone = timm.create_model("test_rat", **LOCAL, spacing=(2.0, 0.5), stem_stride=(1, 4), num_classes=0)
    field = receptive_field(backbone)
    assert field.unbounded == ()
    assert field.length == tuple(n * s for n, s in zip(field.pixels, (2.0, 0.5), strict=True))
    assert field.pixels[0] < field.pixels[1]  # with fewer pixels in a token
    assert all(a < b for a, b in zip(receptive_field(backbone, 0).pixels, field.pixels, strict=True))


def test_what_sees_everything_is_named():
    model = timm.create_model("test_rat", sga_attention_type=("sparse", "dense", "sparse"), reg_tokens=1)
    field = receptive_field(model)
    assert field.pixels is None
    assert field.length is None
    assert [reason.split(":")[0] for reason in field.unbounded] == [
        "the grouping before stage 3 is dense",
        "blocks of stage 4 attend to all tokens, as there are prefix tokens",
    ]
    assert receptive_field(model, 1).unbounded == ()
    joint = timm.create_model("test_rat")
    assert receptive_field(joint).unbounded == ()
    assert list(unbounded_layers(joint, levels=2)) == [
        "blocks of stage 4 attend to all tokens, as there are several levels"
    ]
    plain = timm.create_model("rat_eva02_tiny_patch14_224", num_classes=0)
    assert receptive_field(plain).unbounded == ("every block attends to all patches of all levels",)


def test_other_models_and_stages_are_refused():
    with pytest.raises(ValueError, match=r"model must be a rat_timm.dense.Segmenter, .* got Linear"):
        receptive_field(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="stage must be from 0 to 3, or from the end, got 4"):
        receptive_field(timm.create_model("test_rat"), 4)
