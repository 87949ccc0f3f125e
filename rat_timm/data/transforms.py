"""Geometric transforms of image, mask, target and spacing together: torchvision's for images, MONAI's for volumes.

A target that is a map (see `Sample`) is transformed with the image: whole numbers and bool, which are labels, by the
nearest pixel, floating-point numbers as images are. (A map of directions is not turned.) In 2D, a dict of torchvision's
detectors is, too: ``boxes`` ``[N, 4]`` (plain ones are x1, y1, x2, y2, in pixels) and, where there are, ``labels``
``[N]`` and ``masks`` ``[N, *grid]``; objects of which less than a pixel is left are dropped. A target of one axis or
none, such as the index of a class, is of the whole and stays. Any other is an error: nothing says its meaning.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..optional import import_optional
from .resolution import check_variation, draw_factor, with_noise
from .samples import Objects, Sample, Target, Transform, check_sample, is_map
from .spacing import Spacing
from .targets import check_target, from_corners, from_planes, to_corners, to_planes
from .volumes import to_metatensor

_Parts: TypeAlias = Sequence[Any]  # image, spacing and mask (or None), as kinds of torchvision's tensors


def training_transform(
    size: Sequence[int],
    scale: tuple[float, float] = (0.35, 1.0),
    flip: bool = True,
    factors: tuple[float, float] | None = None,
    noise: float | None = None,
    p: float = 1.0,
) -> Transform:
    """Returns a random crop, of a share of the image within ``scale``, resized to ``size``, and flips along all axes.

    The spacing becomes that of the resized crop, so that a network given the spacing sees the same physical sizes.
    Maps and boxes in the target are transformed too (see `rat_timm.data.transforms`). Images come as float32, their
    numbers as they are. Chance is PyTorch's: seeding PyTorch repeats a transform.

    Args:
        size: Pixels along each axis: two for images, three for volumes.
        scale: Least and largest share of the image's area, or the volume's, that is kept.
        flip: Whether to flip.
        factors: Least and largest factor of the pixel size, drawn log-uniformly: crops are resized to ``size`` divided
            by it, and have the noise of such pixels (see `rat_timm.data.resolution`). Samples then differ in size,
            which `collate` fills up. Default: all have ``size``, and no noise is added.
        noise: With ``factors``, see `rat_timm.data.resolution_transform`.
        p: With ``factors``, probability that a sample has another pixel size than that of ``size``.

    Raises:
        ValueError: If sizes, shares, factors, noise or probability are not allowed.
    """
    _check_size(size)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two shares between 0 and 1, the lesser first, got {scale}")
    if factors is not None:
        return _AtRandomSize(size, scale, flip, factors, noise, p)
    if noise is not None or p != 1:
        raise ValueError(f"noise and p go with factors, got {noise}, {p} and no factors")
    return _random_crop(size, scale, flip)


def _random_crop(size: Sequence[int], scale: tuple[float, float], flip: bool) -> Transform:
    axes = len(size)
    if axes == 2:
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()] if flip else []
        return _Images(v2.Compose([v2.RandomResizedCrop(list(size), scale, antialias=True), *flips]))
    return _Volumes(size, (scale[0] ** (1 / axes), scale[1] ** (1 / axes)), flip)


class _AtRandomSize:
    """`_random_crop` with a size that is drawn for each sample."""

    def __init__(
        self,
        size: Sequence[int],
        scale: tuple[float, float],
        flip: bool,
        factors: tuple[float, float],
        noise: float | None,
        p: float,
    ) -> None:
        check_variation(factors, noise, p)
        self.size, self.scale, self.flip, self.factors, self.noise, self.p = size, scale, flip, factors, noise, p

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, len(self.size))
        factor = draw_factor(self.factors, self.p)
        size = [max(1, round(n / factor)) for n in self.size]
        return with_noise(_random_crop(size, self.scale, self.flip), sample, self.noise)


def evaluation_transform(size: Sequence[int]) -> Transform:
    """Returns a resize of the whole image, or volume, to ``size``, which changes the spacing; to float32 too.

    Targets are resized as `training_transform` does.
    """
    return _Images(v2.Resize(list(size), antialias=True)) if _check_size(size) == 2 else _Volumes(size)


def _check_size(size: Sequence[int]) -> int:
    if len(size) not in (2, 3) or any(n < 1 for n in size):
        raise ValueError(f"size must be two or three positive numbers of pixels, got {tuple(size)}")
    return len(size)


class _Labels(tv_tensors.Mask):
    """A mask that is sampled at the centres of pixels: torchvision's are moved by up to half a pixel."""


def _sample_labels(map_: Callable, labels: _Labels, *args: Any, **kwargs: Any) -> _Labels:
    kwargs["interpolation"] = v2.InterpolationMode.NEAREST_EXACT
    return map_(tv_tensors.Image(labels.as_subclass(Tensor)), *args, **kwargs).as_subclass(_Labels)


for _map in (functional.resize, functional.resized_crop):
    functional.register_kernel(_map, _Labels)(functools.partial(_sample_labels, _map))


class _Images:
    """Any transform of torchvision, on samples."""

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, 2)
        grid = tuple(sample.image.shape[-2:])
        check_target(sample.target, grid)
        parts = (
            tv_tensors.Image(sample.image.float()),
            Spacing(sample.spacing, canvas_size=grid),
            None if sample.mask is None else _Labels(sample.mask[None]),
        )
        (image, spacing, mask), target = self._with_target(parts, sample.target, grid)
        plain = None if mask is None else mask.as_subclass(Tensor)[0]
        return Sample(image.as_subclass(Tensor), spacing.as_subclass(Tensor).to(sample.spacing.dtype), plain, target)

    def _with_target(self, parts: _Parts, target: Target, grid: tuple[int, ...]) -> tuple[_Parts, Target]:
        if isinstance(target, Mapping):
            return self._with_objects(parts, target, grid)
        return self._with_map(parts, target) if is_map(target, grid) else (self.transform(*parts), target)

    def _with_map(self, parts: _Parts, target: Target) -> tuple[_Parts, Tensor]:
        planes = to_planes(target, 2)
        kind = tv_tensors.Image if planes.labels is None else _Labels
        *parts, done = self.transform(*parts, kind(planes.values))
        return parts, from_planes(planes._replace(values=done.as_subclass(Tensor)), target, 2)

    def _with_objects(self, parts: _Parts, target: Objects, grid: tuple[int, ...]) -> tuple[_Parts, dict[str, Tensor]]:
        masks = {"masks": _Labels(target["masks"])} if "masks" in target else {}
        *parts, done = self.transform(*parts, {**to_corners(target, grid), **masks})
        return parts, from_corners(done, target)


class _Volumes:
    """A crop of a share between ``shares`` of each axis, if they are given, a resize, and flips: MONAI's."""

    KEYS = ("image", "mask", "labels", "numbers")  # the last two: targets

    def __init__(self, size: Sequence[int], shares: tuple[float, float] | None = None, flip: bool = False) -> None:
        t, keys = import_optional("monai.transforms", "data"), self.KEYS
        modes, smooth = ("trilinear", "nearest-exact", "nearest-exact", "trilinear"), (True, False, False, True)
        crop = shares and t.RandScaleCropd(keys, *shares, random_size=True, allow_missing_keys=True)
        resize = t.Resized(keys, size, mode=modes, anti_aliasing=smooth, allow_missing_keys=True)
        flips = [t.RandFlipd(keys, 0.5, axis, allow_missing_keys=True) for axis in range(len(size))]
        self.transform = t.Compose([*([crop] if crop else []), resize, *(flips if flip else [])])

    def __call__(self, sample: Sample) -> Sample:
        check_sample(sample, 3)
        grid, target = tuple(sample.image.shape[1:]), sample.target
        check_target(target, grid)
        planes = to_planes(target, 3) if is_map(target, grid) else None
        parts = {"image": sample.image.float()}
        if sample.mask is not None:
            parts["mask"] = sample.mask[None].float()
        if planes is not None:
            parts["numbers" if planes.labels is None else "labels"] = planes.values
        self.transform.set_random_state(int(torch.randint(2**31, ())))
        done = self.transform({name: to_metatensor(part, sample.spacing) for name, part in parts.items()})
        if planes is not None:
            moved = done["numbers" if planes.labels is None else "labels"].as_tensor()
            target = from_planes(planes._replace(values=moved), target, 3)
        spacing = torch.as_tensor(done["image"].pixdim, dtype=sample.spacing.dtype)
        mask = None if sample.mask is None else done["mask"].as_tensor()[0] > 0.5
        return Sample(done["image"].as_tensor(), spacing, mask, target)
