import pytest
import torch

from rat_timm.models.rat.config import share_stride
from rat_timm.models.rat.stage import Stem


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
