"""Masked-image modelling: exact masks, dropped tokens, pixels at their places, the loss."""

import itertools

import pytest
import timm
import torch
from torch import nn

from helpers import lively, places
from rat_timm.geometry.grid import Grid
from rat_timm.pretrain import MaskedImageModel, hide_blocks, hide_pyramid, masked_loss
from rat_timm.pretrain.blocks import FLOOR
from rat_timm.pretrain.masked import unfold_cells

VIT = "rat_vit_small_patch16_dinov3"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "in_chans": 1}
SPACING = {2: (1.0, 0.8), 3: (1.6, 1.0, 0.8)}
SIZE = {2: (40, 48), 3: (16, 32, 24)}
MODELS = ["test_rat", "test_rat_3d", "vit", "vit_3d"]


def model_of(name):
    torch.manual_seed(0)
    if name.startswith("vit"):
        args = {**SMALL, **({"spatial_dims": 3, "patch_depth": 4} if name == "vit_3d" else {})}
        return lively(MaskedImageModel(VIT, decoder_width=32, decoder_depth=1, **args)).eval()
    return lively(MaskedImageModel(name, in_chans=1, decoder_width=32, decoder_depth=1)).eval()


def axes_of(name):
    return 3 if name.endswith("_3d") else 2


def images_of(name, levels=1):
    """Images of two samples, what is hidden of them, and which pixels are valid."""
    axes = axes_of(name)
    size, spacing = SIZE[axes], SPACING[axes]
    grids = [Grid.create(size, [step * 2**level for step in spacing]) for level in range(levels)]
    images = [torch.randn(2, 1, *size) for _ in grids]
    valid = [torch.rand(2, *size) > 0.1 for _ in grids]
    cell = [4, 8, 8][-axes:] if name.startswith("vit") else None
    hidden = hide_pyramid(grids, 8.0, 0.6, 2, valid=valid, cell=cell)
    told = {"spacing": [tuple(grid.spacing[0].tolist()) for grid in grids], "mask": valid}
    if levels == 1:
        return images[0], hidden[0], {name: values[0] for name, values in told.items()}
    return images, hidden, told


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_hidden_or_invalid_influences_nothing(name, levels):
    model, (x, hidden, told) = model_of(name), images_of(name, levels)
    expected = model(x, hidden, **told)
    pairs = (
        [(x, hidden, told["mask"], expected)] if levels == 1 else zip(x, hidden, told["mask"], expected, strict=True)
    )
    for image, where, valid, made in pairs:
        assert made.shape == image.shape
        assert made[where.unsqueeze(1)].std() > 0.1
        assert not made.movedim(1, -1)[~valid].any()
        image.masked_fill_((where | ~valid).unsqueeze(1), torch.nan)
    again = model(x, hidden, **told)
    for one, other in zip(*([[each] for each in (expected, again)] if levels == 1 else (expected, again)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_learn_also_where_a_level_is_hidden(name, levels):
    model, (x, hidden, told) = model_of(name).train(), images_of(name, levels)
    if levels == 2:
        hidden[1][0] = told["mask"][1][0]
    masked_loss(model(x, hidden, **told), x, hidden, 8.0, **told).sum().backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


@pytest.mark.parametrize("rope", ["dinov3", "mixed"])
@pytest.mark.parametrize("axes", [2, 3])
@torch.no_grad()
def test_dropping_masked_tokens_changes_nothing_but_their_number(axes, rope):
    args = {"spatial_dims": 3, "patch_depth": 4} if axes == 3 else {}
    kind = {"dinov3": VIT, "mixed": "rat_vit_small_patch16_rope_mixed_224"}[rope]
    model = lively(timm.create_model(kind, num_classes=0, **SMALL, **args)).double().eval()
    x = [torch.randn(3, 1, *SIZE[axes], dtype=torch.float64) for _ in range(2)]
    cell = [4, 8, 8][-axes:]
    grid = Grid.create(SIZE[axes], SPACING[axes])
    masks = [~hide_blocks(grid, 8.0, share, 3, cell=cell) for share in (0.6, 0.8)]
    masks[0][1] &= torch.rand(SIZE[axes]) > 0.9  # as many tokens as others have, or fewer
    masks[0][2], masks[1][2] = False, False
    told = {"spacing": [SPACING[axes]] * 2, "mask": masks, "output_dict": True, "return_prefix_tokens": True}
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))
    plain, dropped = (model.forward_intermediates(x, drop_masked=drop, **told) for drop in (False, True))
    patches = [mask.unfold(1, cell[0], cell[0]).unfold(2, cell[1], cell[1]) for mask in masks]
    patches = [each.unfold(3, cell[2], cell[2]) if axes == 3 else each for each in patches]
    counts = sum(each.flatten(1 + axes).any(-1).flatten(1).sum(1) for each in patches)
    total = sum(each.flatten(1 + axes)[0, ..., 0].numel() for each in patches)
    assert seen == [model.num_prefix_tokens + total, model.num_prefix_tokens + int(counts.max())]
    assert counts.tolist()[2] == 0
    for one, other in zip(plain["image_intermediates"], dropped["image_intermediates"], strict=True):
        for (a, prefix), (b, same) in zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]:
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(prefix, same)
    for one, other in zip(plain["image_features"], dropped["image_features"], strict=True):
        torch.testing.assert_close(one, other)
    alone = model.forward_intermediates(x[0], drop_masked=True, intermediates_only=True, spacing=1.0)
    torch.testing.assert_close(alone, model.forward_intermediates(x[0], intermediates_only=True, spacing=1.0))


@pytest.mark.parametrize("cell", [(2, 3), (2, 1, 3)])
def test_cells_are_laid_out(cell):
    grid = (2, 4, 3)[: len(cell)]
    size = [n * c for n, c in zip(grid, cell, strict=True)]
    image = torch.randn(2, *size, 5)
    cells = torch.zeros(2, *grid, *cell, 5)
    for index in itertools.product(*map(range, size)):
        place = [i // c for i, c in zip(index, cell, strict=True)]
        inside = [i % c for i, c in zip(index, cell, strict=True)]
        cells[(slice(None), *place, *inside)] = image[(slice(None), *index)]
    assert torch.equal(unfold_cells(cells.flatten(1 + len(cell)), cell), image)


class Places(nn.Module):
    """Predicts for every pixel at the reference spacing where it is."""

    def __init__(self, cell, step):
        super().__init__()
        self.cell, self.step = cell, step

    def forward(self, levels, there):
        sizes = [[n * c for n, c in zip(tokens.grid.shape, self.cell, strict=True)] for tokens in levels]
        return [
            places(size, self.step).movedim(0, -1).expand(len(tokens.x), *size, len(size))
            for tokens, size in zip(levels, sizes, strict=True)
        ]


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d"])
@torch.no_grad()
def test_pixels_are_predicted_where_they_are(name):
    axes = axes_of(name)
    model = MaskedImageModel(name, in_chans=axes, decoder_width=32, decoder_depth=0, spacing=(0.5,) * axes)
    model.decoder = Places(model.cell, (0.5,) * axes)
    rows = torch.tensor([[0.7] * axes, [0.4] * axes])
    x = torch.randn(2, axes, *SIZE[axes])
    hidden = hide_blocks(Grid(SIZE[axes], rows, rows / 2), 8.0, 0.5, 2)
    made = model(x, hidden, spacing=rows)
    for one, row in zip(made, rows, strict=True):
        error = (one - places(SIZE[axes], row.tolist())).abs()
        assert error.max() <= 0.5  # a place further in, where only one of two neighbours is
        assert error[(slice(None), *[slice(1, -1)] * axes)].max() < 0.25 + 1e-4
        assert error[(slice(None), *[slice(2, -3)] * axes)].max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_batch_gives_what_its_items_give(name):
    axes = axes_of(name)
    model, (x, hidden, told) = model_of(name), images_of(name)
    rows = torch.tensor([SPACING[axes], [1.3 * step for step in SPACING[axes]]])
    both = model(x, hidden, spacing=rows, mask=told["mask"])
    features = model.features(x, spacing=rows, mask=told["mask"])
    for index in range(2):
        here = slice(index, index + 1)
        alone = model(x[here], hidden[here], spacing=rows[here], mask=told["mask"][here])
        torch.testing.assert_close(both[here], alone, rtol=1e-4, atol=1e-5)
        own = model.features(x[here], spacing=rows[here], mask=told["mask"][here])
        part = features.x[(here, *map(slice, own.grid.shape))]
        torch.testing.assert_close(part, own.x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            features.grid.origin[-1 if len(features.grid.origin) == 1 else index], own.grid.origin[0]
        )


@pytest.mark.parametrize("axes", [2, 3])
def test_the_loss_is_that_of_hidden_valid_pixels_normalised_in_blocks(axes):
    size, spacing = (6, 8, 5)[-axes:], (0.5, 1.0, 2.0)[-axes:]
    x = [torch.randn(2, 2, *size) for _ in range(2)]
    predicted = [torch.randn_like(image) for image in x]
    hidden, valid = ([torch.rand(2, *size) > 0.4 for _ in range(2)] for _ in range(2))
    hidden[1][0] = False
    steps = [spacing, [3 * step for step in spacing]]
    loss = masked_loss(predicted, x, hidden, 2.0, spacing=steps, mask=valid)
    for sample in range(2):
        means = []
        for level, (image, step) in enumerate(zip(x, steps, strict=True)):
            block = 2.0 * 3**level
            members = {}
            for index in valid[level][sample].nonzero().tolist():
                key = tuple(int((i + 0.5) * s // block) for i, s in zip(index, step, strict=True))
                members.setdefault(key, []).append(tuple(index))
            errors = []
            for indices, channel in itertools.product(members.values(), range(2)):
                values = torch.stack([image[(sample, channel, *index)] for index in indices]).double()
                target = (values - values.mean()) / (values.var(unbiased=False) + FLOOR**2).sqrt()
                for index, wanted in zip(indices, target, strict=True):
                    if hidden[level][(sample, *index)]:
                        errors.append(float((predicted[level][(sample, channel, *index)] - wanted) ** 2))
            if errors:
                means.append(sum(errors) / len(errors))
        assert float(loss[sample]) == pytest.approx(sum(means) / len(means), rel=1e-4)
    nothing = [torch.zeros_like(each) for each in hidden]
    assert masked_loss(predicted, x, nothing, 2.0, spacing=steps).tolist() == [0, 0]


def test_what_does_not_fit():
    with pytest.raises(
        ValueError, match="decoder_width must be a multiple of 32 and decoder_depth not negative, got 48, 2"
    ):
        MaskedImageModel("test_rat", decoder_width=48)
    with pytest.raises(ValueError, match=r"stages must be from 1 to 4, got 5"):
        MaskedImageModel("test_rat", stages=5)
    with pytest.raises(ValueError, match="backbone must have physical_patches=False, got True"):
        MaskedImageModel(VIT, physical_patches=True, **SMALL)
    with pytest.raises(ValueError, match="backbone must have mask_token=False, for masks that are exact, got True"):
        MaskedImageModel("test_rat", mask_token=True)
    model, x = MaskedImageModel("test_rat", in_chans=1, decoder_width=32), torch.randn(1, 1, 32, 32)
    with pytest.raises(
        ValueError, match=r"hidden of level 0 must be bool \[1, 32, 32\], got torch.float32 \[1, 32, 32\]"
    ):
        model(x, torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match=r"hidden must have one entry per level \(2\), got 1"):
        model([x, x], torch.zeros(1, 32, 32, dtype=torch.bool))
