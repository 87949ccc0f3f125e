"""Samples of different pixel size, and batches of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Sample(NamedTuple):
    """An image or a volume with its pixel size.

    Attributes:
        image: ``[channels, *grid]``.
        spacing: ``[axes]``, in array-axis order (z, y, x).
        mask: ``[*grid]``, bool, True = valid; None if all of it is.
        target: What is to be learned of the whole, such as the index of a class; transforms leave it as it is.
    """

    image: Tensor
    spacing: Tensor
    mask: Tensor | None = None
    target: Any = None


class Batch(NamedTuple):
    """Samples side by side; ``model(batch.image, spacing=batch.spacing, mask=batch.mask)``.

    Attributes:
        image: ``[B, channels, *grid]``.
        spacing: ``[B, axes]``.
        mask: ``[B, *grid]``, bool, True = valid; None if all of it is.
        target: ``[B, ...]``; None if there are none.
    """

    image: Tensor
    spacing: Tensor
    mask: Tensor | None
    target: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Moves it to a device."""
        mask, target = (
            None if x is None else x.to(device, non_blocking=non_blocking) for x in (self.mask, self.target)
        )
        image, spacing = (x.to(device, non_blocking=non_blocking) for x in (self.image, self.spacing))
        return Batch(image, spacing, mask, target)


def check_sample(sample: Sample, axes: int) -> None:
    """Raises ``ValueError`` unless image, spacing and mask fit together and have so many axes."""
    shape, spacing, mask = tuple(sample.image.shape), sample.spacing, sample.mask
    if len(shape) != axes + 1:
        raise ValueError(f"image must be [channels, *grid] with {axes} axes, got {list(shape)}")
    if tuple(spacing.shape) != (axes,) or not spacing.is_floating_point():
        raise ValueError(f"spacing must be {axes} floating-point numbers, got {spacing.dtype} {list(spacing.shape)}")
    if mask is not None and (tuple(mask.shape) != shape[1:] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(shape[1:])}, got {mask.dtype} {list(mask.shape)}")


def collate(samples: Sequence[Sample]) -> Batch:
    """Makes a batch of samples, whose spacings may differ; a ``collate_fn`` for data loaders.

    Images of different sizes are filled up at the far ends, and a mask says so. (Near the fill, neighbourhood attention
    keeps to windows inside the filled image: features there differ a little from those of the image by itself.)

    Raises:
        ValueError: If samples do not fit together, or only some have a target.
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
    return Batch(image, torch.stack([sample.spacing for sample in samples]), mask, _targets(samples))


def _mask(sample: Sample) -> Tensor:
    return torch.ones(sample.image.shape[1:], dtype=torch.bool) if sample.mask is None else sample.mask


def _fill(x: Tensor, size: Sequence[int]) -> Tensor:
    missing = [most - n for n, most in zip(x.shape[-len(size) :], size, strict=True)]
    return F.pad(x, [part for n in reversed(missing) for part in (0, n)])


def _targets(samples: Sequence[Sample]) -> Tensor | None:
    targets = [sample.target for sample in samples]
    missing = sum(target is None for target in targets)
    if missing == len(targets):
        return None
    if missing:
        raise ValueError(f"samples must all have a target, or none, got {missing} of {len(targets)} without")
    return torch.stack([torch.as_tensor(target) for target in targets])
