"""Samples of different pixel size, and batches of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .spacing import Spacing

Objects: TypeAlias = Mapping[str, Tensor]  # boxes, labels and masks, as torchvision's detectors want them
Target: TypeAlias = Tensor | np.ndarray | Objects | Sequence[float] | float | None

IGNORED = -1  # what maps of whole numbers are filled up with
_Part = TypeVar("_Part")


class Sample(NamedTuple):
    """An image or a volume with its pixel size.

    Attributes:
        image: ``[channels, *grid]``.
        spacing: ``[axes]``, in array-axis order (z, y, x).
        mask: ``[*grid]``, bool, True = valid; None if all of it is.
        target: What is to be learned. A tensor or array ``[*grid]`` or ``[C, *grid]``, of the image's grid, is a map:
            transforms and batches treat it as they do the image. A dict says what objects there are, as torchvision's
            detectors want it. All else, such as the index of a class, is of the whole.
    """

    image: Tensor
    spacing: Tensor
    mask: Tensor | None = None
    target: Target = None


Transform: TypeAlias = Callable[[Sample], Sample]


class Batch(NamedTuple):
    """Samples side by side; ``model(batch.image, spacing=batch.spacing, mask=batch.mask)``.

    Attributes:
        image: ``[B, channels, *grid]``.
        spacing: ``[B, axes]``.
        mask: ``[B, *grid]``, bool, True = valid; None if all of it is.
        target: ``[B, ...]``, maps ``[B, *grid]`` or ``[B, C, *grid]``; a list of B dicts; None if there are none.
    """

    image: Tensor
    spacing: Tensor
    mask: Tensor | None
    target: Tensor | list[Objects] | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Moves it to a device."""

        def move(x: _Part) -> _Part:
            return cast(_Part, x.to(device, non_blocking=non_blocking)) if isinstance(x, Tensor) else x

        target: Tensor | list[Objects] | None
        if isinstance(self.target, list):
            target = [{name: move(part) for name, part in objects.items()} for objects in self.target]
        else:
            target = move(self.target)
        return Batch(move(self.image), move(self.spacing), move(self.mask), target)


def is_map(target: Target, grid: Sequence[int]) -> bool:
    """Tells whether a target is a map: a tensor or an array ``[*grid]`` or ``[C, *grid]``."""
    shape = tuple(getattr(target, "shape", ()))
    return len(shape) - len(grid) in (0, 1) and shape[-len(grid) :] == tuple(grid)


def check_sample(sample: Sample, axes: int) -> None:
    """Raises ``ValueError`` unless image, spacing and mask fit together and have so many axes.

    A `Spacing` has its image's size: one that a transform handed on as it was is of another image.
    """
    shape, spacing, mask = tuple(sample.image.shape), sample.spacing, sample.mask
    if len(shape) != axes + 1:
        raise ValueError(f"image must be [channels, *grid] with {axes} axes, got {list(shape)}")
    if tuple(spacing.shape) != (axes,) or not spacing.is_floating_point():
        raise ValueError(f"spacing must be {axes} floating-point numbers, got {spacing.dtype} {list(spacing.shape)}")
    if isinstance(spacing, Spacing) and spacing.canvas_size != shape[1:]:
        raise ValueError(f"spacing is that of an image of {spacing.canvas_size} pixels, got one of {shape[1:]}")
    if mask is not None and (tuple(mask.shape) != shape[1:] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(shape[1:])}, got {mask.dtype} {list(mask.shape)}")


def collate(samples: Sequence[Sample]) -> Batch:
    """Makes a batch of samples, whose spacings may differ; a ``collate_fn`` for data loaders.

    Images of different sizes are filled up at the far ends, and a mask says so. (Near the fill, neighbourhood attention
    keeps to windows inside the filled image: features there differ a little from those of the image by itself.)

    Targets that are maps (see `Sample`) are filled up as well: whole numbers, which come as int64, with -1, for losses
    with ``ignore_index=-1``; floating-point numbers with 0 and bool with False, where the mask alone says what is real.
    Dicts come as a list, as they are: filling up at the far ends moves no box. Other targets are stacked.

    Raises:
        ValueError: If samples or their targets do not fit together, or only some have a target.
    """
    shapes = [tuple(sample.image.shape) for sample in samples]
    if len({(shape[0], len(shape)) for shape in shapes}) != 1:
        raise ValueError(f"samples must agree in channels and axes, got images {shapes}")
    for sample in samples:
        check_sample(sample, len(shapes[0]) - 1)
    size = [max(along) for along in zip(*shapes, strict=True)][1:]
    whole = all(sample.mask is None for sample in samples) and len(set(shapes)) == 1
    mask = None if whole else torch.stack([_fill(_mask(sample), size) for sample in samples])
    image = torch.stack([_fill(sample.image, size) for sample in samples])
    return Batch(image, torch.stack([sample.spacing for sample in samples]), mask, _targets(samples, size))


def _mask(sample: Sample) -> Tensor:
    return torch.ones(sample.image.shape[1:], dtype=torch.bool) if sample.mask is None else sample.mask


def _fill(x: Tensor, size: Sequence[int], value: float = 0) -> Tensor:
    missing = [most - n for n, most in zip(x.shape[-len(size) :], size, strict=True)]
    return F.pad(x, [part for n in reversed(missing) for part in (0, n)], value=value)


def _fill_map(target: Target, size: Sequence[int]) -> Tensor:
    values = torch.as_tensor(target)
    if values.is_floating_point() or values.dtype == torch.bool:
        return _fill(values, size)
    return _fill(values.long(), size, IGNORED)


def _targets(samples: Sequence[Sample], size: Sequence[int]) -> Tensor | list[Objects] | None:
    targets = [sample.target for sample in samples]
    missing = sum(target is None for target in targets)
    if missing == len(targets):
        return None
    if missing:
        raise ValueError(f"samples must all have a target, or none, got {missing} of {len(targets)} without")
    dicts = [target for target in targets if isinstance(target, Mapping)]
    if len(dicts) == len(targets):
        return list(dicts)
    if dicts:
        raise ValueError(f"target must be a dict in all samples, or in none, got {len(dicts)} of {len(targets)}")
    maps = [is_map(sample.target, sample.image.shape[1:]) for sample in samples]
    values = [_fill_map(target, size) if all(maps) else torch.as_tensor(target) for target in targets]
    shapes = [list(value.shape) for value in values]
    if any(maps) != all(maps) or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"target must have one shape in all samples, or be a map of each image's size, got {shapes}")
    return torch.stack(values)
