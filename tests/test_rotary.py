import math

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat

from rat_timm.geometry.grid import Grid
from rat_timm.models.rope_vit.rotary import Frame, coordinates, extend_along_z, frequencies, rotary_embedding

FAMILIES = {
    "dinov3": "vit_small_patch16_dinov3",
    "mixed": "vit_small_patch16_rope_mixed_224",
    "axial": "vit_small_patch16_rope_224",
    "stretched": "vit_medium_patch16_rope_reg1_gap_256",
    "shifted": "vit_pe_core_tiny_patch16_384",
}
families = pytest.mark.parametrize("family", FAMILIES)


def rope_of(family):
    return timm.create_model(FAMILIES[family], dynamic_img_size=True).rope.eval()


def places_of(grid):
    return grid.coordinates().flatten(1, -2)


def frame_of(grid):
    """Coordinates laid over the grid itself, as timm lays them."""
    extent = grid.spacing[:, -2:] * torch.tensor(grid.shape[-2:])
    lower, upper = grid.corners()
    return Frame((lower + upper) / 2, extent, grid.shape[-2:], grid.spacing[:, :1] if len(grid.shape) == 3 else None)


@families
@pytest.mark.parametrize("shape", [(14, 14), (9, 23)])
def test_it_is_timms_on_a_grid_of_patches(family, shape):
    rope, grid = rope_of(family), Grid.create(shape, (0.3, 7.0), (100.0, -5.0))
    found = rotary_embedding(rope, frame_of(grid), places_of(grid))
    expected = rope.get_embed(list(shape))
    assert found.shape[-3:] == (rope.num_heads if family == "mixed" else 1, shape[0] * shape[1], expected.shape[-1])
    torch.testing.assert_close(found.squeeze(1) if family == "mixed" else found[0, 0], expected, rtol=0, atol=2e-5)


@families
@pytest.mark.parametrize("axes", [2, 3])
def test_rotation_by_the_formula(family, axes):
    """Channels of one token, turned plane by plane in float64."""
    rope = rope_of(family)
    grid = Grid.create((3, 4, 5)[-axes:], (0.7, 1.3, 2.0)[-axes:])
    frame = frame_of(grid)
    vectors = frequencies(rope, axes).detach().double()
    vectors = vectors[1, 2] if vectors.ndim == 4 else vectors
    embedding = rotary_embedding(rope, frame, places_of(grid))
    embedding = embedding[1, 0, 2] if embedding.ndim == 5 else embedding[0, 0]  # of one block and head
    embedding = embedding.detach()
    half, token = getattr(rope, "rotate_half", False), 7
    place = coordinates(rope, frame, places_of(grid))[0, token].double()
    x = torch.randn(embedding.shape[-1] // 2, dtype=torch.float64)
    found = apply_rot_embed_cat(x, embedding[token].double(), half=half)
    planes = len(x) // 2
    for p in range(planes):
        a, b = (p, p + planes) if half else (2 * p, 2 * p + 1)
        theta = (place * vectors[p]).sum().item()
        assert found[a] == pytest.approx((x[a] * math.cos(theta) - x[b] * math.sin(theta)).item(), abs=1e-4)
        assert found[b] == pytest.approx((x[a] * math.sin(theta) + x[b] * math.cos(theta)).item(), abs=1e-4)


@families
def test_coordinates_grow_with_physical_distance(family):
    rope = rope_of(family)
    coarse, fine = Grid.create((4, 6), (2.0, 3.0)), Grid.create((8, 6), (1.0, 3.0))
    frame = frame_of(coarse)
    wide, narrow = (coordinates(rope, frame, places_of(g)).unflatten(1, g.shape) for g in (coarse, fine))
    torch.testing.assert_close((narrow[:, 0::2] + narrow[:, 1::2]) / 2, wide)
    steps = coordinates(rope, frame, places_of(Grid.create((2, 6), (2.0, 1.5)))).unflatten(1, (2, 6))
    torch.testing.assert_close(2 * (steps[0, 0, 1] - steps[0, 0, 0])[1], (wide[0, 0, 1] - wide[0, 0, 0])[1])


@families
def test_a_step_along_z_is_as_long_as_one_in_the_plane_and_like_none_of_them(family):
    rope = rope_of(family)
    grid = Grid.create((5, 6, 6), (4.0, 1.0, 1.0))
    found = coordinates(rope, frame_of(grid), places_of(grid)).unflatten(1, grid.shape)[0]
    torch.testing.assert_close(found[1, 0, 0, 0] - found[0, 0, 0, 0], found[0, 1, 0, 1] - found[0, 0, 0, 1])
    assert found[2, ..., 0].abs().max() == 0
    vectors = frequencies(rope, 3)
    torch.testing.assert_close(vectors[..., 1:], frequencies(rope, 2))
    vectors = vectors.flatten(0, -3)[-1] if vectors.ndim == 4 else vectors
    solution = torch.linalg.lstsq(vectors[:, 1:], vectors[:, :1]).solution  # the step in the plane that is most alike
    assert (vectors[:, 1:] @ solution - vectors[:, :1]).norm() > 0.5 * vectors[:, 0].norm()


def test_learned_frequencies_get_a_third_axis():
    rope = rope_of("mixed")
    deep = extend_along_z(rope.freqs)
    assert deep.shape == (3, *rope.freqs.shape[1:])
    assert torch.equal(deep[:2], rope.freqs)
    expected = frequencies(rope, 3)
    rope.freqs = torch.nn.Parameter(deep.detach())
    torch.testing.assert_close(frequencies(rope, 3), expected)


def test_augmentation_of_coordinates_stays_in_training():
    rope = timm.create_model(FAMILIES["dinov3"], rope_rescale_coords=2.0, rope_shift_coords=0.5).rope
    grid = Grid.create((4, 4))
    plain = coordinates(rope.eval(), frame_of(grid), places_of(grid))
    assert torch.equal(coordinates(rope, frame_of(grid), places_of(grid)), plain)
    assert not torch.allclose(coordinates(rope.train(), frame_of(grid), places_of(grid)), plain)
