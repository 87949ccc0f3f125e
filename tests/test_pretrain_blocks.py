"""Blocks that are hidden: their share, their physical size, and pixels normalised in each."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rat_timm.geometry.grid import Grid
from rat_timm.pretrain import hide_blocks, hide_pyramid, normalize_blocks
from rat_timm.pretrain.blocks import FLOOR, check_block

FIELDS = [((24, 20), (0.5, 1.0)), ((6, 12, 10), (2.0, 0.5, 1.0))]
SIZES = st.lists(st.integers(3, 12), min_size=2, max_size=3)


def block_of(index, spacing, block, cell):
    """The block of a pixel, axis by axis, in Python's numbers."""
    center = [(i // c * c + c / 2) * s for i, s, c in zip(index, spacing, cell, strict=True)]
    return tuple(math.floor(x / b + 1e-6) for x, b in zip(center, block, strict=True))


@settings(max_examples=25)
@given(
    SIZES,
    st.floats(0.05, 0.95),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.sampled_from([1.0, 3.1]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_whole_blocks_are_hidden_up_to_the_share(size, share, step, block, cell, masked):
    spacing, cells = [step * (axis + 1) for axis in range(len(size))], [cell] * len(size)
    blocks = [block * 2] * len(size)
    valid = torch.rand(2, *size) > 0.3 if masked else torch.ones(2, *size, dtype=torch.bool)
    hidden = hide_blocks(Grid.create(size, spacing), tuple(blocks), share, 2, valid=valid, cell=cells)
    assert not (hidden & ~valid).any()
    for one, there in zip(hidden, valid, strict=True):
        members = {}
        for index in there.nonzero().tolist():
            members.setdefault(block_of(index, spacing, blocks, cells), []).append(bool(one[tuple(index)]))
        assert all(len(set(same)) == 1 for same in members.values())
        counts = [len(same) for same in members.values()]
        count = int(one.sum())
        if len(members) < 2:
            assert count == 0
            continue
        assert 0 < count < int(there.sum())
        assert abs(count - share * int(there.sum())) <= max(counts)


def test_seeds_repeat_what_is_hidden():
    grid = Grid.create((32, 32), 0.5)
    torch.manual_seed(1)
    first, other = hide_blocks(grid, 2.0, 0.5, 2), hide_blocks(grid, 2.0, 0.5, 2)
    torch.manual_seed(1)
    assert torch.equal(hide_blocks(grid, 2.0, 0.5, 2), first)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    frequency = torch.stack([hide_blocks(grid, 2.0, 0.75, 20) for _ in range(5)]).float().mean((0, 1))
    assert float(frequency.mean()) == pytest.approx(0.75)
    assert (frequency - 0.75).abs().max() < 4.5 * (0.75 * 0.25 / 100) ** 0.5  # of 64 blocks


def test_samples_of_their_own_pixel_size():
    rows = torch.tensor([[1.0, 1.0], [0.5, 0.25]])
    hidden = hide_blocks(Grid((8, 16), rows, rows / 2), 2.0, 0.5, 2)
    for one, (high, wide) in zip(hidden, ((2, 2), (4, 8)), strict=True):
        cells = one.unfold(0, high, high).unfold(1, wide, wide).flatten(2)
        assert (cells.all(-1) | ~cells.any(-1)).all()
        assert one.sum() == 64


@pytest.mark.parametrize(("size", "spacing"), FIELDS)
def test_levels_are_hidden_alike_and_one_as_a_whole(size, spacing):
    coarse = [3 * step for step in spacing]
    grids = [Grid.create(size, spacing), Grid.create(size, coarse)]
    masks = [None, torch.rand(200, *size) > 0.1]
    hidden = hide_pyramid(grids, (4.0,) * len(size), 0.5, 200, level=0.5, valid=masks)
    there = [torch.ones_like(hidden[0]), masks[1]]
    whole = torch.stack([(h == t).flatten(1).all(1) for h, t in zip(hidden, there, strict=True)])  # [levels, samples]
    assert whole.sum(0).max() == 1
    assert 30 < int(whole[0].sum()) < 70  # of 200, a quarter
    assert 30 < int(whole[1].sum()) < 70
    shares = [h.flatten(1).sum(1) / t.flatten(1).sum(1) for h, t in zip(hidden, there, strict=True)]
    for share, all_of_it in zip(shares, whole, strict=True):
        assert (share[~all_of_it] - 0.5).abs().max() < 0.3
    torch.manual_seed(3)
    alone = hide_pyramid(grids, (4.0,) * len(size), 0.5, 1)
    torch.manual_seed(3)
    assert torch.equal(alone[0], hide_blocks(grids[0], (4.0,) * len(size), 0.5, 1))
    assert torch.equal(alone[1], hide_blocks(grids[1], (12.0,) * len(size), 0.5, 1))


@pytest.mark.parametrize(("size", "spacing"), FIELDS)
def test_pixels_are_normalised_in_each_block(size, spacing):
    image = torch.randn(2, 3, *size) * 3 + 5
    valid = torch.rand(2, *size) > 0.2
    image = torch.where(valid.unsqueeze(1), image, torch.nan)
    grid = Grid.create(size, spacing)
    block = [3.0] * len(size)
    norm = normalize_blocks(image, grid, tuple(block), valid)
    made = norm.apply(image)
    for sample in range(2):
        members = {}
        for index in valid[sample].nonzero().tolist():
            members.setdefault(block_of(index, spacing, block, [1] * len(size)), []).append(tuple(index))
        for indices in members.values():
            for channel in range(3):
                values = [float(image[(sample, channel, *index)]) for index in indices]
                mean = sum(values) / len(values)
                std = (sum((v - mean) ** 2 for v in values) / len(values) + FLOOR**2) ** 0.5
                for index, value in zip(indices, values, strict=True):
                    assert float(made[(sample, channel, *index)]) == pytest.approx((value - mean) / std, abs=1e-4)
    there = valid.unsqueeze(1).expand_as(image)
    torch.testing.assert_close(norm.undo(made)[there], image[there])


def test_what_does_not_fit():
    grid = Grid.create((8, 8), 1.0)
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, got 1"):
        hide_blocks(grid, 2.0, 1)
    with pytest.raises(ValueError, match="block must be a positive number or 2 of them"):
        hide_blocks(grid, (1.0, 0.0), 0.5)
    with pytest.raises(ValueError, match=r"level must be a probability, and 0 for a single image, got 0\.5 for 1"):
        hide_pyramid([grid], 2.0, 0.5, level=0.5)
    with pytest.raises(ValueError, match=r"block must be smaller than the field of view \[8\.0, 8\.0\], got \[8, 9\]"):
        check_block([8, 9], [8.0, 8.0])
    check_block([9, 7], [8.0, 8.0])
