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

    Handed to MONAI's function as keywords, spacing and mask would reach every call whole, while the windows of a call
    may be of any samples: the model would see one sample's windows with another's spacing. Here each window has its own
    sample's spacing and its own part of the mask.

    Args:
        model: Is called with windows ``[N, C, *window]``, ``spacing`` ``[N, axes]`` and ``mask`` (None, or
            ``[N, *window]``); returns what MONAI takes, such as a map ``[N, classes, *window]``.
        image: ``[B, C, *grid]``.
        roi_size: Pixels of a window along each axis, or along all; those of an axis that is shorter are the axis's own,
            so that nothing is filled up.
        spacing: ``[axes]`` or ``[B, axes]``, physical, in array-axis order (z, y, x).
        mask: ``[B, *grid]``, bool, True = valid.
        sw_batch_size: Windows in a call of the model.
        options: More of MONAI's, such as ``overlap``, ``mode`` ("constant" or "gaussian") and ``device``.

    Returns:
        What the model returns, of the whole images: ``[B, classes, *grid]``. Where the mask is False, it means nothing.

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
