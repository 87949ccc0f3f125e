import pytest
import torch

from rat_timm.geometry.grid import Grid, Pyramid, Tokens
from rat_timm.layers import Stem
from rat_timm.layers.stem import share_stride


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


def pyramid(*sizes, mask=None):
    return Pyramid([Tokens(torch.randn(1, *size, 3), Grid.create(size), mask) for size in sizes])


@pytest.mark.parametrize("size", [(16, 16), (17, 5), (4, 4)])
def test_grid_and_tokens_agree(size):
    (out,) = Stem(3, 8)(pyramid(size)).levels
    assert out.x.shape == (1, *(-(-n // 4) for n in size), 8)
    assert out.grid.shape == out.x.shape[1:-1]
    assert out.grid.spacing.tolist() == [[4.0, 4.0]]
    assert out.grid.origin.tolist() == [[0.5, 0.5]]  # a kernel of 3 stays centred on the first pixel of its cell


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_masked_pixels_reach_nothing(poison):
    stem, mask = Stem(3, 8), torch.rand(1, 21, 18) > 0.5
    clean = pyramid((21, 18), mask=mask)
    dirty = torch.where(mask[..., None], clean.levels[0].x, poison)
    a, b = (stem(clean._replace(levels=[clean.levels[0]._replace(x=x)])).levels[0] for x in (clean.levels[0].x, dirty))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.mask, b.mask)


def test_a_single_convolution_stands_alone():
    stem = Stem(3, 8, kernel_size=(7,), stride=(1, 1))
    x = pyramid((9, 9))
    expected = torch.nn.functional.conv2d(
        x.levels[0].x.movedim(-1, 1), stem.convs[0].weight, stem.convs[0].bias, padding=3
    )
    torch.testing.assert_close(stem(x).levels[0].x.movedim(-1, 1), expected)
