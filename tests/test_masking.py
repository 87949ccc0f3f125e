import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_timm.ops.masking import (
    attention,
    exp_clamped,
    join_masks,
    mask_value,
    masked_attention,
    pool_mask,
)
from references import places


def test_exponentials_beside_one_are_right_where_they_show():
    x = torch.linspace(-80, 0, 81, dtype=torch.float32)
    assert torch.equal(exp_clamped(x), x.exp())
    low = torch.tensor([-90.0, mask_value(torch.float32), -torch.inf])
    assert torch.equal(1 + exp_clamped(low), torch.ones(3))
    assert exp_clamped(torch.tensor(-700.0, dtype=torch.float64)) == torch.tensor(-700.0, dtype=torch.float64).exp()


@pytest.mark.parametrize("places", [3, 300])  # either side of what is few
@pytest.mark.parametrize("biased", [False, True])
def test_attention_agrees_with_its_definition(places, biased):
    tensors = [torch.randn(2, 8, places, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    query, key, value = tensors
    bias = torch.randn(2, 1, places, places, dtype=torch.float64) if biased else None
    weights = ((query[..., None, :] * key[..., None, :, :]).sum(-1) / 2 + (bias if biased else 0)).exp()
    expected = (weights / weights.sum(-1, keepdim=True)) @ value
    out = attention(query, key, value, bias)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(o.square().sum(), tensors, retain_graph=True) for o in (out, expected))
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        torch.testing.assert_close(attention(query, key, value, bias), expected)


def test_attention_leaves_out_what_is_not_allowed():
    query, key, value = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    allowed = torch.rand(2, 1, 5, 7) > 0.5
    allowed[0, 0, 2] = False
    weights = (query @ key.mT * 0.5).exp() * allowed
    expected = torch.nan_to_num(weights / weights.sum(-1, keepdim=True)) @ value
    out = masked_attention(query, key, value, allowed)
    torch.testing.assert_close(out, expected)
    assert out[0, :, 2].abs().max() == 0
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (query, key, value))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 2**31))
def test_a_cell_is_valid_if_any_of_its_places_is(shape, stride, seed):
    mask = torch.rand(1, *shape, generator=torch.Generator().manual_seed(seed)) > 0.8
    coarse = [-(-n // stride) for n in shape]
    expected = torch.zeros(1, *coarse, dtype=torch.bool)
    for place in places(shape):
        expected[(0, *(i // stride for i in place))] |= mask[(0, *place)]
    assert torch.equal(pool_mask(mask, (stride,) * len(shape)), expected)


def test_masks_of_levels_are_joined_in_order():
    mask = torch.tensor([[[True, False], [False, True]]])
    assert join_masks([None, None], [(1, 3), (1, 2)]) is None
    joined = join_masks([None, mask], [(1, 3), (1, 2, 2)])
    assert joined.tolist() == [[True, True, True, True, False, False, True]]
