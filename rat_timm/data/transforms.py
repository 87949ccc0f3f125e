"""Geometric transforms of image, mask and spacing together: torchvision's for images, MONAI's for volumes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..optional import need
from .samples import Sample, check_sample
from .spacing import Spacing
from .volumes import to_metatensor

Transform = Callable[[Sample], Sample]


def training_transform(size: Sequence[int], scale: tuple[float, float] = (0.35, 1.0), flip: bool = True) -> Transform:
    """Returns a random crop, of a share of the image within ``scale``, resized to ``size``, and flips along all axes.

    The spacing becomes that of the resized crop, so that a network given the spacing sees the same physical sizes.
    Images come as float32, their numbers as they are. Chance is PyTorch's: seeding PyTorch repeats a transform.

    Args:
        size: Pixels along each axis: two for images, three for volumes.
        scale: Least and largest share of the image's area, or the volume's, that is kept.
        flip: Whether to flip.

    Raises:
        ValueError: If sizes or shares are not allowed.
    """
    axes = _check_size(size)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two shares between 0 and 1, the lesser first, got {scale}")
    if axes == 2:
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
        return _Images(v2.Compose([v2.RandomResizedCrop(list(size), scale, antialias=True), *flips]))
    return _Volumes(size, (scale[0] ** (1 / axes), scale[1] ** (1 / axes)), flip)


def evaluation_transform(size: Sequence[int]) -> Transform:
    """Returns a resize of the whole image, or volume, to ``size``, which changes the spacing; to float32 too."""
    return _Images(v2.Resize(list(size), antialias=True)) if _check_size(size) == 2 else _Volumes(size)


def _check_size(size: Sequence[int]) -> int:
    if len(size) not in (2, 3) or any(n < 1 for n in size):
        raise ValueError(f"size must be two or three positive numbers of pixels, got {tuple(size)}")
    return len(size)


class _Images:
    """Any transform of torchvision, on samples."""

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, 2)
        mask = None if sample.mask is None else tv_tensors.Mask(sample.mask)
        spacing = Spacing(sample.spacing, canvas_size=sample.image.shape[-2:])
        image, spacing, mask = self.transform(tv_tensors.Image(sample.image.float()), spacing, mask)
        plain = None if mask is None else mask.as_subclass(Tensor)
        return Sample(
            image.as_subclass(Tensor), spacing.as_subclass(Tensor).to(sample.spacing.dtype), plain, sample.target
        )


class _Volumes:
    """A crop of a share between ``shares`` of each axis, if they are given, a resize, and flips: MONAI's."""

    def __init__(self, size: Sequence[int], shares: tuple[float, float] | None = None, flip: bool = False) -> None:
        t = need("monai.transforms", "data")
        keys, modes, smooth = ("image", "mask"), ("trilinear", "nearest"), (True, False)
        crop = shares and t.RandScaleCropd(keys, *shares, random_size=True, allow_missing_keys=True)
        resize = t.Resized(keys, size, mode=modes, anti_aliasing=smooth, allow_missing_keys=True)
        flips = [t.RandFlipd(keys, 0.5, axis, allow_missing_keys=True) for axis in range(len(size))]
        self.transform = t.Compose([*([crop] if crop else []), resize, *(flips if flip else [])])

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, 3)
        self.transform.set_random_state(int(torch.randint(2**31, ())))
        parts = {"image": sample.image} if sample.mask is None else {"image": sample.image, "mask": sample.mask[None]}
        done = self.transform({key: to_metatensor(part.float(), sample.spacing) for key, part in parts.items()})
        spacing = torch.as_tensor(done["image"].pixdim, dtype=sample.spacing.dtype)
        mask = None if sample.mask is None else done["mask"].as_tensor()[0] > 0.5
        return Sample(done["image"].as_tensor(), spacing, mask, sample.target)
