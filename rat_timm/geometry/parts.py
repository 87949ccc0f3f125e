"""Batches whose samples have several pixel sizes: brought to the reference spacing, in parts of one size each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from .grid import Pyramid, Tokens
from .resample import resample, spacing_rows, stack


class Part(NamedTuple):
    """Samples of a batch whose images have one size.

    Attributes:
        rows: Their indices in the batch; None for all of it.
        images: These samples.
    """

    rows: list[int] | None
    images: Pyramid


Ratios = Sequence[tuple[float, ...]]
"""Pixel sizes of levels over the finest one's, per axis."""


def parts_at_reference(images: Pyramid, reference: tuple[float, ...], level_ratios: Ratios = ()) -> list[Part]:
    """Resamples a pyramid: its finest level gets the reference spacing, and the others keep theirs relative to it.

    Finest is meant axis by axis, whatever the order of the levels.

    Samples whose images come out in sizes of their own are parts of their own: side by side in one tensor, all but the
    largest would have to be filled up, and windows at their true border would reach into the fill.

    Args:
        images: The images on their grids.
        reference: The model's reference spacing.
        level_ratios: Those that levels are brought to, each to the nearest in proportion; without any they keep theirs.

    Raises:
        ValueError: If a spacing is a tensor and the model is compiled, or an image would become too large.
    """
    rows = [spacing_rows(tokens.grid) for tokens in images.levels]
    if not all(rows):
        return [Part(None, images)]  # an empty batch, with a spacing for each of its no samples
    count = max(map(len, rows))
    if count == 1:
        return [Part(None, _resample(images, _wanted([row[0] for row in rows], reference, level_ratios)))]
    members: dict[tuple, list[int]] = {}  # by the spacings of all levels
    for index, spacings in enumerate(zip(*(row * (count // len(row)) for row in rows), strict=True)):
        members.setdefault(spacings, []).append(index)
    wanted = {spacings: _wanted(spacings, reference, level_ratios) for spacings in members}
    if len(members) == 1:
        return [Part(None, _resample(images, *wanted.values()))]
    return _by_shape([Part(i, _resample(select_rows(images, i), wanted[own])) for own, i in members.items()])


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
def to_reference(images: Pyramid, reference: tuple[float, ...], level_ratios: Ratios = ()) -> Pyramid:
    """Does what `parts_at_reference` does in graphs, which are of one part.

    Raises:
        ValueError: If there are several.
    """
    parts = parts_at_reference(images, reference, level_ratios)
    if len(parts) > 1:
        raise ValueError("spacing must be the same for all samples where the model is a graph and its stem physical")
    return parts[0].images


def select_rows(images: Pyramid, rows: Sequence[int] | None) -> Pyramid:
    """Returns some samples of a batch; None for all of them."""
    if rows is None:
        return images
    index = torch.tensor(rows, device=images.levels[0].x.device)
    return images._replace(levels=[_select_rows(tokens, index) for tokens in images.levels])


def _select_rows(tokens: Tokens, index: Tensor) -> Tokens:
    grid = tokens.grid
    spacing, origin = (r if len(r) == 1 else r.index_select(0, index) for r in (grid.spacing, grid.origin))
    mask = None if tokens.mask is None else tokens.mask.index_select(0, index)
    return Tokens(tokens.x.index_select(0, index), grid._replace(spacing=spacing, origin=origin), mask)


def _wanted(
    spacings: Sequence[tuple[float, ...]], reference: tuple[float, ...], level_ratios: Ratios
) -> list[tuple[float, ...]]:
    """Returns the pixel size that each level is brought to."""
    finest = [min(axis) for axis in zip(*spacings, strict=True)]
    ratios = [tuple(step / base for step, base in zip(own, finest, strict=True)) for own in spacings]
    if level_ratios:
        ratios = [min(level_ratios, key=lambda other: _distance(own, other)) for own in ratios]
    return [tuple(r * by for r, by in zip(reference, own, strict=True)) for own in ratios]


def _distance(ratio: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(ratio, other, strict=True))


def _resample(images: Pyramid, spacings: Sequence[tuple[float, ...]]) -> Pyramid:
    """Brings each level to a pixel size."""
    levels = [resample(tokens, spacing) for tokens, spacing in zip(images.levels, spacings, strict=True)]
    return images._replace(levels=levels)


def join_parts(pyramids: Sequence[Pyramid], rows: Sequence[Sequence[int]]) -> Pyramid:
    """Puts parts of a batch side by side again, in the batch's order; what is smaller is filled up and masked.

    Args:
        pyramids: What a model made of each part.
        rows: The indices of its samples in the batch. Of a single part, which is the batch, no use is made.
    """
    if len(pyramids) == 1:
        return pyramids[0]
    order = torch.tensor([row for part in rows for row in part], device=pyramids[0].levels[0].x.device).argsort()
    joined = _side_by_side(pyramids)
    prefix = None if joined.prefix is None else joined.prefix.index_select(0, order)
    return joined._replace(levels=[_select_rows(tokens, order) for tokens in joined.levels], prefix=prefix)


def _side_by_side(pyramids: Sequence[Pyramid]) -> Pyramid:
    levels = [stack(parts) for parts in zip(*(pyramid.levels for pyramid in pyramids), strict=True)]
    prefixes = [pyramid.prefix for pyramid in pyramids if pyramid.prefix is not None]
    return Pyramid(levels, torch.cat(prefixes) if prefixes else None, pyramids[0].single)
