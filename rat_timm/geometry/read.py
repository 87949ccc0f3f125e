"""What a user hands to a model, checked and turned into a `Pyramid` of images on their grids."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from .context import Told
from .grid import Pyramid, Tokens, channels_last, fixed, pyramid_grids, spacing_numbers
from .resample import resample, spacing_rows, stack


@register_notrace_function
def read_images(
    x: Tensor | Sequence[Tensor],
    told: Told,
    reference: tuple[float, ...],
    in_chans: int,
    min_size: tuple[int, ...],
) -> Pyramid:
    """Checks images and what is said about them, before any work is done.

    Args:
        x: An image ``[B, C, *size]``, or a pyramid: a list of them.
        told: What is said about them; masks may have another type than bool, with zeros and ones only.
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
    sizes = [tuple(fixed(n) for n in image.shape[2:]) for image in images]
    masks = _read_masks(told.mask, images, single)
    grids = pyramid_grids(
        sizes, told.spacing, told.origin, reference=reference, batch_size=images[0].shape[0], device=images[0].device
    )
    levels = [Tokens(channels_last(image), grid, m) for image, grid, m in zip(images, grids, masks, strict=True)]
    return Pyramid(levels, None, single)


class Part(NamedTuple):
    """Samples of a batch whose images have one size.

    Attributes:
        rows: Their indices in the batch; None for all of it.
        images: These samples.
    """

    rows: list[int] | None
    images: Pyramid


def parts_at_reference(images: Pyramid, spacing: Any, reference: tuple[float, ...]) -> list[Part]:
    """Resamples a pyramid, so that its first level has the reference spacing and the others keep theirs relative to it.

    Samples whose images come out in sizes of their own are parts of their own: side by side in one tensor, all but the
    largest would have to be filled up, and windows at their true border would reach into the fill.

    Args:
        images: The images on their grids.
        spacing: What the user said of it, for its numbers: see `rat_timm.geometry.grid.spacing_numbers`.
        reference: The model's reference spacing.

    Raises:
        ValueError: If a spacing is a tensor and the model is compiled, or an image would become too large.
    """
    numbers = spacing_numbers([tokens.grid.shape for tokens in images.levels], spacing, reference)
    rows = [
        spacing_rows(tokens.grid) if known is None else [known]
        for tokens, known in zip(images.levels, numbers, strict=True)
    ]
    if not all(rows):
        return [Part(None, images)]  # an empty batch, with a spacing for each of its no samples
    count = max(map(len, rows))
    if count == 1:
        return [Part(None, _resample(images, [row[0] for row in rows], reference))]
    members: dict[tuple, list[int]] = {}  # by the spacings of all levels
    for index, spacings in enumerate(zip(*(row * (count // len(row)) for row in rows), strict=True)):
        members.setdefault(spacings, []).append(index)
    if len(members) == 1:
        return [Part(None, _resample(images, next(iter(members)), reference))]
    return _by_shape([Part(i, _resample(_select(images, i), known, reference)) for known, i in members.items()])


def _by_shape(parts: Sequence[Part]) -> list[Part]:
    """Puts parts side by side whose levels have the same shapes; their spacings may differ."""
    alike: dict[tuple, list[Part]] = {}
    for part in parts:
        alike.setdefault(tuple(tokens.grid.shape for tokens in part.images.levels), []).append(part)
    if len(alike) == 1:
        return [Part(None, join_parts([part.images for part in parts], [part.rows or [] for part in parts]))]
    return [
        Part([row for part in same for row in part.rows or []], _side_by_side([part.images for part in same]))
        for same in alike.values()
    ]


@register_notrace_function
def to_reference(images: Pyramid, spacing: Any, reference: tuple[float, ...]) -> Pyramid:
    """Does what `parts_at_reference` does in graphs, which are of one part.

    Raises:
        ValueError: If there are several.
    """
    parts = parts_at_reference(images, spacing, reference)
    if len(parts) > 1:
        raise ValueError("spacing must be the same for all samples where the model is a graph and its stem physical")
    return parts[0].images


def _select(images: Pyramid, rows: Sequence[int]) -> Pyramid:
    index = torch.tensor(rows, device=images.levels[0].x.device)
    return images._replace(levels=[_select_rows(tokens, index) for tokens in images.levels])


def _select_rows(tokens: Tokens, index: Tensor) -> Tokens:
    grid = tokens.grid
    spacing, origin = (r if len(r) == 1 else r.index_select(0, index) for r in (grid.spacing, grid.origin))
    mask = None if tokens.mask is None else tokens.mask.index_select(0, index)
    return Tokens(tokens.x.index_select(0, index), grid._replace(spacing=spacing, origin=origin), mask)


def _resample(images: Pyramid, spacings: Sequence[tuple[float, ...]], reference: tuple[float, ...]) -> Pyramid:
    """Resamples images whose levels have the ``spacings``."""
    levels = []
    for tokens, known in zip(images.levels, spacings, strict=True):
        wanted = [r * s / base for r, s, base in zip(reference, known, spacings[0], strict=True)]
        levels.append(resample(tokens, wanted, known))
    return images._replace(levels=levels)


def join_parts(pyramids: Sequence[Pyramid], rows: Sequence[Sequence[int]]) -> Pyramid:
    """Puts parts of a batch side by side again, in the batch's order; what is smaller is filled up and masked.

    Args:
        pyramids: What a model made of each part.
        rows: The indices of its samples in the batch.
    """
    order = torch.tensor([row for part in rows for row in part], device=pyramids[0].levels[0].x.device).argsort()
    joined = _side_by_side(pyramids)
    prefix = None if joined.prefix is None else joined.prefix.index_select(0, order)
    return joined._replace(levels=[_select_rows(tokens, order) for tokens in joined.levels], prefix=prefix)


def _side_by_side(pyramids: Sequence[Pyramid]) -> Pyramid:
    levels = [stack(parts) for parts in zip(*(pyramid.levels for pyramid in pyramids), strict=True)]
    prefixes = [pyramid.prefix for pyramid in pyramids if pyramid.prefix is not None]
    return Pyramid(levels, torch.cat(prefixes) if prefixes else None, pyramids[0].single)


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
    elif isinstance(mask, (list, tuple)):
        masks = list(mask)
    else:
        raise ValueError(f"mask must be a tensor, or a list with one per level, got {mask!r}")
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
