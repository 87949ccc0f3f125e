"""What a user hands to a model, checked and turned into a `Pyramid` of images on their grids."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from ..grid import Pyramid, Tokens, channels_last, pyramid_grids, spacing_numbers
from ..layers.resample import resample, spacing_rows


@register_notrace_function
def read_images(
    x: Tensor | Sequence[Tensor],
    spacing: Any,
    mask: Any,
    origin: Any,
    reference: tuple[float, ...],
    in_chans: int,
    min_size: tuple[int, ...],
) -> Pyramid:
    """Checks images and what is said about them, before any work is done.

    Args:
        x: An image ``[B, C, *size]``, or a pyramid: a list of them.
        spacing: See `rat_timm.grid.pyramid_grids`.
        mask: ``[B, *size]``, True = valid, per image or level; bool, or another type with zeros and ones only.
        origin: See `rat_timm.grid.pyramid_grids`.
        reference: The model's reference spacing.
        in_chans: The model's number of channels.
        min_size: The smallest size per axis.

    Returns:
        The images, channels last, on their grids.

    Raises:
        ValueError: If anything does not fit; the message names the argument, and the level in a pyramid.
    """
    single = isinstance(x, Tensor)
    if not isinstance(x, (Tensor, list, tuple)):
        raise ValueError(f"x must be an image or a list of images, got {type(x).__name__}")
    images = [x] if isinstance(x, Tensor) else list(x)
    if not images:
        raise ValueError("x is an empty list of images")
    for level, image in enumerate(images):
        _check_image(image, _name("x", level, single), in_chans, min_size)
        if image.shape[0] != images[0].shape[0]:
            raise ValueError(
                f"level {level}: x must have level 0's batch size {images[0].shape[0]}, got {image.shape[0]}"
            )
    sizes = [tuple(image.shape[2:]) for image in images]
    masks = _read_masks(mask, images, single)
    grids = pyramid_grids(
        sizes, spacing, origin, reference=reference, batch_size=images[0].shape[0], device=images[0].device
    )
    levels = [Tokens(channels_last(image), grid, m) for image, grid, m in zip(images, grids, masks, strict=True)]
    return Pyramid(levels, None, single)


@register_notrace_function
def to_reference(images: Pyramid, spacing: Any, reference: tuple[float, ...]) -> Pyramid:
    """Resamples a pyramid, so that its first level has the reference spacing and the others keep theirs relative to it.

    Args:
        images: The images on their grids.
        spacing: What the user said of it, for its numbers: see `rat_timm.grid.spacing_numbers`.
        reference: The model's reference spacing.

    Raises:
        ValueError: If a spacing is a tensor and the model is compiled, or samples differ in how the levels' spacings
            are related.
    """
    numbers = spacing_numbers([tokens.grid.shape for tokens in images.levels], spacing, reference)
    first, levels = None, []
    for tokens, known in zip(images.levels, numbers, strict=True):
        rows = spacing_rows(tokens.grid) if known is None else [known]
        first = rows if first is None else first
        if not rows:
            return images  # of an empty batch, with a spacing for each of its no samples
        levels.append(resample(tokens, _relative_to(first, rows, reference), known))
    return images._replace(levels=levels)


def _relative_to(first: list, rows: list, reference: tuple[float, ...]) -> list[float]:
    """Returns the spacing of a level where that of the first level is the reference, the same for all samples."""
    count = max(len(first), len(rows))
    pairs = zip(first * (count // len(first)), rows * (count // len(rows)), strict=True)
    wanted = [[r * s / base for r, s, base in zip(reference, row, level0, strict=True)] for level0, row in pairs]
    if any(not math.isclose(a, b, rel_tol=1e-5) for row in wanted for a, b in zip(row, wanted[0], strict=True)):
        raise ValueError(
            "spacing must be related to level 0's alike in all samples where the stem is physical, "
            f"got {rows} beside {first}"
        )
    return wanted[0]


def _name(name: str, level: int, single: bool) -> str:
    return name if single else f"level {level}: {name}"


def _check_image(image: Tensor, name: str, in_chans: int, min_size: tuple[int, ...]) -> None:
    axes = len(min_size)
    if not isinstance(image, Tensor) or image.ndim != axes + 2:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} must be [B, C, *size] with {axes} spatial axes, got {got}")
    if image.shape[1] != in_chans:
        raise ValueError(f"{name} must have {in_chans} channels (in_chans), got {image.shape[1]}")
    if any(n < least for n, least in zip(image.shape[2:], min_size, strict=True)):
        raise ValueError(f"{name} must be at least {min_size} pixels (the stem's stride), got {tuple(image.shape[2:])}")


def _read_masks(mask: Any, images: list[Tensor], single: bool) -> list[Tensor | None]:
    if mask is None:
        return [None] * len(images)
    if isinstance(mask, Tensor):
        if not single and len(images) > 1:
            raise ValueError(f"mask must be a list with one entry per level ({len(images)}), got a tensor")
        masks = [mask]
    else:
        masks = list(mask)
    if len(masks) != len(images):
        raise ValueError(f"mask must have one entry per level ({len(images)}), got {len(masks)}")
    return [
        None if m is None else _read_mask(m, _name("mask", level, single), image)
        for level, (m, image) in enumerate(zip(masks, images, strict=True))
    ]


def _read_mask(mask: Tensor, name: str, image: Tensor) -> Tensor:
    shape = (image.shape[0], *image.shape[2:])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be [B, *size] = {list(shape)}, got {got}")
    if mask.dtype != torch.bool:
        if torch.compiler.is_compiling():
            raise ValueError(f"{name} must be bool where the model is compiled, got {mask.dtype}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                f"{name} must be bool, True = valid, or hold only 0 and 1, got {mask.dtype} of other values"
            )
    return mask.to(device=image.device, dtype=torch.bool)
