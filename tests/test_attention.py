import importlib

import hypothesis.strategies as st
import pytest
import timm
import torch
from hypothesis import given
from torch import nn

import references
from helpers import lively
from rat_timm.geometry.grid import Grid, Positions, field_center
from rat_timm.layers import Attention, Block, RotarySpatialEmbedding

attention = importlib.import_module("rat_timm.layers.attention")


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


@pytest.fixture
def small(monkeypatch):
    """Slabs of a few tokens; returns how many there were in each cut."""
    counts, cut = [], attention.slabs

    def counted(*args):
        parts = cut(*args)
        counts.append(len(parts))
        return parts

    monkeypatch.setattr(attention, "_NUMBERS_CPU", 400)
    monkeypatch.setattr("rat_timm.layers.attention.slabs", counted)
    return counts


@given(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 40), st.integers(1, 2000))
def test_slabs_cover_every_token_once_within_the_limit(batch, grid, width, limit):
    x = torch.zeros(batch, *grid, 2)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "_NUMBERS_CPU", limit)
        parts = attention.slabs(x, width, nn.Identity().eval())
        for part in parts:
            part.of(x).add_(1)
            sizes = part.of(x).shape
            assert sizes[:-1].numel() * width <= limit * torch.get_num_threads() or sizes[:2].numel() == 1
    assert bool((x == 1).all())


def test_positions_are_those_of_the_tokens():
    grid = Grid.create((5, 4), torch.tensor([[1.0, 2.0], [3.0, 0.5]]), batch_size=2)
    positions = grid.positions(field_center([grid]), (1.0, 1.0))
    whole = torch.stack(positions.dense().offset, dim=-1)
    part = attention.Slab(slice(1, 2), slice(2, 4))
    torch.testing.assert_close(
        torch.stack(part.positions(positions).dense().offset, dim=-1), whole[1:2, 2:4], rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d", "rat_nat_mini"])
@pytest.mark.parametrize("masked", [False, True])
def test_maps_are_those_of_the_whole(name, masked, small, monkeypatch):
    axes = 3 if name.endswith("3d") else 2
    torch.manual_seed(0)
    options = {"depths": (1, 1, 1, 1)} if "nat" in name else {}
    model = (
        lively(timm.create_model(name, features_only=True, in_chans=1, physical_stem=False, **options)).eval().double()
    )
    x = torch.randn(2, 1, *[24, 40, 36][:axes], dtype=torch.float64)
    told = {"spacing": torch.rand(2, axes, dtype=torch.float64) + 0.5}
    if masked:
        told["mask"] = torch.rand(2, *x.shape[2:]) < 0.8
    with torch.inference_mode():
        in_slabs = model(x, **told)
        assert max(small) > 2
        monkeypatch.setattr(attention, "_NUMBERS_CPU", 1 << 40)
        small.clear()
        whole = model(x, **told)
    assert set(small) == {1}
    torch.testing.assert_close(in_slabs, whole, rtol=0, atol=1e-11)


def test_levels_that_meet_are_those_of_the_whole(small, monkeypatch):
    torch.manual_seed(0)
    model = lively(timm.create_model("test_rat", features_only=True, reg_tokens=2)).eval().double()
    pyramid = [torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.randn(2, 3, 32, 40, dtype=torch.float64)]
    with torch.inference_mode():
        in_slabs = model(pyramid, spacing=[(1.0, 1.0), (4.0, 4.0)])
        assert max(small) > 2
        monkeypatch.setattr(attention, "_NUMBERS_CPU", 1 << 40)
        whole = model(pyramid, spacing=[(1.0, 1.0), (4.0, 4.0)])
    torch.testing.assert_close(in_slabs, whole, rtol=0, atol=1e-11)


def test_autocast_has_its_dtypes(small, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_rat", features_only=True).eval()
    x = torch.randn(2, 3, 48, 48)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        in_slabs = model(x)
        assert max(small) > 2
        monkeypatch.setattr(attention, "_NUMBERS_CPU", 1 << 40)
        whole = model(x)
    torch.testing.assert_close(in_slabs, whole, rtol=0, atol=0.05)  # dtypes are compared too
    layer = Block(Attention(8, 2, RotarySpatialEmbedding(8, 2, 2), (3, 3)), 8).eval()
    x, positions = torch.randn(2, 9, 9, 8), Grid.create((9, 9)).positions(torch.zeros(1, 2), (1.0, 1.0))
    monkeypatch.setattr(attention, "_NUMBERS_CPU", 100)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x, positions).dtype == torch.float32


def test_what_needs_all_tokens_at_once_stays_whole(monkeypatch):
    monkeypatch.setattr(attention, "_NUMBERS_CPU", 1)
    x, layer = torch.zeros(2, 8, 8, 4), nn.Sequential(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        assert len(attention.slabs(x, 4, layer)) == 16
        assert len(attention.slabs(x, 4, layer.train())) == 1  # paths are dropped by sample
        hook = layer.eval()[0].register_forward_hook(lambda module, inputs, output: None)
        assert len(attention.slabs(x, 4, layer)) == 1
        hook.remove()
        assert len(attention.slabs(x, 4, layer)) == 16
        assert torch.jit.trace(lambda x: x * len(attention.slabs(x, 4, layer)), x)(x + 1).eq(1).all()
    assert len(attention.slabs(x, 4, layer)) == 1  # there may be gradients
