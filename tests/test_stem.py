import itertools

import pytest
import timm
import torch
from torch.nn import functional as F

from helpers import lively
from rat_timm import Grid, RatConfig
from rat_timm.models.rat.config import share_stride, stem_convs
from rat_timm.models.rat.places import embedded
from rat_timm.models.rat.stage import Stem
from rat_timm.ops.masking import pool_mask

POOLED = {"stem_kernel_size": (7,), "stem_pool": True}
SIZES = {"test_rat": (41, 36), "test_rat_3d": (16, 21, 20)}


@pytest.mark.parametrize(
    ("stride", "kernels", "expected"),
    [
        ((4, 4), (3, 3), [(2, 2), (2, 2)]),
        ((1, 4, 2), (3, 3), [(1, 2, 2), (1, 2, 1)]),
        ((6, 9), (3, 3), [(3, 3), (2, 3)]),
        ((1, 1), (7,), [(1, 1)]),
    ],
)
def test_strides_are_shared_out(stride, kernels, expected):
    assert share_stride(stride, kernels) == expected


@pytest.mark.parametrize("size", [(16, 16), (17, 5), (4, 4)])
def test_a_token_stands_for_every_cell(size):
    x = torch.randn(1, 3, *size)
    out = Stem(3, 8)(x)
    assert out.shape == (1, 8, *(-(-n // 4) for n in size))


def test_a_list_gives_a_list():
    stem, x = Stem(3, 8), torch.randn(2, 3, 12, 16)
    both = stem([x, x[..., ::2]])
    assert [m.shape for m in both] == [(2, 8, 3, 4), (2, 8, 3, 2)]
    assert torch.equal(both[0], stem(x))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_masked_pixels_reach_nothing(poison):
    stem, mask, x = Stem(3, 8), torch.rand(1, 21, 18) > 0.5, torch.randn(1, 3, 21, 18)
    assert torch.equal(stem(x, [mask]), stem(torch.where(mask[:, None], x, poison), [mask]))


def test_a_single_convolution_stands_alone():
    stem, x = Stem(3, 8, kernel_size=(7,), stride=(1, 1)), torch.randn(1, 3, 9, 9)
    expected = torch.nn.functional.conv2d(x, stem.convs[0].weight, stem.convs[0].bias, padding=3)
    torch.testing.assert_close(stem(x), expected)


def valid_places(mask, sample, ranges):
    """Which places of a box are in the grid and valid."""
    places = itertools.product(
        *(range(max(first, 0), min(stop, n)) for (first, stop), n in zip(ranges, mask.shape[1:], strict=True))
    )
    return [at for at in places if mask[(sample, *at)]]


def largest(x, mask, stride):
    """The largest valid value of each cell and, where cells are wider than a place, of the place before them."""
    coarse = [-(-n // step) for n, step in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *coarse)
    for sample, place in itertools.product(range(len(x)), itertools.product(*map(range, coarse))):
        cell = [(p * step, (p + 1) * step) for p, step in zip(place, stride, strict=True)]
        window = [(first - (step - 1), stop) for (first, stop), step in zip(cell, stride, strict=True)]
        if valid_places(mask, sample, cell):
            near = [x[(sample, slice(None), *at)] for at in valid_places(mask, sample, window)]
            out[(sample, slice(None), *place)] = torch.stack(near).amax(dim=0)
    return out


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize(
    ("size", "stride", "pooled"),
    [
        ((21,), (4,), (2,)),
        ((11, 9), (4, 1), (2, 1)),
        ((5, 9, 7), (1, 2, 4), (1, 2, 2)),
        ((7, 8, 9), (3, 4, 4), (1, 2, 2)),
    ],
)
def test_a_pooled_stem_takes_the_largest_valid_neighbour(size, stride, pooled, share):
    stem = lively(Stem(2, 6, len(size), (7,), stride, pool=True)).double()
    x, given = torch.randn(2, 2, *size, dtype=torch.float64), torch.rand(2, *size) < share
    made = stem.convs[0](torch.where(given[:, None], x, 0.0))
    taken = largest(made, pool_mask(given, stem.strides[0]), pooled)
    expected = F.layer_norm(taken.movedim(1, -1), (6,), *stem.norms[0].parameters(), eps=1e-6)
    hidden = torch.where(given[:, None], x, torch.nan)
    torch.testing.assert_close(stem(hidden, [given]), expected.movedim(-1, 1))
    if share == 1:
        assert torch.equal(stem(x), stem(x, [given]))


def test_pooling_takes_its_share_of_the_stride():
    assert stem_convs((4, 1), (7,), pool=True) == [((7, 7), (2, 1), (3, 3)), ((3, 1), (2, 1), (1, 0))]
    assert stem_convs((8, 4), (3, 3), pool=True)[-1].stride == (2, 2)
    assert stem_convs((4, 4), (3, 3)) == [((3, 3), (2, 2), (1, 1))] * 2
    with pytest.raises(ValueError, match=r"^stem_pool takes a factor of 2 of stem_stride .* got \(1, 3\)"):
        RatConfig(stem_stride=(1, 3), stem_pool=True)


@pytest.mark.parametrize("name", SIZES)
def test_a_model_with_a_pooled_stem_learns_and_is_where_it_was(name):
    size = SIZES[name]
    model = timm.create_model(name, num_classes=3, **POOLED)
    plain = timm.create_model(name, num_classes=3)
    x = torch.randn(2, model.in_chans, *size)
    assert [f.shape for f in model.forward_intermediates(x, intermediates_only=True)] == [
        f.shape for f in plain.forward_intermediates(x, intermediates_only=True)
    ]
    before, after = (embedded(Grid.create(size), m.cfg) for m in (plain, model))
    assert before.shape == after.shape
    torch.testing.assert_close(before.origin, after.origin)
    model(x).square().sum().backward()
    assert [n for n, p in model.stem.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@torch.no_grad()
def test_programs_give_what_a_pooled_stem_gives():
    torch.compiler.reset()
    model = lively(timm.create_model("test_rat", num_classes=3, **POOLED)).eval()
    x, mask = torch.randn(2, 3, 40, 36), torch.rand(2, 40, 36) < 0.7
    exported = torch.export.export(model, (x,), {"mask": mask}).module()
    torch.testing.assert_close(exported(x, mask=mask), model(x, mask=mask), rtol=1e-4, atol=1e-4)
