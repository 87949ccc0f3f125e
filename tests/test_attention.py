import pytest
import torch

import references
from rat_timm.geometry.grid import Grid, Positions, field_center
from rat_timm.layers import Attention, Block, RotarySpatialEmbedding


def make(kernel_size, axes, dim=12, heads=3, **kwargs):
    return Attention(dim, heads, RotarySpatialEmbedding(dim, heads, axes), kernel_size, **kwargs).double()


def where(grid):
    return grid.positions(field_center([grid]), (1.0,) * len(grid.shape))


def reference(layer, x, positions, mask):
    """Projections, rotation by the formula, attention by the definition; x [B, *grid, C]."""
    query, key, value = (t.unflatten(-1, (layer.num_heads, -1)) for t in layer.qkv(x).chunk(3, dim=-1))

    offset = torch.stack(positions.dense().offset, dim=-1)[0]

    def turned(t):
        rows = [
            torch.stack([references.rotate(s[p], offset[p], layer.rose.freqs) for s in t])
            for p in references.places(t.shape[1:-2])
        ]
        return torch.stack(rows, dim=1).unflatten(1, t.shape[1:-2])

    kernel = layer.attn_kernel_size or x.shape[1:-1]
    out = references.neighborhood_attention(turned(query), turned(key), value, kernel, mask)
    return layer.proj(out.flatten(-2))


@pytest.mark.parametrize(
    ("shape", "kernel"), [((6, 5), (3, 3)), ((6, 5), None), ((3, 4, 5), (3, 3, 3)), ((3, 4, 2), None)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_follows_the_definition(shape, kernel, masked):
    layer, positions = make(kernel, len(shape)), where(Grid.create(shape, 0.8))
    x = torch.randn(2, *shape, 12, dtype=torch.float64)
    mask = torch.rand(2, *shape) > 0.4 if masked else None
    if kernel is None:  # all tokens in a line
        flat = Positions(*([t.flatten(1) for t in parts] for parts in positions.dense()))
        out = layer(x.flatten(1, -2), flat, None if mask is None else mask.flatten(1)).view_as(x)
    else:
        out = layer(x, positions, mask)
    torch.testing.assert_close(out, reference(layer, x, positions, mask), rtol=0, atol=1e-6)


def test_a_block_adds_attention_then_mlp():
    block = Block(make((3, 3), 2), 12, mlp_ratio=2.0).double()
    x, positions = torch.randn(1, 5, 5, 12, dtype=torch.float64), where(Grid.create((5, 5)))
    middle = x + block.attn(block.norm1(x), positions)
    torch.testing.assert_close(block(x, positions), middle + block.mlp(block.norm2(middle)))


def test_dropout_and_stochastic_depth_only_in_training():
    attn = make((3, 3), 2, attn_drop=0.5, proj_drop=0.5)
    block = Block(attn, 12, proj_drop=0.5, drop_path=0.5).double()
    x, positions = torch.randn(2, 5, 5, 12, dtype=torch.float64), where(Grid.create((5, 5)))
    assert not torch.equal(block(x, positions), block(x, positions))
    block.eval()
    assert torch.equal(block(x, positions), block(x, positions))
