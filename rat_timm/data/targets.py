"""Targets of samples as transforms want them: maps as images are, boxes by their corners."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .samples import Objects, Target, is_map


def check_target(target: Target, grid: Sequence[int]) -> None:
    """Raises ``ValueError`` unless a transform can treat a target."""
    if isinstance(target, Mapping):
        if len(grid) != 2:
            raise ValueError("target must be no dict of objects in a volume: its boxes cannot be transformed")
        if "boxes" not in target or not set(target) <= {"boxes", "labels", "masks"}:
            raise ValueError(f"target must be a dict of boxes, labels and masks to be transformed, got {list(target)}")
        return
    shape = np.shape(cast(np.ndarray, target))  # () of None
    if not is_map(target, grid) and len(shape) > 1:
        raise ValueError(
            f"target must be a map of the image's size {tuple(grid)} or have at most one axis to be transformed, "
            f"got {shape}"
        )


class Planes(NamedTuple):
    """A map as images are: ``[C, *grid]``, float32; of whole numbers, their places in ``labels``."""

    values: Tensor
    labels: Tensor | None


def to_planes(target: Target, axes: int) -> Planes:
    """Makes planes of a map."""
    values, labels = torch.as_tensor(target), None
    if not values.is_floating_point():  # float32 does not hold all of them
        labels, values = values.long().unique(return_inverse=True)
    return Planes(values.float().reshape(-1, *values.shape[-axes:]), labels)


def from_planes(planes: Planes, target: Target, axes: int) -> Tensor:
    """Returns a transformed map in the layout and the type of the one before."""
    before, (values, labels) = torch.as_tensor(target), planes
    values = values if labels is None else labels[values.long()]
    return values.reshape(*before.shape[:-axes], *values.shape[1:]).to(before.dtype)


def to_corners(target: Objects, grid: Sequence[int]) -> dict[str, Any]:
    """Returns objects whose boxes, plain or torchvision's in any format, are torchvision's by their corners."""
    given = target["boxes"]
    if not isinstance(given, tv_tensors.BoundingBoxes):
        given = tv_tensors.BoundingBoxes(given, format="XYXY", canvas_size=tuple(grid))
    return {**target, "boxes": v2.ConvertBoundingBoxFormat("XYXY")(given)}


def from_corners(done: dict[str, Any], target: Objects) -> dict[str, Tensor]:
    """Returns transformed objects, but for those outside, in the form of those before."""
    kept, given = _CLEAN(done), target["boxes"]
    plain = {name: value.as_subclass(Tensor) for name, value in kept.items()}
    if not isinstance(given, tv_tensors.BoundingBoxes):
        return plain
    return {**plain, "boxes": v2.ConvertBoundingBoxFormat(given.format)(kept["boxes"])}


# clamping first: a box that rounding moved out of the image by a millionth of a pixel would be dropped
_CLEAN = v2.Compose(
    [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=lambda objects: objects.get("labels"))]
)
