import pytest
import torch

import references
from rat_timm.geometry.grid import Grid, field_center
from rat_timm.layers import RotarySpatialEmbedding


def positions(grid, unit=1.0):
    return grid.positions(field_center([grid]), (unit,) * len(grid.shape))


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 4)])
@pytest.mark.parametrize("rotary_ratio", [1.0, 0.5, 0.0])
def test_follows_the_formula(shape, rotary_ratio):
    rose = RotarySpatialEmbedding(24, 4, len(shape), rotary_ratio=rotary_ratio)
    where = positions(Grid.create(shape, 0.7))
    x = torch.randn(2, *shape, 4, 6, dtype=torch.float64)
    offset = torch.stack(where.dense().offset, dim=-1)[0]
    freqs = getattr(rose, "freqs", torch.zeros(0, 0, len(shape)))
    expected = torch.stack(
        [
            torch.stack([references.rotate(x[(b, *p)], offset[p], freqs) for p in references.places(shape)])
            for b in range(2)
        ]
    ).unflatten(1, shape)
    torch.testing.assert_close(rose(x, where), expected, rtol=0, atol=2e-6)  # phases are float32


@pytest.mark.parametrize("axes", [2, 3])
def test_products_depend_on_displacement_only(axes):
    rose = RotarySpatialEmbedding(16, 2, axes)
    q, k = torch.randn(2, 2, 8).double(), torch.randn(2, 2, 8).double()
    grid = Grid.create((4,) * axes, 1.3)
    moved = grid._replace(origin=grid.origin + 1e6)
    a, b = ((rose(x.view(2, *[1] * axes, 2, 8), positions(g)) for x in (q, k)) for g in (grid, moved))
    for first, second in zip(a, b, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    rotated_q, rotated_k = (rose(x.view(2, *[1] * axes, 2, 8), positions(grid)) for x in (q, k))
    first, second = (slice(None), *[0] * axes), (slice(None), *[1] * axes)
    third = (slice(None), *[2] * axes)
    near = (rotated_q[first] * rotated_k[second]).sum(-1)
    torch.testing.assert_close((rotated_q[second] * rotated_k[third]).sum(-1), near, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_directions_are_spread_over_the_sphere(axes):
    freqs = RotarySpatialEmbedding(256, 8, axes, learnable=False, frequency_scaling="none").freqs
    magnitude = freqs.norm(dim=-1)
    torch.testing.assert_close(magnitude[:, 0], torch.ones(8))
    torch.testing.assert_close(magnitude[:, -1], torch.full((8,), 1e4 ** (-15 / 16)))
    direction = (freqs / magnitude[..., None]).flatten(0, 1)
    moment = direction.T @ direction / len(direction)
    torch.testing.assert_close(moment, torch.eye(axes) / axes, rtol=0, atol=0.03)
    if axes > 1:
        assert direction.mean(0).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype):
    rose = RotarySpatialEmbedding(16, 2, 2)
    x, where = torch.randn(1, 5, 5, 2, 8), positions(Grid.create((5, 5)))
    out = rose(x.to(dtype), where)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), rose(x, where), rtol=0, atol=3e-2)


def test_any_layout():
    rose, where = RotarySpatialEmbedding(16, 2, 2), positions(Grid.create((5, 5)))
    x = torch.randn(1, 5, 5, 2, 8)
    expected = rose(x, where)
    shifted = torch.cat((torch.zeros(1), x.flatten()))[1:].view_as(x)  # starts between two complex numbers
    assert torch.equal(rose(shifted, where), expected)
    assert torch.equal(rose(x.mT.contiguous().mT, where), expected)
    mixed = rose.rotation(where, torch.bfloat16)(x)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=3e-2)


def test_phases_stay_float32_under_autocast():
    rose, where = RotarySpatialEmbedding(16, 2, 2), positions(Grid.create((64, 64)))
    expected = rose.rotation(where, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rotation = rose.rotation(where, torch.float32)
    assert torch.equal(rotation.table, expected.table)


def test_one_place_has_one_phase_on_every_grid():
    rose = RotarySpatialEmbedding(16, 2, 2)
    fine, coarse = Grid.create((9, 9), 1.0, 0.0), Grid.create((5, 5), 2.0, 0.0)
    center = field_center([fine, coarse])
    x = torch.randn(1, 1, 1, 2, 8)
    on_fine = rose(x.expand(1, 9, 9, 2, 8), fine.positions(center, (1.0, 1.0)))
    on_coarse = rose(x.expand(1, 5, 5, 2, 8), coarse.positions(center, (1.0, 1.0)))
    torch.testing.assert_close(on_fine[:, ::2, ::2], on_coarse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["log", "rope", "identity"])
def test_scaling_modes_follow_their_formula(mode):
    rose = RotarySpatialEmbedding(16, 2, 2, learnable_scale=True, initial_scaling=mode)
    spacing = 3.0
    a, b, c, d = (getattr(rose, f"scale_{n}")[0].item() for n in "abcd")
    scaled = a * spacing**b + c * torch.log(torch.tensor(spacing / d)).item()
    x = torch.randn(1, 4, 4, 2, 8)
    plain = RotarySpatialEmbedding(16, 2, 2)
    plain.load_state_dict({"freqs": rose.freqs})
    expected = plain(x, positions(Grid.create((4, 4), scaled))) if scaled > 0 else x
    torch.testing.assert_close(rose(x, positions(Grid.create((4, 4), spacing))), expected, rtol=0, atol=1e-5)


def test_buffers_are_computed_again_after_the_meta_device():
    kwargs = {"learnable": False, "initial_scaling": "identity"}
    expected = RotarySpatialEmbedding(16, 2, 3, **kwargs)
    with torch.device("meta"):
        rose = RotarySpatialEmbedding(16, 2, 3, **kwargs)
    rose.to_empty(device="cpu").init_non_persistent_buffers()
    assert not rose.state_dict()
    for (name, ours), (_, other) in zip(rose.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(ours, other), name


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 does not divide feature_dims 16"),
        ({"num_heads": 16}, "must be even"),
        ({"rotary_ratio": 1.5}, "rotary_ratio must be in"),
        ({"frequency_scaling": "cubic"}, "frequency_scaling"),
        ({"initial_scaling": "cubic"}, "initial_scaling must be one of"),
    ],
)
def test_bad_constructions_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RotarySpatialEmbedding(**({"feature_dims": 16, "num_heads": 2} | kwargs))
