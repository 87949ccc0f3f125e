"""Pictures of explanations. Images are drawn grey, at their pixel size; of volumes, the middle slice."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..optional import import_optional
from .groups import Groups
from .levels import LevelAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_GOLDEN = 0.618034  # of the circle of hues: neighbours in number are far apart in colour


def plot_groups(image: Tensor, groups: Groups, sample: int = 0) -> "Figure":
    """Draws the image, the groups in colours, and the share of each pixel's token that its group has.

    Args:
        image: ``[B, C, *size]``.
        groups: What `group_tokens` returned of it.
        sample: Which of the batch.
    """
    figure, axes = _figure(1, 3, image)
    grey, labels, share = _grey(image[sample]), _plane(groups.labels[sample]), _plane(groups.share[sample])
    colors = import_optional("matplotlib.colors", "explain")
    hue = (labels * _GOLDEN) % 1
    color = colors.hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.8), np.ones_like(hue)], axis=-1))
    color = np.where((labels < 0)[..., None], 0.0, (0.35 + 0.65 * grey)[..., None] * color)
    _show(axes[0, 0], grey, "image")
    _show(axes[0, 1], color, "group of each pixel")
    picture = _show(axes[0, 2], share, "share that it has", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8)
    seen = labels >= 0
    count, total = len(np.unique(labels[seen])), groups.shares.shape[-1]
    mean = share[seen].mean() if seen.any() else 0.0
    figure.suptitle(f"{count} of {total} groups are the largest somewhere, with {mean:.0%} of a token on average")
    return figure


def plot_levels(images: Sequence[Tensor], attention: LevelAttention, sample: int = 0) -> "Figure":
    """Draws each level, a row for each, and how much attention goes from each place to each level.

    Colours tell how many times as much it is as if all tokens were attended to alike.

    Args:
        images: ``[B, C, *size]`` of each level.
        attention: What `attend_levels` returned of them.
        sample: Which of the batch.
    """
    even = attention.even()[sample].tolist()
    figure, axes = _figure(len(images), 1 + len(even), images[0])
    names = [*(f"level {i}" for i in range(len(images))), "prefix tokens"][: len(even)]
    parts = [shares[sample] / shares.new_tensor(even).clamp(min=1e-12) for shares in attention.shares]
    low, high = _spread(torch.cat([part.flatten(0, -2) for part in parts]))
    norm = import_optional("matplotlib.colors", "explain").LogNorm(low, high)
    picture: Any = None
    for row, (image, part) in enumerate(zip(images, parts, strict=True)):
        _show(axes[row, 0], _grey(image[sample]), names[row])
        for column, name in enumerate(names):
            values = np.ma.masked_equal(_plane(part[..., column]), 0)
            picture = _show(axes[row, 1 + column], values, f"from it to {name}", cmap="RdBu_r", norm=norm)
    bar = figure.colorbar(picture, ax=axes, label="times as much as if even", shrink=0.8)
    ticks = np.geomspace(low, high, 5).tolist()
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks], minor=False)
    bar.minorticks_off()
    tokens = torch.cat([level.x[sample].flatten(0, -2) for level in attention.tokens])
    means = tokens[tokens.sum(dim=-1) > 0].mean(dim=0).tolist()
    told = ", ".join(f"{name} gets {a:.0%} (even: {b:.0%})" for name, a, b in zip(names, means, even, strict=True))
    figure.suptitle(f"Of the attention of all tokens {told}", wrap=True)
    return figure


def _spread(ratios: Tensor) -> tuple[float, float]:
    """Returns the ends of a scale around 1, at least 0.95 and 1.05, for ratios; zeros are not looked at."""
    logs = ratios[ratios > 0].log().abs()
    most = min(max(float(logs.max()) if len(logs) else 0.0, math.log(1.05)), math.log(100.0))
    return math.exp(-most), math.exp(most)


def plot_class(image: Tensor, activation: Tensor, sample: int = 0, name: str = "the class") -> "Figure":
    """Draws the image, and over it what speaks for a class.

    Args:
        image: ``[B, C, *size]``.
        activation: What `map_class` returned of it.
        sample: Which of the batch.
        name: Of the class.
    """
    figure, axes = _figure(1, 2, image)
    grey, values = _grey(image[sample]), _plane(activation[sample])
    _show(axes[0, 0], grey, "image")
    _show(axes[0, 1], grey, "activation")
    picture = axes[0, 1].imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(picture, ax=axes, label="share of the largest", shrink=0.8)
    figure.suptitle(f"Bright places speak for {name}")
    return figure


def _figure(rows: int, columns: int, image: Tensor) -> tuple["Figure", np.ndarray]:
    height, width = image.shape[-2:]
    size = 3.0 * columns + 1.0, 3.0 * rows * min(1.5, max(0.5, height / width)) + 0.9
    figure = import_optional("matplotlib.figure", "explain").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: "Axes", values: np.ndarray, title: str, **options: Any) -> "AxesImage":
    axes.set(xticks=[], yticks=[], title=title)
    if values.ndim == 2 and not options:
        options = {"cmap": "gray", "vmin": 0, "vmax": 1}
    return axes.imshow(values, interpolation="nearest", **options)


def _plane(x: Tensor) -> np.ndarray:
    """Returns ``[y, x]`` of ``[*size]``: the middle slice of a volume."""
    return (x if x.ndim == 2 else x[len(x) // 2]).detach().cpu().numpy()


def _grey(image: Tensor) -> np.ndarray:
    """Returns the mean of channels ``[C, *size]``, from 0 (the darkest hundredth) to 1."""
    plane = _plane(image.float().nan_to_num().mean(dim=0))
    low, high = np.percentile(plane, [1, 99])
    return np.clip((plane - low) / max(high - low, 1e-12), 0, 1)
