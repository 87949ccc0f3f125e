import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_timm.layers.masking import join_masks, masked_attention, masked_log_softmax, nothing, pool_mask
from references import places


def test_softmax_over_the_allowed_entries_only():
    logits = torch.tensor([[1.0, 2.0, 1e4], [3.0, 3.0, 3.0]])
    allowed = torch.tensor([[True, True, False], [False, False, False]])
    expected = torch.tensor([[1, torch.e, 0], [0, 0, 0]]) / (1 + torch.e)
    found = masked_log_softmax(logits, allowed)
    torch.testing.assert_close(found.exp(), expected)
    assert torch.equal(found == nothing(torch.float32), ~allowed)


def test_softmax_of_half_precision_is_float32():
    assert masked_log_softmax(torch.zeros(2, 3, dtype=torch.bfloat16), None).dtype == torch.float32
    assert masked_log_softmax(torch.zeros(2, 3, dtype=torch.float64), None).dtype == torch.float64


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
