import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_timm.layers import tiling

lengths = st.lists(st.tuples(st.integers(1, 15), st.integers(1, 6)), min_size=1, max_size=3)


@given(lengths)
def test_untile_undoes_gather_of_query_tiles(axes):
    shape = [length for length, _ in axes]
    index = [tiling.query_tiles(length, size, torch.device("cpu")) for length, size in axes]
    x = torch.randn(2, *shape, 3, 4)
    assert torch.equal(tiling.untile(tiling.gather(x, index), index, shape), x)


@given(lengths)
def test_scatter_add_is_gather_transposed(axes):
    shape = [length for length, _ in axes]
    index = [
        tiling.key_tiles(tiling.query_tiles(length, size, torch.device("cpu"))[:, 0] - 1, size + 2, length)
        for length, size in axes
    ]
    x = torch.randn(2, *shape, 3, 4, dtype=torch.float64)
    tiles = torch.randn_like(tiling.gather(x, index))
    product = (tiling.gather(x, index) * tiles).sum()
    torch.testing.assert_close((x * tiling.scatter_add(tiles, index, shape)).sum(), product)


@given(lengths)
def test_scatter_max_takes_the_largest(axes):
    shape = [length for length, _ in axes]
    index = [
        tiling.key_tiles(tiling.query_tiles(length, size, torch.device("cpu"))[:, 0] - 1, size + 2, length)
        for length, size in axes
    ]
    x = torch.randn(2, *shape, 3, 4)
    tiles = tiling.gather(x, index)
    lower = tiles - torch.rand(len(tiles), 1, 1, 1, 1)  # another amount in each tile
    lowest = torch.stack([tiling.scatter_max(lower, index, shape), x]).amin(0)
    assert torch.equal(tiling.scatter_max(tiles, index, shape), x)
    assert torch.equal(tiling.scatter_max(lower, index, shape), lowest)
    assert (tiling.gather(lowest, index) >= lower).all()


@given(st.integers(1, 40), st.integers(1, 9))
def test_every_query_is_first_once(length, size):
    queries = tiling.query_tiles(length, size, torch.device("cpu"))
    assert sorted(queries[tiling.first_queries([queries])].tolist()) == list(range(length))


def test_gather_takes_the_named_places():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    index = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, 3]])
    assert tiling.gather(x, [index])[:, 0, 0, :, 0].tolist() == index.tolist()
    assert tiling.gather_mask(x[..., 0, 0] > 2, [index])[:, 0].tolist() == (index > 2).tolist()
