import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import rat_timm  # noqa: F401
from rat_timm.data import Sample, collate
from rat_timm.evaluation import Sensitivity, plot_sensitivity, sliding_window, spacing_sensitivity

inferers = pytest.importorskip("monai.inferers")
IMAGES = {2: (3, 1, 40, 56), 3: (3, 1, 20, 24, 28)}
ROI = {2: (24, 32), 3: (16, 16, 20)}


class Dense(nn.Module):
    """A backbone whose finest map is brought to the pixels of its input, per physical size of a pixel.

    (Weights that nobody trained make little of a spacing: 5e-5, which a tolerance could hide.)
    """

    def __init__(self, axes):
        super().__init__()
        name = "test_rat" if axes == 2 else "test_rat_3d"
        self.body = timm.create_model(name, in_chans=1, features_only=True, out_indices=(0,), physical_stem=False)

    def forward(self, x, spacing, mask):
        (features,) = self.body(x, spacing=spacing, mask=mask)
        size = spacing.prod(1).view(-1, *[1] * (features.ndim - 1))
        return F.interpolate(features[:, :3], x.shape[2:]) / size


@pytest.fixture(scope="module", params=[2, 3])
def case(request):
    axes, generator = request.param, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    image = torch.rand(IMAGES[axes], generator=generator)
    spacing = torch.tensor([[0.5, 1.0, 2.0], [1.0, 1.5, 0.7], [4.0, 3.0, 2.5]])[:, :axes]
    mask = torch.rand(IMAGES[axes][:1] + IMAGES[axes][2:], generator=generator) > 0.3
    return Dense(axes).double().eval(), image.double(), spacing, mask, ROI[axes]


def starts(size, window, overlap):
    """Where windows start along an axis: the last one ends with the image."""
    step = max(int(window * (1 - overlap)), 1)
    return sorted({min(start, size - window) for start in range(0, size - window + step, step)})


@torch.no_grad()
def slowly(model, image, spacing, mask, window, overlap):
    """One window of one sample at a time; each pixel is the mean of the windows that hold it."""
    out, count = torch.zeros(len(image), 3, *image.shape[2:], dtype=torch.float64), torch.zeros(image.shape[2:])
    places = [starts(n, w, overlap) for n, w in zip(image.shape[2:], window, strict=True)]
    for place in itertools.product(*places):
        part = tuple(slice(start, start + w) for start, w in zip(place, window, strict=True))
        count[part] += 1
        for b in range(len(image)):
            inside = None if mask is None else mask[b][part][None]
            out[(b, slice(None), *part)] += model(image[b][(slice(None), *part)][None], spacing[b][None], inside)[0]
    assert count.min() >= 1
    return out / count


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sw_batch_size", "overlap"), [(1, 0.25), (2, 0.5), (5, 0.25), (64, 0.0)])
def test_it_is_what_one_window_at_a_time_gives(case, masked, sw_batch_size, overlap):
    model, image, spacing, mask, window = case
    mask = mask if masked else None
    expected = slowly(model, image, spacing, mask, window, overlap)
    options = {"mask": mask, "sw_batch_size": sw_batch_size, "overlap": overlap}
    with torch.no_grad():
        result = sliding_window(model, image, window, spacing=spacing, **options)
    valid = torch.ones_like(result[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    torch.testing.assert_close(result * valid, expected * valid, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_stands_under_the_mask_has_no_part(case):
    model, image, spacing, mask, window = case
    other = torch.where(mask[:, None], image, torch.nan)
    one, two = (sliding_window(model, x, window, spacing=spacing, mask=mask, sw_batch_size=3) for x in (image, other))
    assert torch.equal(one[mask[:, None].expand_as(one)], two[mask[:, None].expand_as(two)])


@torch.no_grad()
def test_keywords_of_monai_mix_samples_up(case):
    """The defect: as many windows in a call as samples in the batch, and each has the spacing of its row."""
    model, image, spacing, _, window = case
    expected = slowly(model, image, spacing, None, window, 0.25)
    mixed = inferers.sliding_window_inference(image, window, 3, model, spacing=spacing, mask=None)
    assert (mixed - expected).abs().max() > 1e-2


@torch.no_grad()
def test_one_spacing_for_all_and_options_of_monai(case):
    model, image, spacing, mask, window = case
    one = sliding_window(model, image, window, spacing=spacing[0].tolist(), mask=mask, mode="gaussian", buffer_steps=1)
    each = [
        sliding_window(model, image[b][None], window, spacing=spacing[:1], mask=mask[b][None], mode="gaussian")
        for b in range(len(image))
    ]
    valid = mask[:, None].expand_as(one)
    torch.testing.assert_close(one[valid], torch.cat(each)[valid], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_window_larger_than_the_image_is_the_image(case):
    model, image, spacing, mask, _ = case
    result = sliding_window(model, image, 100, spacing=spacing, mask=mask)
    valid = mask[:, None].expand_as(result)
    torch.testing.assert_close(result[valid], model(image, spacing, mask)[valid])


def test_what_does_not_fit(case):
    model, image, spacing, mask, window = case
    axes = len(window)
    with pytest.raises(ValueError, match=f"roi_size must be a positive number of pixels for each of {axes} axes"):
        sliding_window(model, image, [*window, 4], spacing=spacing)
    with pytest.raises(ValueError, match="roi_size must be a positive number"):
        sliding_window(model, image, 0, spacing=spacing)
    with pytest.raises(ValueError, match=rf"spacing must be \[{axes}\] or \[3, {axes}\], got \[2, {axes}\]"):
        sliding_window(model, image, window, spacing=spacing[:2])
    for wrong in (mask.double(), mask[:, None], mask[:2]):
        with pytest.raises(ValueError, match=r"mask must be bool \[3, "):
            sliding_window(model, image, window, spacing=spacing, mask=wrong)
    with pytest.raises(ValueError, match="with_coord must not be given"):
        sliding_window(model, image, window, spacing=spacing, with_coord=True)


class Ruler(nn.Module):
    """Tells large discs from small ones by the physical size that it is told; 1 is the reference spacing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, spacing=None, mask=None):
        self.calls.append((spacing, mask))
        step = torch.ones(len(x)) if spacing is None else spacing[:, 0]
        diameter = x.flatten(1).sum(1) ** (1 / (x.ndim - 2)) * step
        return torch.stack((12 - diameter, diameter - 12), dim=1)


def discs(axes):
    """Batches of squares, or cubes, of 8 and 16 units, at pixel sizes of 1 and 2; the last one has masks."""
    samples = []
    for spacing, length, size in ((1.0, 8, 20), (1.0, 16, 20), (2.0, 8, 20), (2.0, 16, 20), (2.0, 16, 16)):
        image = torch.zeros(1, *[size] * axes)
        image[(0, *[slice(0, int(length / spacing))] * axes)] = 1
        samples.append(Sample(image, torch.full((axes,), spacing), target=int(length > 12)))
    return [collate(samples[:3]), collate(samples[3:])]


@pytest.mark.parametrize("axes", [2, 3])
def test_a_wrong_pixel_size_shows(axes):
    """8 and 16 are told apart at 12: by factors within 0.75 and 1.5 all, beyond them the small or the large ones."""
    model = Ruler().eval()
    factors = (0.5, 0.8, 1.0, 1.4, 1.6, None)
    rows = spacing_sensitivity(model, iter(discs(axes)), factors)  # read once
    assert [row.factor for row in rows] == list(factors)
    expected = [0.4, 1.0, 1.0, 1.0, 0.6, 0.6]  # none: two of three at a pixel size of 2 look small
    assert [row.metric for row in rows] == pytest.approx(expected)
    told, masks = zip(*model.calls, strict=True)
    assert masks[:6] == (None,) * 6
    assert all(mask is not None for mask in masks[6:])
    torch.testing.assert_close(told[1], 0.8 * discs(axes)[0].spacing)
    assert torch.is_grad_enabled()


def test_it_takes_metrics_of_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    metric = classification.MulticlassAccuracy(2, average="macro")
    rows = spacing_sensitivity(Ruler().eval(), discs(2), (1.0, 0.5, 1.6), metric)
    assert [row.metric for row in rows] == pytest.approx([1.0, 0.5, 0.5])
    assert not metric.update_called


def test_a_model_of_ours_and_its_plot(tmp_path):
    pytest.importorskip("matplotlib")
    pandas = pytest.importorskip("pandas")
    torch.manual_seed(0)
    model = timm.create_model("test_rat", pretrained=True).eval()
    batch = collate([Sample(torch.rand(3, 32, 32), torch.ones(2), target=label) for label in range(6)])
    with torch.no_grad():
        target = model(batch.image, spacing=1.0).argmax(1)
    rows = spacing_sensitivity(model, [batch._replace(target=target)], device="cpu")
    assert {row.factor: row.metric for row in rows}[1.0] == 1.0
    assert list(pandas.DataFrame(rows).columns) == ["factor", "metric"]
    figure = plot_sensitivity(rows, "accuracy")
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [row.factor for row in rows if row.factor]
    assert axes.lines[0].get_ydata().tolist() == [row.metric for row in rows if row.factor]
    assert len(axes.lines) == 2
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_plots_need_matplotlib(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ImportError, match=r"matplotlib\.figure is not installed: pip install 'rat-timm\[examples\]'"):
        plot_sensitivity([Sensitivity(1.0, 0.5)])


def test_sensitivity_to_what_does_not_fit():
    model, batches = Ruler().eval(), discs(2)
    for factors in ((0,), (-1.0, 1), (math.nan,), (math.inf,), ()):
        with pytest.raises(ValueError, match="factors must be positive and finite numbers, or None"):
            spacing_sensitivity(model, batches, factors)
    with pytest.raises(ValueError, match=r"model must be in evaluation mode: call model\.eval\(\)"):
        spacing_sensitivity(Ruler(), batches)
    with pytest.raises(ValueError, match="loader must give batches, got none"):
        spacing_sensitivity(model, [])
    with pytest.raises(ValueError, match="whose target is a tensor, got NoneType"):
        spacing_sensitivity(model, [batches[0]._replace(target=None)])
    with pytest.raises(ValueError, match="metric must be given where outputs are not logits"):
        spacing_sensitivity(model, [batches[0]._replace(target=torch.zeros(3, 20, 20))])
