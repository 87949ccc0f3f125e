import pytest
import timm
import torch

from helpers import lively
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.resample import resample
from rat_timm.models import RatConfig

RATIOS = {"test_rat": (1, 8), "test_rat_3d": (1, (2, 4, 4))}
OVERVIEWS = [  # the pixels of an overview over the crop's, and which of the ratios they are nearest to
    ("test_rat", (8, 8), 1),
    ("test_rat", (4, 4), 1),
    ("test_rat", (12, 11), 1),
    ("test_rat", (2, 2), 0),
    ("test_rat_3d", (2, 4, 4), 1),
    ("test_rat_3d", (3, 6, 4), 1),
    ("test_rat_3d", (1, 3, 3), 1),
    ("test_rat_3d", (1, 1.5, 1), 0),
]
REFERENCE = 0.5


def pair(name):
    """A model, and one with the same weights whose levels keep the pixel sizes that are told."""
    model = lively(timm.create_model(name, spacing=REFERENCE, level_ratios=RATIOS[name])).eval()
    plain = timm.create_model(name, spacing=REFERENCE).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


@pytest.mark.parametrize(("name", "factors", "nearest"), OVERVIEWS)
@torch.no_grad()
def test_levels_are_brought_to_the_nearest_ratio(name, factors, nearest):
    model, plain = pair(name)
    crop, overview = (torch.randn(1, model.in_chans, *(5 + 3 * i for i in range(len(factors)))) for _ in range(2))
    fine, coarse = (REFERENCE,) * len(factors), tuple(REFERENCE * f for f in factors)
    grid = Grid.create(overview.shape[2:], coarse, (0.3,) * len(factors), 1)
    wanted = tuple(REFERENCE * r for r in model.cfg.ratios[nearest])
    there = resample(Tokens(overview.movedim(1, -1), grid), wanted)
    expected = plain(
        [crop, there.x.movedim(-1, 1)], spacing=[fine, wanted], origin=[[0.0] * len(factors), there.grid.origin]
    )
    out = model([crop, overview], spacing=[fine, coarse], origin=[[0.0] * len(factors), [0.3] * len(factors)])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    unlike = plain([crop, overview], spacing=[fine, coarse], origin=[[0.0] * len(factors), [0.3] * len(factors)])
    if tuple(map(float, factors)) == model.cfg.ratios[nearest]:
        assert torch.equal(out, unlike)
    else:
        assert not torch.allclose(out, unlike, atol=1e-3)


@pytest.mark.parametrize("name", list(RATIOS))
@torch.no_grad()
def test_a_batch_of_several_overviews_equals_its_items(name):
    model, _ = pair(name)
    axes = model.spatial_dims
    x = [torch.randn(3, model.in_chans, *(8 + i for i in range(axes))) for _ in range(2)]
    spacing = [torch.full((3, axes), 0.6), torch.tensor([[2.0], [4.0], [2.0]]).expand(3, axes)]
    out = model(x, spacing=spacing)
    for i in range(3):
        alone = model([level[i : i + 1] for level in x], spacing=[rows[i : i + 1] for rows in spacing])
        torch.testing.assert_close(out[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(RATIOS))
@torch.no_grad()
def test_one_image_and_untold_pixels_are_not_changed(name):
    model, plain = pair(name)
    x = torch.randn(1, model.in_chans, *[12] * model.spatial_dims)
    assert torch.equal(model(x, spacing=1.7), plain(x, spacing=1.7))
    assert torch.equal(model([x, x[..., ::2]]), plain([x, x[..., ::2]]))


@pytest.mark.parametrize("ratios", [(8,), (2, 8), (1, (2, 4, 4)), (1, 0), (1, -2), 4, (1, "8")])
def test_wrong_ratios(ratios):
    with pytest.raises(ValueError, match="level_ratios"):
        RatConfig(level_ratios=ratios)


def test_ratios_of_json_are_those_of_python():
    assert RatConfig(spatial_dims=3, level_ratios=[1, [2, 4, 4]]).ratios == ((1.0, 1.0, 1.0), (2.0, 4.0, 4.0))
    assert hash(RatConfig(spatial_dims=3, level_ratios=[1, [2, 4, 4]]))
