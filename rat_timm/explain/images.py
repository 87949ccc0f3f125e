"""Images as explanations see them: backbones, and maps brought to the images' pixels."""

from torch import Tensor, nn

from ..dense import Segmenter
from ..geometry.grid import Grid, Pyramid, Tokens, fill
from ..geometry.read import read_images, what_is_told
from ..geometry.sample import sample_at
from ..geometry.types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike
from ..models import RatVit, ResolutionAwareTransformer

_REACH = 1.0  # a token's cell may end up to one place beyond the last token's centre


def backbone_of(model: nn.Module) -> ResolutionAwareTransformer | RatVit:
    """Returns the backbone of a segmenter, or a backbone itself, which has to be in evaluation mode.

    Raises:
        ValueError: If it is none, or in training mode.
    """
    backbone = model.backbone if isinstance(model, Segmenter) else model
    if not isinstance(backbone, ResolutionAwareTransformer | RatVit):
        raise ValueError(f"model must be a RAT, a plain RAT or a Segmenter, got {type(model).__name__}")
    if backbone.training:
        raise ValueError("model must be in evaluation mode: call model.eval()")
    return backbone


def read(
    backbone: ResolutionAwareTransformer | RatVit,
    x: ImageOrPyramid,
    spacing: SpacingLike,
    mask: MaskLike,
    origin: OriginLike = None,
) -> Pyramid:
    """Reads images as the model does: each level's pixels on their grid, with their mask."""
    told = what_is_told(x, spacing, mask, origin)
    return read_images(x, told, backbone.reference_spacing, backbone.in_chans, (1,) * backbone.spatial_dims)


def at_pixels(values: Tensor, grid: Grid, mask: Tensor | None, image: Tokens) -> Tensor:
    """Samples a map at an image's pixels, linearly between its places.

    Args:
        values: ``[B, *grid, C]``.
        grid: Where its places are.
        mask: ``[B, *grid]``, True = valid; None if all are.
        image: The image.

    Returns:
        ``[B, *size, C]``, zero at masked pixels.
    """
    return fill(sample_at(Tokens(values, grid, mask), image.grid, _REACH).x, image.mask)
