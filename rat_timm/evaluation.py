"""Evaluation of images that are larger than what a model takes at once, and of pixel sizes that are wrong.

```python
import timm
import torch

import rat_timm
from rat_timm.data import Sample, collate
from rat_timm.evaluation import spacing_sensitivity

model = timm.create_model("test_rat").eval()
samples = [Sample(torch.rand(3, 32, 32), torch.tensor([0.5, 0.5]), target=label) for label in range(4)]
rows = spacing_sensitivity(model, [collate(samples)], factors=(0.5, 1.0, 2.0, None))
assert [row.factor for row in rows] == [0.5, 1.0, 2.0, None]  # and row.metric: the accuracy
```
"""

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from .optional import import_optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from monai.data import MetaTensor

    from .data.samples import Batch

Output: TypeAlias = Tensor | tuple[Tensor, ...] | dict[Hashable, Tensor]
"""What MONAI's ``sliding_window_inference`` gives: a map, or several as the model returns them."""


def sliding_window(
    model: Callable[..., Any],
    image: "Tensor | MetaTensor",
    roi_size: Sequence[int] | int,
    *,
    spacing: Sequence[float] | Tensor,
    mask: Tensor | None = None,
    sw_batch_size: int = 4,
    **options: Any,
) -> Output:
    """Runs a dense model over windows of images by MONAI's ``sliding_window_inference``, with spacing and mask.

        logits = sliding_window(model, batch.image, (96, 96, 96), spacing=batch.spacing, mask=batch.mask, overlap=0.5)

    MONAI's function hands its keywords to every call of the model as they are, while the windows of a call may be of
    any samples: with spacing and mask among them, one sample's windows would be seen with another's spacing. Here each
    window has the spacing of its own sample and its own part of the mask.

    Args:
        model: Is called with windows ``[N, C, *window]``, ``spacing`` ``[N, axes]`` and ``mask`` (None, or
            ``[N, *window]``); returns what MONAI takes, such as a map ``[N, classes, *window]``.
        image: ``[B, C, *grid]``.
        roi_size: Size of a window in pixels, one number or one per axis. A shorter axis of the image is taken whole, so
            that images are not padded.
        spacing: ``[axes]`` or ``[B, axes]``, physical, in array-axis order (z, y, x).
        mask: ``[B, *grid]``, bool, True = valid.
        sw_batch_size: Windows in a call of the model.
        options: Further keywords of MONAI's function, such as ``overlap``, ``mode`` ("constant" or "gaussian") and
            ``device``.

    Returns:
        What the model returns, of the whole images: ``[B, classes, *grid]``. Values where the mask is False are
        meaningless.

    Raises:
        ValueError: If the arguments do not fit together.
        ImportError: If MONAI is not installed; with the extra that installs it.
    """
    batch, grid = len(image), tuple(image.shape[2:])
    window = _window(roi_size, grid)
    rows = _rows(spacing, batch, len(grid))
    if mask is not None and (tuple(mask.shape) != (batch, *grid) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {[batch, *grid]}, got {mask.dtype} {list(mask.shape)}")
    if "with_coord" in options:
        raise ValueError("with_coord must not be given: the model is called with spacing and mask")

    def predict(windows: Tensor, places: list[list[slice]], *args: Any, **kwargs: Any) -> Any:
        samples = [place[0].start for place in places]
        kwargs["spacing"] = rows[samples].to(windows.device)
        kwargs["mask"] = None
        if mask is not None:  # a place is (sample, channels, *window)
            parts = [mask[(sample, *place[2:])] for sample, place in zip(samples, places, strict=True)]
            kwargs["mask"] = torch.stack(parts).to(windows.device)
        return model(windows, *args, **kwargs)

    infer = import_optional("monai.inferers", "data").sliding_window_inference
    return infer(image, window, sw_batch_size, predict, with_coord=True, **options)


def _window(roi_size: Sequence[int] | int, grid: Sequence[int]) -> list[int]:
    sizes = [roi_size] * len(grid) if isinstance(roi_size, int) else list(roi_size)
    if not grid or len(sizes) != len(grid) or min(sizes) < 1:
        raise ValueError(f"roi_size must be a positive number of pixels for each of {len(grid)} axes, got {roi_size}")
    return [min(size, whole) for size, whole in zip(sizes, grid, strict=True)]


def _rows(spacing: Sequence[float] | Tensor, batch: int, axes: int) -> Tensor:
    rows = torch.as_tensor(spacing, dtype=torch.float32)
    if tuple(rows.shape) not in ((axes,), (batch, axes)):
        raise ValueError(f"spacing must be [{axes}] or [{batch}, {axes}], got {list(rows.shape)}")
    return rows.expand(batch, axes)


class Metric(Protocol):
    """What torchmetrics' metrics have."""

    def update(self, preds: Tensor, target: Tensor) -> object:
        """Takes a batch's output and target."""

    def compute(self) -> Tensor | float:
        """Returns the metric of all batches."""


class Accuracy:
    """The share of samples whose class has the largest logit."""

    def __init__(self) -> None:
        self.right = self.count = 0

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes logits ``[B, classes]`` and classes ``[B]``."""
        if preds.ndim != 2 or target.shape != preds.shape[:1] or target.is_floating_point():
            raise ValueError(
                f"metric must be given where outputs are not logits [B, classes] and targets whole numbers [B], got "
                f"{list(preds.shape)} and {target.dtype} {list(target.shape)}"
            )
        self.right += int((preds.argmax(1) == target).sum())
        self.count += len(target)

    def compute(self) -> float:
        """Returns the share."""
        return self.right / self.count if self.count else math.nan


class Sensitivity(NamedTuple):
    """A row of what `spacing_sensitivity` returns.

    Attributes:
        factor: By which the pixel size that the model was told is wrong; above 1, it was told larger pixels. None: it
            was told none.
        metric: How good the model was.
    """

    factor: float | None
    metric: float


@torch.no_grad()
def spacing_sensitivity(
    model: Callable[..., Any],
    loader: "Iterable[Batch]",
    factors: Sequence[float | None] = (0.5, 0.63, 0.8, 1.0, 1.25, 1.6, 2.0, None),
    metric: Metric | None = None,
    device: torch.device | str | None = None,
) -> list[Sensitivity]:
    """Tells how good a model is when the pixel size that it is told is wrong by a factor.

        rows = spacing_sensitivity(model, loader)
        pandas.DataFrame(rows)
        plot_sensitivity(rows).savefig("sensitivity.png")

    A model that is told nothing takes the reference spacing: where that is better than a wrong pixel size, doubtful
    metadata had better be left out. All factors see the same batches, so that random transforms do no harm.

    Args:
        model: In evaluation mode; is called with images ``[B, C, *grid]``, ``spacing`` ``[B, axes]`` and ``mask``.
        loader: Gives batches (`rat_timm.data.collate`), with targets, whose spacing is right. It is read once.
        factors: By which to multiply the spacing; None: no spacing.
        metric: A metric of torchmetrics, or what has its methods. It is copied for each factor. Default: accuracy.
        device: Where batches are brought to. Default: they stay where they are.

    Returns:
        A row for each factor, in their order.

    Raises:
        ValueError: If a factor is not positive and finite, the model is in training mode, batches have no targets, or
            there are none.
    """
    wrong = [f for f in factors if f is not None and not 0 < f < math.inf]
    if wrong or not factors:
        raise ValueError(f"factors must be positive and finite numbers, or None, got {list(factors)}")
    if getattr(model, "training", False):
        raise ValueError("model must be in evaluation mode: call model.eval()")
    metrics, is_empty = [copy.deepcopy(Accuracy() if metric is None else metric) for _ in factors], True
    for batch in loader:
        is_empty = False
        batch = batch if device is None else batch.to(device)
        target = batch.target
        if not isinstance(target, Tensor):
            raise ValueError(f"loader must give batches whose target is a tensor, got {type(target).__name__}")
        for factor, measured in zip(factors, metrics, strict=True):
            spacing = None if factor is None else batch.spacing * factor
            measured.update(model(batch.image, spacing=spacing, mask=batch.mask), target)
    if is_empty:
        raise ValueError("loader must give batches, got none")
    return [Sensitivity(factor, float(m.compute())) for factor, m in zip(factors, metrics, strict=True)]


def plot_sensitivity(rows: Sequence[Sensitivity], name: str = "metric") -> "Figure":
    """Draws what `spacing_sensitivity` returned, over the factor; a line where the model was told no pixel size.

    Args:
        rows: At least one of them.
        name: Of the metric.

    Raises:
        ImportError: If matplotlib is not installed; with the extra that installs it.
    """
    figure = import_optional("matplotlib.figure", "examples").Figure(layout="constrained")
    axes = figure.subplots()
    told = sorted((row.factor, row.metric) for row in rows if row.factor is not None)
    axes.plot([factor for factor, _ in told], [metric for _, metric in told], marker="o", label="told")
    for row in rows:
        if row.factor is None:
            axes.axhline(row.metric, linestyle="--", color="grey", label="told no pixel size")
    axes.set_xscale("log", base=2)
    axes.set_xticks([factor for factor, _ in told], [f"{factor:g}" for factor, _ in told])
    axes.set_xlabel("pixel size that is told / true pixel size")
    axes.set_ylabel(name)
    axes.legend()
    best = max(rows, key=lambda row: row.metric)
    where = "without a pixel size" if best.factor is None else f"at {best.factor:g} times the true pixel size"
    axes.set_title(f"The {name} is highest, {best.metric:.3g}, {where}")
    return figure
