"""Patches of a plain transformer: whole ones at any image size, and of one physical size at any pixel size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.grid import Tokens, channels_first, channels_last
from ...geometry.resample import resample, resample_limit, spacing_rows
from ...ops.masking import pool_mask

_CONVS = {2: F.conv2d, 3: F.conv3d}
_NUMBERS_PER_PIXEL = 16  # a kernel may be as large as features of an image of the limit's size


def patchify(tokens: Tokens, weight: Tensor, bias: Tensor | None) -> Tokens:
    """Turns pixels ``[B, *size, C]`` into one token per patch, ``[B, *ceil(size / patch), dim]``.

    Images are padded with zeros to whole patches. A patch is valid if any of its pixels is.

    Args:
        tokens: An image on its grid.
        weight: ``[dim, C, *patch]``.
        bias: ``[dim]`` or None.
    """
    patch = tuple(weight.shape[2:])
    size = tuple(n + -n % p for n, p in zip(tokens.grid.shape, patch, strict=True))
    x = _pad(channels_first(tokens.filled()), size)
    grid = tokens.grid._replace(shape=size).conv(patch, patch, [0] * len(patch))
    mask = None if tokens.mask is None else pool_mask(tokens.mask, patch)
    conv = _CONVS[len(patch)]
    return Tokens(channels_last(conv(x, weight.to(x.dtype), bias, stride=patch)), grid, mask)


def resample_kernel(weight: Tensor, size: Sequence[int]) -> Tensor:
    """Resamples a patch kernel, so that it gives for an enlarged patch what it gave for the patch.

    The pseudo-inverse of bicubic interpolation (FlexiViT, arXiv 2212.08013), which is separable: axis by axis. In 2D
    what timm's ``resample_patch_embed`` gives.

    Args:
        weight: ``[dim, C, *patch]``.
        size: The new size per axis.
    """
    out = weight.float()
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old != new:
            inverse = torch.linalg.pinv(_resize_matrix(old, new, weight.device))  # [old, new]
            out = (out.movedim(axis, -1) @ inverse).movedim(-1, axis)
    return out.to(weight.dtype)


def _resize_matrix(old: int, new: int, device: torch.device) -> Tensor:
    # along the last axis: with a last axis of one PyTorch 2.15 interpolates nothing but the first entry
    basis = torch.eye(old, device=device).reshape(1, old, 1, old)
    return F.interpolate(basis, size=(1, new), mode="bicubic", antialias=True).reshape(old, new).T


def physical_patchify(
    tokens: Tokens,
    weight: Tensor,
    bias: Tensor | None,
    reference: Sequence[float],
) -> Tokens:
    """As `patchify`, with patches that are as large as they are at the reference spacing, whatever the spacing is.

    The kernel is resampled to the whole number of pixels that comes nearest; where that is not exact, the image is
    interpolated (linearly) to the pixel size at which it is.

    Args:
        tokens: An image on its grid, with one spacing for the batch.
        weight: ``[dim, C, *patch]``, for the reference spacing.
        bias: ``[dim]`` or None.
        reference: The reference spacing per axis.

    Raises:
        ValueError: If samples have different spacings: they would have different numbers of patches. If a spacing, in
            a wrong unit say, asks for an image or a kernel beyond `rat_timm.resample_limit`.
    """
    spacing = _read_spacing(tokens, tuple(reference))
    length = [p * r for p, r in zip(weight.shape[2:], reference, strict=True)]
    size = [max(1, round(whole / s)) for whole, s in zip(length, spacing, strict=True)]
    _check_kernel(weight.shape, size)
    fitting = [whole / n for n, whole in zip(size, length, strict=True)]
    return patchify(resample(tokens, fitting), resample_kernel(weight, size), bias)


def _check_kernel(shape: Sequence[int], size: Sequence[int]) -> None:
    numbers, limit = math.prod((*shape[:2], *size)), _NUMBERS_PER_PIXEL * resample_limit()
    if numbers > limit:
        pixels = " x ".join(map(str, size))
        raise ValueError(
            f"spacing would make patches of {pixels} pixels, a kernel of {numbers} numbers, more than the limit of "
            f"{limit}: is its unit the model's? rat_timm.set_resample_limit raises the limit"
        )


def _read_spacing(tokens: Tokens, reference: tuple[float, ...]) -> tuple[float, ...]:
    rows = spacing_rows(tokens.grid) or [reference]  # an empty batch has no rows
    if len(set(rows)) > 1:
        raise ValueError(
            "spacing must be the same for all samples where patches are physical, since it decides how many patches "
            f"there are; got {rows}"
        )
    return rows[0]


def _pad(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pads the last axes of ``x`` with zeros to ``size``."""
    ends = [m - n for n, m in zip(x.shape[-len(size) :], size, strict=True)]
    return F.pad(x, [end for n in reversed(ends) for end in (0, n)])
