"""Explanations against slow references in float64, and pictures that are drawn."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn

import rat_timm.layers.attention
from helpers import lively
from rat_timm import explain
from rat_timm.dense import Segmenter
from rat_timm.layers.grouping import SpatialGroupingAttention

SIZES = {"test_rat": (3, 45, 70), "test_rat_3d": (1, 20, 33, 17)}
NAMES = list(SIZES)


def build(name, **options):
    return lively(timm.create_model(name, num_classes=5, **options)).double().eval()


def images(name, batch=2):
    return torch.randn(batch, *SIZES[name], dtype=torch.float64)


def half_masked(name):
    mask = torch.ones(2, *SIZES[name][1:], dtype=torch.bool)
    mask[0, : SIZES[name][1] // 2] = False
    mask[1, ..., 5:] = False
    return mask


def some(size, count=60):
    """Some pixels, the first and the last among them."""
    chosen = [tuple(int(torch.randint(n, ())) for n in size) for _ in range(count)]
    return [(0,) * len(size), tuple(n - 1 for n in size), *chosen]


def sampled(values, stride, pixels):
    """A map ``[*grid, C]``, whose first centre is at the first pixel's, linearly at pixels, one by one."""
    rows = []
    for pixel in pixels:
        at = [min(n / stride, length - 1) for n, length in zip(pixel, values.shape, strict=False)]
        row = torch.zeros_like(values[(0,) * len(at)])
        for corner in itertools.product((0, 1), repeat=len(at)):
            ends = [
                (math.floor(a), 1 - a % 1) if not up else (math.ceil(a), a % 1)
                for a, up in zip(at, corner, strict=True)
            ]
            row = row + math.prod(weight for _, weight in ends) * values[tuple(index for index, _ in ends)]
        rows.append(row)
    return torch.stack(rows)


def at(x, pixels):
    return torch.stack([x[pixel] for pixel in pixels])


def assigned(query, key, mask, group_mask, stride, window):
    """Shares of tokens in groups ``[B, N, M]``, pair by pair: a window of cells around each group's own."""
    coarse, fine = query.shape[1:-2], key.shape[1:-2]
    groups, tokens = (list(itertools.product(*map(range, shape))) for shape in (coarse, fine))
    near = torch.tensor(
        [
            [all(abs(n // s - m) <= w // 2 for n, m, s, w in zip(t, g, stride, window, strict=True)) for t in tokens]
            for g in groups
        ]
    )
    q, k = query.flatten(1, -3).transpose(1, 2), key.flatten(1, -3).transpose(1, 2)  # [B, heads, M or N, d]
    allowed = near if mask is None else near & mask.flatten(1)[:, None, None]
    logits = (q @ k.mT).masked_fill(~allowed, -math.inf)
    attention = logits.softmax(dim=-1).nan_to_num()
    attention = attention if group_mask is None else attention * group_mask.flatten(1)[:, None, :, None]
    total = attention.sum(dim=-2, keepdim=True)
    return (attention / torch.where(total > 0, total, 1.0)).mT.mean(dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_groups_are_those_of_the_pairs(name, masked, monkeypatch):
    """Each pixel's shares, from all pairs of tokens and groups of three stages."""
    seen, own = [], SpatialGroupingAttention.assign

    def assign(self, query, key, mask, group_mask):
        window = self._window(query.shape[1:-2])
        seen.append(assigned(query, key, mask, group_mask, self.stride, window))
        return own(self, query, key, mask, group_mask)

    monkeypatch.setattr(SpatialGroupingAttention, "assign", assign)
    model, x = build(name), images(name)
    mask = half_masked(name) if masked else None
    groups = explain.group_tokens(model, x, coarse=2, spacing=1.0, mask=mask)
    matrix = seen[0] @ seen[1]
    torch.testing.assert_close(groups.shares.flatten(1, -2), matrix)
    valid = matrix.sum(-1) > 0.5
    torch.testing.assert_close(matrix.sum(-1), valid.double())
    if masked:
        assert (groups.labels[~mask] == -1).all()
        assert (groups.share[~mask] == 0).all()
    for sample in range(2):
        if masked:
            here = mask[sample]
            assert (groups.labels[sample][here] >= 0).all()
            continue
        pixels = some(x.shape[2:])
        expected = sampled(groups.shares[sample], 4, pixels)
        largest = expected.max(dim=-1).values
        torch.testing.assert_close(at(groups.share[sample], pixels), largest)
        chosen = expected.gather(-1, at(groups.labels[sample], pixels).unsqueeze(-1))[..., 0]
        torch.testing.assert_close(chosen, largest)  # groups that are equal may change places


def test_groups_between_any_stages():
    model, x = build("test_rat"), images("test_rat")
    with torch.no_grad():
        grids = model.forward_intermediates(x, output_dict=True)["grids"]
    for fine, coarse in ((0, 1), (1, 3), (2, -1)):
        groups = explain.group_tokens(model, x, fine=fine, coarse=coarse)
        assert (groups.fine.shape, groups.coarse.shape) == (grids[fine].shape, grids[coarse].shape)
        torch.testing.assert_close(groups.fine.origin, grids[fine].origin)
        torch.testing.assert_close(groups.fine.spacing, grids[fine].spacing)
    classic = timm.create_model("rat_classic", embed_dim=16, num_heads=2, in_chans=1).eval()
    groups = explain.group_tokens(classic, torch.randn(1, 1, 40, 30))
    assert groups.fine.shape == (40, 30)  # its first stage groups pixels
    assert groups.labels.max() < math.prod(groups.coarse.shape)


def reference_calls(monkeypatch):
    """Keeps what attention is computed of, as float64, and as weights of all pairs."""
    kept, own = [], rat_timm.layers.attention.masked_attention

    def attend(query, key, value, allowed=None, dropout_p=0.0, bias=None):
        logits = query @ key.mT * query.shape[-1] ** -0.5
        logits = logits if allowed is None else logits.masked_fill(~allowed, -math.inf)
        kept.append(logits.softmax(dim=-1).mean(dim=1))
        return own(query, key, value, allowed, dropout_p, bias)

    monkeypatch.setattr("rat_timm.layers.attention.masked_attention", attend)
    return kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("masked", "first"), [(False, "attention"), (True, "attention"), (True, "conv")])
def test_attention_over_levels_is_that_of_all_pairs(name, masked, first, monkeypatch):
    kept = reference_calls(monkeypatch)
    x, axes = images(name), len(SIZES[name]) - 1
    levels, spacing = [x, x[..., :16]], [(2.0,) * axes, (1.0,) * axes]
    masks = [half_masked(name), None] if masked else None
    model = build(name, block_types=(first, "attention", "attention", "attention"))
    attention = explain.attend_levels(model, levels, spacing=spacing, mask=masks)
    counts = [math.prod(tokens.grid.shape) for tokens in attention.tokens]
    parts = kept[-1].split(counts, dim=-1)
    expected = torch.stack([part.sum(dim=-1) for part in parts], dim=-1).split(counts, dim=1)
    for level, tokens, wanted, image in zip(attention.shares, attention.tokens, expected, levels, strict=True):
        mask = torch.ones(tokens.x.shape[:-1], dtype=torch.bool) if tokens.mask is None else tokens.mask
        torch.testing.assert_close(tokens.x, torch.where(mask.unsqueeze(-1), wanted.view(tokens.x.shape), 0.0))
        assert level.shape[1:-1] == image.shape[2:]
    valid = masks[0] if masked else torch.ones(2, *SIZES[name][1:], dtype=torch.bool)
    torch.testing.assert_close(attention.shares[0].sum(dim=-1), valid.double())
    torch.testing.assert_close(attention.shares[1].sum(dim=-1), torch.ones(2, *levels[1].shape[2:]).double())
    assert attention.tokens[0].x.std() > 1e-3
    valid = [
        torch.ones(2, count) if t.mask is None else t.mask.flatten(1)
        for t, count in zip(attention.tokens, counts, strict=True)
    ]
    even = torch.stack([level.sum(dim=1) for level in valid], dim=1).double()
    torch.testing.assert_close(attention.even(), even / even.sum(dim=1, keepdim=True))


def small_vit():
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2, "num_classes": 5}
    return lively(timm.create_model("rat_vit_small_patch16_dinov3", **options)).double().eval()


def test_attention_over_levels_of_a_plain_rat():
    """With prefix tokens; a level that is masked gets none."""
    model, x = small_vit(), torch.randn(2, 3, 64, 80, dtype=torch.float64)
    levels, spacing = [x, x[..., :32]], [(2.0, 2.0), (1.0, 1.0)]
    attention = explain.attend_levels(model, levels, spacing=spacing)
    for level in attention.shares:
        assert level.shape[-1] == 3
        torch.testing.assert_close(level.sum(dim=-1), torch.ones(level.shape[:-1]).double())
        assert (level > 0).all()
    assert attention.even().tolist() == 2 * [[20 / 33, 8 / 33, 5 / 33]]  # class token and registers
    masks = [None, torch.zeros(2, 64, 32, dtype=torch.bool)]
    alone = explain.attend_levels(model, levels, spacing=spacing, mask=masks)
    assert (alone.shares[0][..., 1] == 0).all()
    assert (alone.shares[1] == 0).all()
    first = explain.attend_levels(model, levels, block=0, spacing=spacing)
    assert (first.shares[0] - attention.shares[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_class_maps_are_weighted_by_gradients(name):
    pytest.importorskip("pytorch_grad_cam")
    model, x, seen = build(name), images(name), []
    handle = model.stages[1].register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(x, spacing=1.0)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 3] + logits[1, 2], seen)
    over = tuple(range(2, gradient.ndim))
    raw = (gradient.mean(dim=over, keepdim=True) * seen[0]).sum(dim=1).detach().relu()
    got = explain.map_class(model, x, [3, 2], stage=1, spacing=1.0)
    for sample in range(2):
        flat = raw[sample] - raw[sample].min()
        pixels = some(x.shape[2:])
        expected = sampled((flat / flat.max()).unsqueeze(-1), 8, pixels)[..., 0]
        torch.testing.assert_close(at(got[sample], pixels).double(), expected, rtol=0, atol=1e-6)
    assert 0 <= got.min() < got.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_class_maps_of_a_plain_rat_and_of_masks():
    pytest.importorskip("pytorch_grad_cam")
    x = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    mask = torch.ones(2, 64, 80, dtype=torch.bool)
    mask[:, :, 48:] = False
    for model in (small_vit(), build("test_rat")):
        for method in ("GradCAM", "LayerCAM"):
            got = explain.map_class(model, x, 1, spacing=1.0, mask=mask, stage=1, method=method)
            assert got.shape == (2, 64, 80)
            assert (got[~mask] == 0).all()
            assert got[mask].std() > 1e-3
            spoiled = torch.where(mask.unsqueeze(1), x, torch.nan)
            again = explain.map_class(model, spoiled, 1, spacing=1.0, mask=mask, stage=1, method=method)
            torch.testing.assert_close(again, got)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_drawn(name, tmp_path):
    pyplot = pytest.importorskip("matplotlib.image")
    pytest.importorskip("pytorch_grad_cam")
    model, x = build(name), images(name)
    axes = x.ndim - 2
    attention = explain.attend_levels(model, [x, x], spacing=[(2.0,) * axes, (1.0,) * axes])
    figures = [
        explain.plot_groups(x, explain.group_tokens(model, x, coarse=2)),
        explain.plot_levels([x, x], attention),
        explain.plot_class(x, explain.map_class(model, x, 3, stage=2)),
    ]
    assert [len(figure.axes) for figure in figures] == [4, 7, 3]  # with the colours' bars
    for figure in figures:
        figure.savefig(tmp_path / "picture.png", dpi=50)
        assert pyplot.imread(tmp_path / "picture.png").std() > 0.1


def test_errors_name_the_argument():
    pytest.importorskip("pytorch_grad_cam")
    model, x = build("test_rat"), images("test_rat")
    wrong = {
        "model must be a RAT": lambda: explain.group_tokens(nn.Identity(), x),
        "model must be in evaluation mode": lambda: explain.group_tokens(build("test_rat").train(), x),
        "model must group tokens": lambda: explain.group_tokens(small_vit(), x),
        "x must be images": lambda: explain.group_tokens(model, [x]),
        "coarse must be a stage": lambda: explain.group_tokens(model, x, coarse=0),
        "fine must be a stage": lambda: explain.group_tokens(model, x, fine=2, coarse=2),
        "block must be one of 1": lambda: explain.attend_levels(model, [x, x], block=1),
        "method must be": lambda: explain.map_class(model, x, method="Cam"),
        "target must be a class below 5": lambda: explain.map_class(model, x, [1, 5]),
        "model must be a classifier": lambda: explain.map_class(Segmenter(model, 2).eval(), x),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
