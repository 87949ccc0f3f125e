"""Evaluation of images that are larger than what a model takes at once."""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .optional import import_optional

if TYPE_CHECKING:
    from monai.data import MetaTensor

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
