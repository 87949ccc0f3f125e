import pytest
import torch

from rat_timm.geometry.grid import Grid, Positions, field_center
from rat_timm.layers import Attention, RotarySpatialEmbedding
from rat_timm.ops.relative import pair_bias, pair_entries

CPU = torch.device("cpu")


@pytest.mark.parametrize(("grids", "kernel"), [([(3, 4), (2, 2)], (3, 5)), ([(2, 3, 4)], (3, 3, 5)), ([(5,)], (2,))])
def test_pairs_of_one_grid_have_the_bias_of_their_relative_position(grids, kernel):
    table = torch.randn(2, *(2 * k - 1 for k in kernel))
    bias = pair_bias(table, pair_entries(grids, 2, kernel, CPU))[0]
    tokens = [None, None]
    for level, grid in enumerate(grids):
        tokens += [(level, place) for place in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))]
    assert bias.shape == (2, len(tokens), len(tokens))
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            expected = torch.zeros(2)
            if query and key and query[0] == key[0]:
                steps = (key[1] - query[1]).tolist()
                entry = [max(1 - k, min(k - 1, step)) + k - 1 for step, k in zip(steps, kernel, strict=True)]
                expected = table[(slice(None), *entry)]
            assert torch.equal(bias[:, i, j], expected)


def test_a_window_over_the_grid_is_all_to_all():
    layer = Attention(
        12, 3, RotarySpatialEmbedding(12, 3, 2), (5, 7), bias_kernel_size=(5, 7), pad_windows=True
    ).double()
    grid = Grid.create((5, 7), 0.8)
    positions = grid.positions(field_center([grid]), (1.0, 1.0))
    x, mask = torch.randn(2, 5, 7, 12, dtype=torch.float64), torch.rand(2, 5, 7) > 0.3
    line = Positions(*([t.flatten(1) for t in parts] for parts in positions.dense()))
    entries = pair_entries([(5, 7)], 0, (5, 7), CPU)
    for valid in (None, mask):
        flat = None if valid is None else valid.flatten(1)
        out = layer(x.flatten(1, 2), line, flat, all_to_all=True, entries=entries)
        torch.testing.assert_close(out.view_as(x), layer(x, positions, valid), rtol=0, atol=1e-10)
