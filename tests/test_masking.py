import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_timm.ops.masking import join_masks, pool_mask
from references import places


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
