import torch

from rat_timm import Grid, RatConfig
from rat_timm.geometry.grid import Pyramid, Tokens
from rat_timm.models.rat.model import stage_inputs


def images(*sizes, mask=None, **geometry):
    levels = [Tokens(torch.zeros(1, *size, 3), Grid.create(size, **geometry), mask) for size in sizes]
    return Pyramid(levels, is_constant=True)


def test_grids_of_the_stages():
    inputs = stage_inputs(RatConfig(), images((17, 33)))
    assert [at.places.grids[0].shape for at in inputs] == [(5, 9), (3, 5), (2, 3), (1, 2)]
    assert [at.places.grids[0].spacing.tolist() for at in inputs] == [[[n, n]] for n in (4.0, 8.0, 16.0, 32.0)]
    # a kernel of 3 stays centred on the first pixel of its cell
    assert all(at.places.grids[0].origin.tolist() == [[0.5, 0.5]] for at in inputs)
    assert [at.places.stride for at in inputs] == [None, (2, 2), (2, 2), (2, 2)]


def test_positions_of_a_global_stage_are_those_of_one_sequence():
    inputs = stage_inputs(RatConfig(reg_tokens=2), images((64, 64), (32, 32)))
    (positions,) = inputs[-1].places.tokens
    assert [o.shape for o in positions.offset] == [(1, 2 + 4 + 1)] * 2
    assert all(not o[:, :2].any() for o in positions.offset)  # prefix tokens stand at the centre
    assert len(inputs[0].places.tokens) == 2


def test_a_cell_is_valid_if_any_pixel_is():
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[:, 33, 2] = True
    inputs = stage_inputs(RatConfig(), images((40, 40), mask=mask))
    for at, cell in zip(inputs, (4, 8, 16, 32), strict=True):
        assert at.masks[0].nonzero().tolist() == [[0, 33 // cell, 2 // cell]]
    assert inputs[1].fine_masks[0] is inputs[0].masks[0]


def test_what_numbers_say_is_worked_out_once():
    cfg, grid = RatConfig(), {"spacing": 0.5, "origin": (3.0, 4.0)}
    first, again = (stage_inputs(cfg, images((48, 32), **grid)) for _ in range(2))
    assert first[2].places is again[2].places
    other = stage_inputs(cfg, images((48, 32), spacing=0.5, origin=(3.0, 5.0)))
    assert other[2].places is not first[2].places
    tensor = stage_inputs(cfg, images((48, 32), spacing=torch.tensor(0.5), origin=(3.0, 4.0)))
    assert tensor[2].places is not first[2].places
    for a, b in zip(first, tensor, strict=True):
        for mine, theirs in zip(a.places.tokens[0].offset, b.places.tokens[0].offset, strict=True):
            assert torch.equal(mine, theirs)


def test_what_is_kept_under_inference_mode_serves_training():
    cfg = RatConfig(embed_dim=96)
    with torch.inference_mode():
        kept = stage_inputs(cfg, images((36, 36), spacing=0.25))
    assert not any(o.is_inference() for at in kept for p in at.places.tokens for o in p.offset)
