"""What a user says of images, read once: checked, and turned into a `Pyramid` of images on their grids.

It is said to a model, or around it by the context `geometry`, for wrappers that drop keywords.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from .grid import Grid, Pyramid, Tokens, fixed, pyramid_grids
from .types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike


class Told(NamedTuple):
    """What a user says of images; None where nothing is said.

    Attributes:
        spacing: Physical pixel size in array-axis order (z, y, x); `rat_timm.geometry.grid.pyramid_grids` says in
            which forms.
        mask: ``[B, *size]``, True = valid, or one per level of a pyramid.
        origin: Physical position of the first pixel's centre, in the forms of ``spacing``.
    """

    spacing: SpacingLike = None
    mask: MaskLike = None
    origin: OriginLike = None

    def completed(self, other: "Told") -> "Told":
        """Returns this, and what ``other`` says where this says nothing."""
        return Told(
            other.spacing if self.spacing is None else self.spacing,
            other.mask if self.mask is None else self.mask,
            other.origin if self.origin is None else self.origin,
        )


class _Innermost(threading.local):
    """What a thread's innermost context tells.

    PyTorch 2.11 does not compile what reads a `ContextVar`, and a default of the class hides what an instance has.
    """

    def __init__(self) -> None:
        self.told: Told | None = None


_INNERMOST = _Innermost()


@contextlib.contextmanager
def geometry(*, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None) -> Iterator[None]:
    """Tells every model of this package that runs inside it what is known of its images.

    For what wraps a backbone and takes the image alone (segmentation_models_pytorch, torchvision's and transformers'
    detectors, MONAI's FlexibleUNet):

        unet = smp.Unet("tu-rat_tiny", encoder_weights=None)
        with rat_timm.geometry(spacing=0.5, mask=mask):
            logits = unet(image)

    A model's own arguments come first. Contexts nest: what an inner one does not say, the outer one does. Each thread
    has its own, so that ``nn.DataParallel``, which starts threads, does not hand it on; nor does a backward pass that
    computes the whole model again (``torch.utils.checkpoint`` around it; ``set_grad_checkpointing`` is safe).

    Args:
        spacing: Physical pixel size in array-axis order (z, y, x), in any form that the models take.
        mask: ``[B, *size]``, True = valid, or one per level of a pyramid.
        origin: Physical position of the first pixel's centre, in the forms of ``spacing``.

    Raises:
        ValueError: By the model, if what is said does not fit the images that it is given.
    """
    outer = _INNERMOST.told
    told = Told(spacing, mask, origin)
    _INNERMOST.told = told if outer is None else told.completed(outer)
    try:
        yield
    finally:
        _INNERMOST.told = outer


def what_is_told(
    x: ImageOrPyramid, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
) -> Told:
    """Returns a model's arguments, completed by the context.

    Args:
        x: The images, which are not looked at: with them a call is one of the images, which tracers keep.
        spacing: See `Told`.
        mask: See `Told`.
        origin: See `Told`.
    """
    around = _INNERMOST.told
    told = Told(spacing, mask, origin)
    return told if around is None else told.completed(around)


@register_notrace_function
def read_images(
    x: ImageOrPyramid,
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
        _check_image(image, "x" if single else f"level {level}: x", in_chans, min_size)
        if image.shape[0] != images[0].shape[0]:
            raise ValueError(
                f"level {level}: x must have level 0's batch size {images[0].shape[0]}, got {image.shape[0]}"
            )
    is_constant = not is_traced() and _is_constant(told.spacing) and _is_constant(told.origin)
    grids = _read_grids(images, told, reference, is_constant)
    masks = [None] * len(images) if told.mask is None else _read_masks(told.mask, images, single)
    levels = [Tokens(image.movedim(1, -1), grid, m) for image, grid, m in zip(images, grids, masks, strict=True)]
    return Pyramid(levels, None, single, is_constant)


def is_traced() -> bool:
    """Tells whether tensors made here and now stand for others: those of a compiler, a fake mode, `torch.func`."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(torch.empty(0)) is not Tensor:
        return True
    return torch._C._are_functorch_transforms_active()


def _read_grids(
    images: Sequence[Tensor], told: Told, reference: tuple[float, ...], is_constant: bool
) -> Sequence[Grid]:
    """Makes the levels' grids; those of numbers alone are kept, since images of one kind come again and again."""
    if not is_constant:
        fixed_sizes = [tuple(fixed(n) for n in image.shape[2:]) for image in images]
        batch_size, device = images[0].shape[0], images[0].device
        return pyramid_grids(
            fixed_sizes, told.spacing, told.origin, reference=reference, batch_size=batch_size, device=device
        )
    sizes = tuple([tuple(image.shape[2:]) for image in images])
    spacing, origin = _frozen(told.spacing), _frozen(told.origin)
    return _constant_grids(sizes, spacing, origin, reference, len(images[0]), images[0].device)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _is_constant(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_constant, value))
    return value is None or isinstance(value, Real)


@functools.lru_cache(maxsize=256)
def _constant_grids(
    sizes: tuple[tuple[int, ...], ...],
    spacing: Any,
    origin: Any,
    reference: tuple[float, ...],
    batch_size: int,
    device: torch.device,
) -> tuple[Grid, ...]:
    with torch.inference_mode(False):  # what is kept serves training too
        grids = pyramid_grids(sizes, spacing, origin, reference=reference, batch_size=batch_size, device=device)
        return tuple(grids)


def _check_image(image: Tensor, name: str, in_chans: int, min_size: tuple[int, ...]) -> None:
    axes = len(min_size)
    if not isinstance(image, Tensor) or image.ndim != axes + 2:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"{name} must be [B, C, *size] with {axes} spatial axes, got {got}")
    if image.shape[1] != in_chans:
        raise ValueError(f"{name} must have {in_chans} channels (in_chans), got {image.shape[1]}")
    for length, least in zip(image.shape[2:], min_size, strict=True):
        if length < least:
            size = tuple(image.shape[2:])
            raise ValueError(f"{name} must be at least {min_size} pixels (the stem's stride), got {size}")


def _read_masks(mask: MaskLike, images: list[Tensor], single: bool) -> list[Tensor | None]:
    if isinstance(mask, Tensor):
        if not single and len(images) > 1:
            raise ValueError(f"mask must be a list with one entry per level ({len(images)}), got a tensor")
        masks: list[Tensor | None] = [mask]
    elif isinstance(mask, (list, tuple)):
        masks = list(mask)
    else:
        raise ValueError(f"mask must be a tensor, or a list with one per level, got {mask!r}")
    if len(masks) != len(images):
        raise ValueError(f"mask must have one entry per level ({len(images)}), got {len(masks)}")
    names = ["mask"] if single else [f"level {level}: mask" for level in range(len(images))]
    return [
        None if m is None else _read_mask(m, name, image) for m, name, image in zip(masks, names, images, strict=True)
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
