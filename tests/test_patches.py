import itertools

import pytest
import torch
from timm.layers.patch_embed import resample_patch_embed
from torch.nn import functional as F

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.models.rope_vit.patches import patchify, physical_patchify, resample_kernel


def kernel(*patch, channels=2, dim=5):
    return torch.randn(dim, channels, *patch), torch.randn(dim)


def image(*size, batch=2, channels=2, spacing=1.0, origin=None, mask=None):
    return Tokens(torch.randn(batch, *size, channels), Grid.create(size, spacing, origin), mask)


def enlarge(tokens, patch, factors):
    """Enlarges an image patch by patch, by the interpolation that the kernel's resampling inverts."""
    old, new = (tuple(patch), tuple(round(p * f) for p, f in zip(patch, factors, strict=True)))
    grid = [n // p for n, p in zip(tokens.grid.shape, patch, strict=True)]
    out = torch.empty(len(tokens.x), *(n * p for n, p in zip(grid, new, strict=True)), tokens.x.shape[-1])
    for place in itertools.product(*(range(n) for n in grid)):
        here, there = (
            (slice(None), *(slice(i * p, (i + 1) * p) for i, p in zip(place, size, strict=True))) for size in (old, new)
        )
        cut = tokens.x[here].movedim(-1, 1)  # [B, C, *patch]
        plane = cut.flatten(0, -3).unsqueeze(1)  # [.., 1, y, x]
        plane = F.interpolate(plane, size=new[-2:], mode="bicubic", antialias=True)
        cut = plane.reshape(*cut.shape[:-2], *new[-2:])
        if len(patch) == 3:
            column = F.interpolate(cut.flatten(-2), size=(new[0], new[1] * new[2]), mode="bicubic", antialias=True)
            cut = column.unflatten(-1, new[1:])
        out[there] = cut.movedim(1, -1)
    return out


@pytest.mark.parametrize(("size", "patch"), [((8, 12), (4, 4)), ((9, 13), (4, 4)), ((5, 9, 8), (2, 4, 4))])
def test_patches_are_products_with_the_kernel(size, patch):
    weight, bias = kernel(*patch)
    tokens = image(*size, spacing=tuple(0.5 + i for i in range(len(size))))
    out = patchify(tokens, weight, bias)
    grid = tuple(-(-n // p) for n, p in zip(size, patch, strict=True))
    assert out.x.shape[1:-1] == out.grid.shape == grid
    padded = torch.zeros(2, *(n * p for n, p in zip(grid, patch, strict=True)), 2)
    padded[(slice(None), *(slice(n) for n in size))] = tokens.x
    for place in [(0,) * len(size), tuple(n - 1 for n in grid)]:
        cut = padded[(slice(None), *(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True)))]
        expected = torch.einsum("b...c,oc...->bo", cut.double(), weight.double()) + bias
        torch.testing.assert_close(out.x[(slice(None), *place)].double(), expected, rtol=0, atol=1e-4)
    corners = tokens.grid.corners()[0], out.grid.corners()[0]
    torch.testing.assert_close(*corners)


def test_a_patch_is_valid_if_any_of_its_pixels_is():
    mask = torch.zeros(1, 9, 8, dtype=torch.bool)
    mask[0, 8, 5] = True
    tokens = image(9, 8, batch=1, mask=mask)
    tokens.x[~mask] = float("nan")
    out = patchify(tokens, *kernel(4, 4))
    assert out.mask.nonzero().tolist() == [[0, 2, 1]]
    assert torch.isfinite(out.x).all()


@pytest.mark.parametrize("size", [(24, 24), (16, 16), (40, 16), (7, 30)])
def test_resampled_kernels_are_timms(size):
    weight, _ = kernel(16, 16)
    torch.testing.assert_close(
        resample_kernel(weight, size), resample_patch_embed(weight, list(size)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("patch", "factors"), [((4, 4), (1.5, 1.5)), ((4, 4), (2, 1)), ((4, 4), (3, 3)), ((2, 4, 4), (2, 1.5, 1))]
)
def test_an_enlarged_image_has_the_same_patches(patch, factors):
    weight, bias = kernel(*patch)
    reference = (2.0, 0.5, 0.25)[-len(patch) :]
    tokens = image(*(3 * p for p in patch), spacing=reference)
    expected = physical_patchify(tokens, weight, bias, reference)
    torch.testing.assert_close(expected.x, patchify(tokens, weight, bias).x)
    x = enlarge(tokens, patch, factors)
    spacing = tuple(r / f for r, f in zip(reference, factors, strict=True))
    found = physical_patchify(Tokens(x, Grid.create(x.shape[1:-1], spacing)), weight, bias, reference)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.grid.coordinates(), expected.grid.coordinates())


@pytest.mark.parametrize(("spacing", "size"), [(0.83, (50, 61)), ((1.3, 0.9), (40, 40)), (3.7, (21, 33))])
def test_any_spacing_gives_patches_of_the_reference_size(spacing, size):
    weight, bias = kernel(8, 8)
    tokens = image(*size, spacing=spacing, origin=(3.0, -7.0), mask=torch.ones(2, *size, dtype=torch.bool))
    out = physical_patchify(tokens, weight, bias, (1.0, 1.0))
    torch.testing.assert_close(out.grid.spacing, torch.full((1, 2), 8.0).double())
    torch.testing.assert_close(out.grid.corners()[0], tokens.grid.corners()[0])
    extent = tokens.grid.spacing[0] * torch.tensor(size)
    assert out.grid.shape == tuple(int(-(-(n - 0.5) // 8)) for n in extent) == out.x.shape[1:-1] == out.mask.shape[1:]
    assert out.mask.all()


def test_a_smooth_scene_gives_nearly_the_same_patches_at_any_spacing():
    weight, _ = kernel(8, 8, channels=1)
    weight = F.avg_pool2d(weight, 5, 1, 2)

    def scene(spacing):
        n = round(64 / spacing)
        grid = Grid.create((n, n), 64 / n)
        place = grid.coordinates()[0].float()
        return Tokens((place[..., :1] / 9).sin()[None] + (place[..., 1:] / 7).cos()[None], grid)

    expected = physical_patchify(scene(1.0), weight, None, (1.0, 1.0)).x
    for spacing in (0.37, 0.7, 1.21):
        found = physical_patchify(scene(spacing), weight, None, (1.0, 1.0)).x
        assert found.shape == expected.shape
        assert ((found - expected)[:, 1:-1, 1:-1].norm() / expected[:, 1:-1, 1:-1].norm()) < 0.05


def test_interpolated_patches_are_where_their_values_are():
    """The mean over a patch of a ramp is the ramp at the patch's middle, however near 1 the ratio is."""
    weight = torch.full((1, 1, 1, 16, 16), 1 / 256)
    ramp = ((torch.arange(4.0) + 0.5) * 1.15).reshape(1, 4, 1, 1, 1).expand(1, 4, 16, 16, 1)
    tokens = Tokens(ramp, Grid.create((4, 16, 16), (1.15, 1.0, 1.0)))
    out = physical_patchify(tokens, weight, None, (1.0, 1.0, 1.0))
    depth, values = out.grid.coordinates()[0, :, 0, 0, 0].float(), out.x[0, :, 0, 0, 0]
    torch.testing.assert_close(values[1:-1], depth[1:-1])
    assert ((values - depth)[[0, -1]].abs() < 0.5).all()  # beyond the first and the last centre the edge is repeated
    flat = Tokens(torch.ones(1, 80, 80, 1), Grid.create((80, 80), 0.83))
    inner = physical_patchify(flat, weight[:, :, 0], None, (1.0, 1.0)).x[0, :4, :4]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_interpolation_leaks_nothing_masked():
    weight, bias = kernel(8, 8)
    mask = torch.rand(2, 40, 50) > 0.5
    mask[:, :20] = False
    tokens = image(40, 50, spacing=0.83, mask=mask)
    clean = physical_patchify(tokens, weight, bias, (1.0, 1.0))
    tokens.x[~mask] = float("nan")
    dirty = physical_patchify(tokens, weight, bias, (1.0, 1.0))
    assert torch.equal(clean.x, dirty.x)
    assert not clean.mask[:, 0].any()
    assert clean.mask[:, -1].all()


def test_samples_of_different_spacing_have_no_common_grid_of_patches():
    weight, bias = kernel(8, 8)
    tokens = image(16, 16)._replace(grid=Grid.create((16, 16), torch.tensor([[1.0, 1.0], [2.0, 2.0]]), batch_size=2))
    with pytest.raises(ValueError, match="spacing must be the same for all samples"):
        physical_patchify(tokens, weight, bias, (1.0, 1.0))
