"""Pictures of explanations. Images are drawn grey, at their pixel size; of volumes, the middle slice."""

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

_GOLDEN = 0.618034  # of the circle of hues: neighbours in number are far apart in colour


def plot_groups(image: Tensor, groups: Groups, sample: int = 0) -> "Figure":
    """Draws the image, and over it the groups in colours, pale where a pixel is shared.

    Args:
        image: ``[B, C, *size]``.
        groups: What `group_tokens` returned of it.
        sample: Which of the batch.
    """
    figure, axes = _figure(1, 2, image)
    grey, labels, share = _grey(image[sample]), _plane(groups.labels[sample]), _plane(groups.share[sample])
    colors = import_optional("matplotlib.colors", "explain")
    number = np.where(labels < 0, 0, labels)
    hue = (number * _GOLDEN) % 1
    color = colors.hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.8), np.full_like(hue, 0.95)], axis=-1))
    weight = 0.6 * (np.where(labels < 0, 0, share))[..., None]
    _show(axes[0, 0], grey, "image")
    _show(axes[0, 1], (1 - weight) * grey[..., None] + weight * color, "its groups")
    count = len(np.unique(labels[labels >= 0]))
    figure.suptitle(f"Tokens of one colour went to one group: {count} groups are seen")
    return figure


def plot_levels(images: Sequence[Tensor], attention: LevelAttention, sample: int = 0) -> "Figure":
    """Draws each level, a row for each, and from where in it how much attention goes to each level.

    Args:
        images: ``[B, C, *size]`` of each level.
        attention: What `attend_levels` returned of them.
        sample: Which of the batch.
    """
    count, parts = len(images), attention.shares[0].shape[-1]
    figure, axes = _figure(count, 1 + parts, images[0])
    picture: Any = None
    for row, (image, shares) in enumerate(zip(images, attention.shares, strict=True)):
        _show(axes[row, 0], _grey(image[sample]), f"level {row}")
        for part in range(parts):
            name = f"to level {part}" if part < count else "to prefix tokens"
            share = _plane(shares[sample, ..., part])
            picture = _show(axes[row, 1 + part], share, name if row == 0 else "", cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of attention", shrink=0.7)
    means = [float(torch.cat([s[sample].flatten(0, -2) for s in attention.shares]).mean(0)[i]) for i in range(count)]
    told = ", ".join(f"{100 * mean:.0f}% to level {i}" for i, mean in enumerate(means))
    figure.suptitle(f"Attention of all places: {told}")
    return figure


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
    figure.colorbar(picture, ax=axes, label="share of the largest", shrink=0.7)
    figure.suptitle(f"Bright places speak for {name}")
    return figure


def _figure(rows: int, columns: int, image: Tensor) -> tuple["Figure", np.ndarray]:
    height, width = image.shape[-2:]
    size = 3.2 * columns + 0.8, 3.2 * rows * min(1.5, max(0.5, height / width)) + 0.8
    figure = import_optional("matplotlib.figure", "explain").Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: "Axes", values: np.ndarray, title: str, **options: Any) -> object:
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
