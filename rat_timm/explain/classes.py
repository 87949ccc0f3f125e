"""Which places speak for a class: class activation maps of pytorch-grad-cam, at the image's pixels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.grid import channels_first, fill
from ..geometry.types import MaskLike, SpacingLike
from ..models import RatVit, ResolutionAwareTransformer
from ..optional import import_optional
from .images import at_pixels, backbone_of, read


class _Told(nn.Module):
    """A model that is called with images alone."""

    def __init__(self, model: nn.Module, spacing: SpacingLike, mask: MaskLike) -> None:
        super().__init__()
        self.model, self.told = model, {"spacing": spacing, "mask": mask}

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, **self.told)


def map_class(
    model: nn.Module,
    x: Tensor,
    target: int | Sequence[int] | None = None,
    *,
    stage: int = -1,
    method: str = "GradCAM",
    spacing: SpacingLike = None,
    mask: MaskLike = None,
) -> Tensor:
    """Tells which places speak for a class.

    Args:
        model: A classifier, RAT or plain RAT, in evaluation mode. Gradients of its parameters are cleared.
        x: Images ``[B, C, *size]``.
        target: The class, one for all samples or one for each. Default: the likeliest.
        stage: Whose map is looked at; of a plain RAT, the block in front of which.
        method: A class of ``pytorch_grad_cam`` that takes a model and layers, such as "GradCAM", "GradCAMPlusPlus" and
            "LayerCAM".
        spacing: Physical pixel size, in any form that the models take; the same for all samples.
        mask: ``[B, *size]``, True = valid.

    Returns:
        ``[B, *size]``, from 0 to 1, which each sample's largest place of the map has; 0 where masked.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If pytorch-grad-cam is not installed; with the extra that installs it.
    """
    grad_cam = import_optional("pytorch_grad_cam", "explain")
    targets = import_optional("pytorch_grad_cam.utils.model_targets", "explain")
    backbone = backbone_of(model)
    if backbone is not model or not backbone.num_classes:
        raise ValueError(f"model must be a classifier, got a {type(model).__name__} without classes")
    kind = getattr(grad_cam, method, None)
    if kind is None:
        raise ValueError(f"method must be a class of pytorch_grad_cam, got {method!r}")
    (image,) = read(backbone, x, spacing, mask).levels
    with torch.no_grad():
        out: Any = backbone.forward_intermediates(
            x, [stage], output_dict=True, intermediates_only=True, spacing=spacing, mask=mask
        )
    (grid,), (valid,) = out["grids"], out["masks"]
    wanted = None if target is None else [target] * len(x) if isinstance(target, int) else list(target)
    if wanted is not None and (len(wanted) != len(x) or not all(0 <= c < backbone.num_classes for c in wanted)):
        raise ValueError(
            f"target must be a class below {backbone.num_classes}, or one for each of {len(x)} samples, got {target}"
        )
    layer, reshape = _layer(backbone, stage, grid.shape, valid)
    with kind(_Told(backbone, spacing, mask), [layer], reshape) as cam, torch.enable_grad():
        cam.get_target_width_height = lambda _: None  # places stay: they are sampled by where they are
        values = cam(x, None if wanted is None else [targets.ClassifierOutputTarget(c) for c in wanted])
    backbone.zero_grad()
    return at_pixels(torch.from_numpy(values).to(x.device).unsqueeze(-1), grid, valid, image)[..., 0]


def _layer(
    backbone: ResolutionAwareTransformer | RatVit, stage: int, grid: Sequence[int], valid: Tensor | None
) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """Returns the layer whose output is looked at, and what makes a map ``[B, C, *grid]`` of it, zero where masked."""
    if isinstance(backbone, ResolutionAwareTransformer):
        if any(part.reg_tokens is not None for part in backbone.stages):
            raise ValueError("model must have no prefix tokens (reg_tokens) for class activation maps")
        return backbone.stages[stage], None
    prefix = backbone.num_prefix_tokens

    def reshape(tokens: Tensor) -> Tensor:
        return channels_first(fill(tokens[:, prefix:].unflatten(1, tuple(grid)), valid))

    blocks: Any = backbone.blocks
    return blocks[stage].norm1, reshape  # what the last block puts out for patches, no class token sees
