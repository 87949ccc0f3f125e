"""What is known of images' geometry, said around a model instead of to it: for wrappers that drop keywords."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple


class Told(NamedTuple):
    """What a user says of images; None where nothing is said.

    Attributes:
        spacing: Physical pixel size in array-axis order (z, y, x); `rat_timm.geometry.grid.pyramid_grids` says in
            which forms.
        mask: ``[B, *size]``, True = valid, or one per level of a pyramid.
        origin: Physical position of the first pixel's centre, in the forms of ``spacing``.
    """

    spacing: Any = None
    mask: Any = None
    origin: Any = None

    def completed(self, other: "Told") -> "Told":
        """Returns this, and what ``other`` says where this says nothing."""
        return Told(*(b if a is None else a for a, b in zip(self, other, strict=True)))


_TOLD: ContextVar[Told] = ContextVar("rat_timm.geometry", default=Told())  # noqa: B039 (immutable)


@contextlib.contextmanager
def geometry(*, spacing: Any = None, mask: Any = None, origin: Any = None) -> Iterator[None]:
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
    token = _TOLD.set(Told(spacing, mask, origin).completed(_TOLD.get()))
    try:
        yield
    finally:
        _TOLD.reset(token)


def what_is_told(x: Any, spacing: Any = None, mask: Any = None, origin: Any = None) -> Told:
    """Returns a model's arguments, completed by the context.

    Args:
        x: The images, which are not looked at: with them a call is one of the images, which tracers keep.
        spacing: See `Told`.
        mask: See `Told`.
        origin: See `Told`.
    """
    return Told(spacing, mask, origin).completed(_TOLD.get())
