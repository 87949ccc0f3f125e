"""What the seed packages get wrong, each defect on their class and its cure on ours; and what is equal."""

import pytest
import RoSE
import spatial_grouping_attention as upstream
import timm
import torch
from resolution_aware_transformer import ResolutionAwareTransformer
from RoSE.rose import _init_p_nd

from rat_timm.geometry.grid import Grid, Tokens, field_center
from rat_timm.layers import DenseSpatialGroupingAttention, RotarySpatialEmbedding, SparseSpatialGroupingAttention
from rat_timm.models.rat import checkpoint_filter_fn

SHAPE = (6, 6)


def upstream_sga(**kwargs):
    return upstream.DenseSpatialGroupingAttention(16, 2, 3, **({"num_heads": 4, "stride": 2} | kwargs))


def our_sga(**kwargs):
    return DenseSpatialGroupingAttention(16, 2, 3, **({"num_heads": 4, "stride": 2} | kwargs))


def run_upstream(layer, x, mask=None):
    """x [B, *grid, C] -> groups [B, *coarse, C]."""
    out = layer(x.flatten(1, 2), (1.0, 1.0), tuple(x.shape[1:3]), mask)
    return out["x_out"].unflatten(1, out["out_grid_shape"])


def run_ours(layer, x, mask=None):
    return layer(Tokens(x, Grid.create(x.shape[1:3]), mask))[0].x


def heads_are_separate(layer, run):
    """Values of one head's channels must reach that head's channels only, before norms and MLP mix them."""
    seen = {}
    layer.norm2.register_forward_pre_hook(lambda _, args: seen.update(taken=args[0]))
    with torch.no_grad():
        for parameter in layer.kv.parameters():
            parameter.zero_()
        layer.kv.weight[16:20, :] = 1.0  # value channels of head 0 only
        run(layer, torch.rand(1, *SHAPE, 16) + 1)
    return bool(seen["taken"][..., 4:].abs().max() == 0)


def test_heads_of_grouping():
    torch.manual_seed(0)
    assert not heads_are_separate(upstream_sga(iters=1), run_upstream)
    assert heads_are_separate(our_sga(iters=1), run_ours)


def test_sparse_grouping_needs_no_natten():
    with pytest.raises(ImportError):
        upstream.SparseSpatialGroupingAttention(16, 2, 3, 4, 2)
    assert run_ours(SparseSpatialGroupingAttention(16, 2, 3, 4, 2), torch.randn(1, *SHAPE, 16)).shape == (1, 3, 3, 16)


@pytest.mark.parametrize(("make", "run", "calls"), [(upstream_sga, run_upstream, 3), (our_sga, run_ours, 1)])
def test_keys_and_values_are_computed_once(make, run, calls):
    layer, seen = make(iters=3), []
    layer.kv.register_forward_hook(lambda *_: seen.append(1))
    run(layer, torch.randn(1, *SHAPE, 16))
    assert len(seen) == calls


def test_rose_rotates_at_spacing_one():
    x = torch.randn(1, 36, 16)
    theirs = upstream_sga(rotary_ratio=1.0).rose
    assert torch.equal(theirs(x, (1.0, 1.0), SHAPE, flatten=True), x)
    ours, grid = our_sga(rotary_ratio=1.0).rose, Grid.create(SHAPE)
    y = x.view(1, *SHAPE, 4, 4)
    assert (ours(y, grid.positions(field_center([grid]), (1.0, 1.0))) - y).abs().max() > 0.5


def test_one_place_has_one_coordinate_on_every_grid():
    x = torch.randn(1, 1, 16)
    theirs = RoSE.RotarySpatialEmbedding(16, 4, 2, initial_scaling="log")
    fine = theirs(x.expand(1, 36, 16), (1.5, 1.5), SHAPE, flatten=True).view(*SHAPE, 16)
    coarse = theirs(x.expand(1, 9, 16), (3.0, 3.0), (3, 3), flatten=True).view(3, 3, 16)
    assert (fine[::2, ::2] - coarse).abs().max() > 0.1
    ours = RotarySpatialEmbedding(16, 4, 2)
    grids = Grid.create(SHAPE, 1.5, 0.0), Grid.create((3, 3), 3.0, 0.0)
    center = field_center(grids)
    fine, coarse = (ours(x.view(1, 1, 1, 4, 4).expand(1, *g.shape, 4, 4), g.positions(center, (1, 1))) for g in grids)
    torch.testing.assert_close(fine[:, ::2, ::2], coarse, rtol=0, atol=1e-6)


def test_frequencies_tell_axes_apart():
    """Upstream's phases see x + y only: two places on an anti-diagonal are one."""
    x = torch.randn(1, 1, 16).expand(1, 36, 16)
    theirs = RoSE.RotarySpatialEmbedding(16, 4, 2, init_jitter_std=0.0)(x, (1.0, 1.0), SHAPE, flatten=True)
    theirs = theirs.view(*SHAPE, 16)
    torch.testing.assert_close(theirs[1, 0], theirs[0, 1])
    grid = Grid.create(SHAPE)
    ours = RotarySpatialEmbedding(16, 4, 2)(x.view(1, *SHAPE, 4, 4), grid.positions(field_center([grid]), (1, 1)))
    assert (ours[0, 1, 0] - ours[0, 0, 1]).abs().max() > 0.1


def test_levels_of_a_pyramid_are_not_shifted():
    """The centre of one field of view is one position, whatever the resolution."""
    middle = [_init_p_nd((n, n), spacing=(8 / n, 8 / n)).mean(0) for n in (8, 4)]
    assert (middle[0] - middle[1]).abs().min() == 0.5
    ours = [Grid.create((n, n), 8 / n).coordinates().flatten(0, 2).mean(0) for n in (8, 4)]
    assert torch.equal(*ours)


def test_bfloat16():
    with pytest.raises((NotImplementedError, RuntimeError)):
        RoSE.RotarySpatialEmbedding(16, 4, 2)(torch.randn(1, 36, 16).bfloat16(), (1.0, 1.0), SHAPE)
    layer, x = our_sga(), torch.randn(2, *SHAPE, 16)
    expected = run_ours(layer, x)
    out = run_ours(layer.bfloat16(), x.bfloat16())
    assert (out - expected).norm() / expected.norm() < 2e-2


def test_true_means_valid():
    x = torch.randn(1, *SHAPE, 16)
    other = x.clone()
    other[:, 3:] = 7.0
    mask = torch.zeros(1, *SHAPE, dtype=torch.bool)
    mask[:, :3] = True
    layer = upstream_sga()
    assert not torch.equal(run_upstream(layer, x, ~mask), run_upstream(layer, x, mask))
    assert torch.equal(run_upstream(layer, x, ~mask), run_upstream(layer, other, ~mask))  # 1 = replaced, there
    layer = our_sga()
    valid = torch.tensor([0, 1])  # rows of groups with valid pixels
    assert torch.equal(run_ours(layer, x, mask)[:, valid], run_ours(layer, other, mask)[:, valid])
    assert not torch.equal(run_ours(layer, x, ~mask), run_ours(layer, other, ~mask))


def test_leading_tokens_take_part():
    theirs = ResolutionAwareTransformer(feature_dims=16, num_heads=2, num_blocks=2, leading_tokens=3)
    sum(out["x_out"].square().sum() for out in theirs(torch.randn(1, 3, 16, 16))).backward()
    assert theirs.leading_tokens.grad is None
    ours = timm.create_model("test_rat", leading_tokens=3)
    ours(torch.randn(1, 3, 32, 32)).square().sum().backward()
    assert ours.stages[3].reg_tokens.shape == (1, 3, 128)
    assert ours.stages[3].reg_tokens.grad.abs().max() > 0


def test_spacing_per_sample():
    spacing = torch.tensor([[1.0, 1.0], [2.0, 3.0]])
    theirs = RoSE.RotarySpatialEmbedding(16, 4, 2)
    with pytest.raises((TypeError, RuntimeError)):
        theirs(torch.randn(2, 36, 16), spacing, SHAPE)
    layer, x = our_sga(), torch.randn(2, *SHAPE, 16)
    both = layer(Tokens(x, Grid.create(SHAPE, spacing, batch_size=2)))[0].x
    for i in range(2):
        single = layer(Tokens(x[i : i + 1], Grid.create(SHAPE, spacing[i])))[0].x
        torch.testing.assert_close(both[i : i + 1], single, rtol=0, atol=1e-5)


def test_temperature_starts_at_the_scale_of_a_head():
    """Logits of a head's width d have unit variance at d ** -0.5, not at the whole width's."""
    assert upstream_sga().temp.item() == pytest.approx(16**-0.5)
    assert our_sga().temp.item() == pytest.approx(4**-0.5)


def classic_kwargs(**changes):
    return {"num_heads": 1, "rotary_ratio": 1.0} | changes


def corner_grid(shape, spacing):
    """Upstream's coordinates: index times spacing."""
    return Grid.create(shape, spacing, 0.0)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("mode", ["identity", "rope"])
def test_one_head_reproduces_upstream_grouping_layer_by_layer(spatial_dims, mode):
    size = (30, 41) if spatial_dims == 2 else (9, 10, 7)
    name = "rat_classic" if spatial_dims == 2 else "rat_classic_3d"
    theirs = ResolutionAwareTransformer(
        spatial_dims, num_heads=1, rotary_ratio=1.0, rose_initial_scaling=mode, feature_dims=16
    )
    ours = timm.create_model(name, in_chans=3, num_classes=0, embed_dim=(16,) * 4, **classic_kwargs())
    load_upstream(ours, theirs)
    x, shape, spacing = torch.randn(2, *size, 16), size, (1.0,) * spatial_dims
    for their_layer, stage in zip(theirs.sga_layers, ours.stages, strict=True):
        out = their_layer(x.flatten(1, -2), spacing, shape)
        tokens, _ = stage.downsample.sga(Tokens(x, corner_grid(shape, spacing)))
        assert tokens.grid.shape == out["out_grid_shape"]
        torch.testing.assert_close(tokens.x.flatten(1, -2), out["x_out"], rtol=0, atol=1e-5)
        x, shape, spacing = tokens.x.detach(), out["out_grid_shape"], out["out_spacing"]


def load_upstream(ours, theirs):
    return ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours), strict=True)


@pytest.mark.parametrize(("name", "leading_tokens"), [("rat_classic", 0), ("rat_classic_3d", 2)])
def test_an_upstream_state_dict_loads_with_nothing_missing_or_left_over(name, leading_tokens):
    spatial_dims = 3 if name.endswith("3d") else 2
    theirs = ResolutionAwareTransformer(spatial_dims, leading_tokens=leading_tokens)
    ours = timm.create_model(name, in_chans=3, num_classes=0, leading_tokens=leading_tokens)
    result = load_upstream(ours, theirs)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(ours.stages[2].downsample.sga.kv.weight, theirs.sga_layers[2].kv.weight)


def test_one_head_reproduces_the_whole_upstream_network():
    """Same field, one level: relative positions are upstream's, so the features are."""
    kwargs = classic_kwargs(rose_initial_scaling="identity")
    theirs = ResolutionAwareTransformer(feature_dims=16, **kwargs)
    ours = timm.create_model("rat_classic", num_classes=0, embed_dim=(16,) * 4, **kwargs)
    load_upstream(ours, theirs)
    image = torch.randn(2, 3, 40, 33)
    expected = theirs(image)[0]
    out = ours.forward_features(image)
    torch.testing.assert_close(out.flatten(2).mT, expected["x_out"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_scaling_parameters_frequencies_are_converted():
    kwargs = classic_kwargs(learnable_rose_scaling=False, rose_initial_scaling="identity")
    theirs = ResolutionAwareTransformer(feature_dims=16, **kwargs)
    ours = timm.create_model("rat_classic", num_classes=0, embed_dim=(16,) * 4, **kwargs)
    load_upstream(ours, theirs)
    image = torch.randn(1, 3, 40, 33)
    out = ours.forward_features(image)
    torch.testing.assert_close(out.flatten(2).mT, theirs(image)[0]["x_out"], rtol=0, atol=1e-4)


def test_a_fixed_logarithm_of_other_units_cannot_be_converted():
    ours = timm.create_model("rat_classic", learnable_rose_scaling=False, rose_initial_scaling="log", device="meta")
    with pytest.raises(ValueError, match="rose_initial_scaling 'log'"):
        checkpoint_filter_fn({"init_proj.weight": torch.zeros(128, 3, 7, 7)}, ours)
