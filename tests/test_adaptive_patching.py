"""Adaptive patches: against `affine_grid` and `grid_sample` patch by patch, and what holds for any prediction."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.layers import AdaptivePatching, interpolate_pos_embed

SIZES = {2: (40, 56), 3: (16, 24, 20)}
PATCH = {2: (8, 6), 3: (4, 6, 5)}
SPACING = (2.0, 0.5, 0.8)
KINDS = [
    {},
    {"scaling": "isotropic"},
    {"scaling": "anisotropic", "max_scale": 3.0},
    {"rotate": True},
    {"scaling": "anisotropic", "rotate": True},
]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "moved")
axes_of = pytest.mark.parametrize("axes", [2, 3])


def image(axes, batch=2, channels=3, mask=None, dtype=torch.float64, size=None):
    size = SIZES[axes] if size is None else size
    return Tokens(
        torch.randn(batch, *size, channels, dtype=dtype), Grid.create(size, SPACING[:axes], (5.0,) * axes), mask
    )


def layer(axes, std=1.0, **kwargs):
    """One whose predictions are large and depend on the image."""
    made = AdaptivePatching(
        3, kwargs.pop("patch_size", PATCH[axes]), spatial_dims=axes, view=16, hidden_dim=16, **kwargs
    )
    torch.nn.init.normal_(made.predictor.out.weight, std=std)
    torch.nn.init.normal_(made.predictor.out.bias, std=std)
    return made.double()


def patch_by_patch(tokens, transform, size):
    x = tokens.x.movedim(-1, 1)
    cut = []
    for index in range(transform.shape[1]):
        grid = F.affine_grid(transform[:, index], [*x.shape[:2], *size], align_corners=False)
        cut.append(F.grid_sample(x, grid, padding_mode="border", align_corners=False))
    return torch.stack(cut, dim=1)


@kinds
@axes_of
def test_patches_are_those_of_affine_grid_and_grid_sample(axes, kind):
    patching, tokens = layer(axes, num_patches=7, **kind), image(axes)
    x = tokens.x.requires_grad_()
    found = patching(tokens)
    expected = patch_by_patch(tokens, found.transform, PATCH[axes])
    assert found.x.shape == (2, 7, 3, *PATCH[axes])
    torch.testing.assert_close(found.x, expected, rtol=0, atol=1e-6)
    weight = torch.randn_like(expected)
    inputs = [x, *patching.parameters()]
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (found.x, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(g.abs().max() > 0 for g in ours)


@kinds
@axes_of
def test_centres_are_where_transforms_put_them(axes, kind):
    found, tokens = layer(axes, num_patches=5, **kind)(image(axes)), image(axes)
    torch.testing.assert_close(found.transform[..., -1].flip(-1), found.center)
    lower, upper = tokens.grid.corners()
    torch.testing.assert_close(found.position, lower + (found.center + 1) / 2 * (upper - lower))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.sampled_from([2, 3]),
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 30),
    bias=st.lists(st.sampled_from([-math.inf, -1e30, -3.0, -0.5, 0.0, 1e-9, 0.7, 5.0, 1e30, math.inf]), min_size=9),
    size=st.lists(st.integers(2, 60), min_size=3, max_size=3),
    training=st.booleans(),
)
def test_no_corner_ever_leaves_the_image(axes, kind, count, bias, size, training):
    patching = layer(axes, std=0.0, num_patches=count, jitter=0.7, **kind).train(training)
    with torch.no_grad():
        outputs = patching.predictor.out.bias
        outputs.copy_(torch.tensor(bias[: len(outputs)]).double())
    found = patching(image(axes, size=tuple(size[:axes])))
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * axes)
    ends = torch.cat((corners, torch.ones(len(corners), 1)), dim=1)
    outside = (found.transform @ ends.T).abs() - 1
    assert outside.max() <= 1e-9
    assert torch.isfinite(found.x).all()


@pytest.mark.parametrize(
    ("size", "patch"), [((32, 48), (8, 8)), ((8, 40), (8, 8)), ((12, 12, 8), (4, 6, 4)), ((6, 6, 6), (6, 3, 2))]
)
@pytest.mark.parametrize("count", ["all", None])
@kinds
def test_before_training_patches_are_the_regular_grid(size, patch, count, kind):
    axes = len(size)
    grid = [n // p for n, p in zip(size, patch, strict=True)]
    patching = AdaptivePatching(3, patch, math.prod(grid) if count else None, axes, view=16, **kind)
    tokens = image(axes, size=size, dtype=torch.float32)
    found = patching(tokens)
    unfolded = tokens.x.movedim(-1, 1)
    for axis, p in enumerate(patch, start=2):
        unfolded = unfolded.unfold(axis, p, p)
    expected = unfolded.flatten(2, axes + 1).movedim(2, 1)
    torch.testing.assert_close(found.x, expected, rtol=0, atol=3e-5)
    centers = Grid.create(grid, tuple(2 / n for n in grid)).coordinates().flatten(1, -2) - 1
    torch.testing.assert_close(found.center, centers.float().expand(2, -1, -1), rtol=0, atol=1e-6)
    found.x.square().mean().backward()
    assert (patching.predictor.out.bias.grad[:axes].abs() > 0).tolist() == [n > 1 for n in grid]


@pytest.mark.parametrize(("axes", "count"), [(2, 1), (2, 7), (2, 12), (3, 5), (3, 16)])
def test_fewer_patches_start_as_an_even_cover(axes, count):
    size = (64, 96, 64)[:axes]
    patching = AdaptivePatching(3, 4, count, axes, view=16, scaling="anisotropic", max_scale=100.0)
    found = patching(image(axes, 1, size=size, dtype=torch.float32))
    half = found.transform[0, :, :, :-1].flip(-1, -2).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(half.prod(-1).sum(), torch.tensor(1.0))  # together they are as large as the image
    points = torch.rand(500, axes) * 2 - 1
    inside = ((points[:, None] - found.center[0]).abs() <= half + 1e-6).all(-1)
    assert (inside.sum(1) >= 1).all()
    fixed = AdaptivePatching(3, 4, count, axes, view=16)(image(axes, 1, size=size, dtype=torch.float32))
    torch.testing.assert_close(fixed.center, found.center, rtol=0, atol=1e-6)


def test_sizes_that_patches_do_not_divide_are_covered_from_edge_to_edge():
    found = AdaptivePatching(3, 8, view=16)(image(2, 1, size=(20, 30), dtype=torch.float32))
    assert found.x.shape[1] == 3 * 4
    low, high = found.center.amin(1)[0], found.center.amax(1)[0]
    torch.testing.assert_close(low, -1 + torch.tensor([8 / 20, 8 / 30]))
    torch.testing.assert_close(high, -low)


def test_training_moves_patches_to_where_they_help():
    """Each image has one bright spot; a single patch that has to be bright finds it."""
    torch.manual_seed(0)
    patching = AdaptivePatching(1, 8, 1, view=32, scaling="isotropic", max_scale=4.0)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    optimizer = torch.optim.Adam(patching.parameters(), 3e-3)

    def spots(count):
        y, x = (torch.randint(6, 26, (count, 1, 1)).float() for _ in range(2))
        return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 40).unsqueeze(-1)

    def brightness(x):
        return patching(Tokens(x, Grid.create((32, 32)))).x.mean()

    before = brightness(spots(64)).item()
    for _ in range(150):
        optimizer.zero_grad()
        (-brightness(spots(32))).backward()
        optimizer.step()
    assert brightness(spots(64)).item() > 2 * before


def test_jitter_moves_patches_in_training_only():
    patching, tokens = AdaptivePatching(3, 8, view=16, jitter=0.5), image(2, dtype=torch.float32)
    still = patching.eval()(tokens).center
    assert torch.equal(patching(tokens).center, still)
    moved = patching.train()(tokens).center - still
    distance = 2 * torch.tensor([8 / 40, 8 / 56])
    assert (moved.abs() <= 0.51 * distance).all()
    assert (moved.abs() > 0).float().mean() > 0.9
    assert not torch.equal(patching(tokens).center - still, moved)


@axes_of
def test_masked_pixels_have_no_influence(axes):
    mask = torch.rand(2, *SIZES[axes]) > 0.4
    mask[0, : SIZES[axes][0] // 2] = False
    patching = layer(axes, num_patches=9, scaling="isotropic", rotate=True)
    clean = image(axes, mask=mask)
    dirty = clean._replace(x=torch.where(mask.unsqueeze(-1), clean.x, math.nan))
    found, expected = patching(dirty), patching(clean)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    nothing = patching(clean._replace(mask=torch.zeros_like(mask)))
    assert not nothing.mask.any()
    assert not nothing.x.any()
    ones = patching(Tokens(torch.ones_like(clean.x), clean.grid, mask))
    assert ((ones.x == 0) | ((ones.x - 1).abs() < 1e-9)).all()
    assert torch.equal(ones.mask, (ones.x != 0).flatten(2).any(-1))


def test_rotated_patches_are_not_sheared_in_physical_space():
    patching, tokens = layer(3, num_patches=6, rotate=True), image(3)
    found = patching(tokens)
    extent = tokens.grid.spacing[0] * torch.tensor(SIZES[3])
    sides = found.transform[..., :-1].flip(-1, -2) * (extent[:, None] / 2)
    gram = sides.mT @ sides
    torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)))
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    shape = torch.tensor(PATCH[3]) * torch.tensor(SPACING)
    torch.testing.assert_close(lengths / lengths[..., :1], (shape / shape[0]).expand_as(lengths).double())
    assert (sides[..., 0, 1].abs() > 0.01).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_places_exact(dtype):
    patching = AdaptivePatching(3, 16, view=16).to(dtype)
    tokens = image(2, size=(512, 512), dtype=torch.float32)
    tokens = tokens._replace(x=tokens.x.to(dtype))
    found = patching(tokens)
    assert found.x.dtype == dtype
    assert found.center.dtype == torch.float32
    torch.testing.assert_close(found.x[0, -1], tokens.x[0, -16:, -16:].movedim(-1, 0), rtol=0, atol=0.02)
    with torch.autocast("cpu", dtype):
        again = patching.float()(tokens._replace(x=tokens.x.float()))
    torch.testing.assert_close(again.x[0, -1], tokens.x[0, -16:, -16:].movedim(-1, 0).float(), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_number_of_patches():
    """From 4 to 64 patches of 16 x 16 on 3 x 1024 x 1024 the peak rises by no more than a few times the patches."""
    script = """
        import resource, torch
        from rat_timm.geometry.grid import Grid, Tokens
        from rat_timm.layers import AdaptivePatching
        image = Tokens(torch.randn(1, 1024, 1024, 3), Grid.create((1024, 1024)))
        for count in (4, 64):
            patching = AdaptivePatching(3, 16, count, scaling="isotropic", rotate=True)
            for _ in range(3):
                patching(image).x.sum().backward()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    few, many = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split())
    assert many - few < 4  # MiB; an image is 12, the 60 patches more are 0.2


@pytest.mark.parametrize("grid", [(14, 14), (3, 7), (1, 5), (4, 2, 6)])
def test_an_embedding_is_itself_at_its_cells_and_linear_between(grid):
    embed = torch.randn(1, *grid, 5, dtype=torch.float64)
    center = Grid.create(grid, tuple(2 / n for n in grid)).coordinates().flatten(1, -2).double() - 1
    found = interpolate_pos_embed(embed, center.expand(2, -1, -1))
    torch.testing.assert_close(found, embed.flatten(1, -2).expand(2, -1, -1), rtol=1e-6, atol=1e-6)
    step = torch.zeros(len(grid), dtype=torch.float64)
    step[-1] = 2 / grid[-1]
    between = interpolate_pos_embed(embed, center[:, :1] + 0.25 * step)
    first, second = embed[(0, *[0] * len(grid))], embed[(0, *[0] * (len(grid) - 1), 1)]
    torch.testing.assert_close(between[0, 0], 0.75 * first + 0.25 * second, rtol=1e-6, atol=1e-6)
    corner = interpolate_pos_embed(embed, torch.full((1, 1, len(grid)), -1.0).double())
    torch.testing.assert_close(corner[0, 0], first)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3"),
        ({"scaling": "both"}, "scaling must be one of"),
        ({"scaling": "isotropic", "max_scale": 1.0}, "max_scale must be above 1"),
        ({"jitter": -0.1}, "jitter must not be negative"),
        ({"num_patches": 0}, "num_patches must be a positive number"),
        ({"num_patches": 2.5}, "num_patches must be whole"),
        ({"patch_size": (4, 4, 4)}, "patch_size must be a positive number or 2"),
        ({"view": 20}, "view must be a multiple of 8"),
        ({"hidden_dim": 4}, "hidden_dim must be a multiple of 8"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        AdaptivePatching(**kwargs)


def test_an_embedding_and_places_have_to_fit():
    with pytest.raises(ValueError, match="center must be"):
        interpolate_pos_embed(torch.randn(1, 4, 4, 8), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="center must be"):
        interpolate_pos_embed(torch.randn(1, 4, 8), torch.zeros(2, 5, 1))
