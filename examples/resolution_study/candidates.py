"""Changes to the hierarchical RAT that the study tries, and what it is without spatial grouping attention."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from rat_timm.geometry.grid import Pyramid, Tokens, channels_first, channels_last
from rat_timm.models.rat import ResolutionAwareTransformer
from rat_timm.models.rope_vit.patches import physical_patchify
from rat_timm.ops.masking import pool_mask


class PhysicalKernel(nn.Module):
    """A stem of one kernel without overlap, which is resampled to one physical size (FlexiViT, MSPE)."""

    def __init__(self, model: ResolutionAwareTransformer) -> None:
        super().__init__()
        width, axes = model.cfg.stages()[0].dim_in, model.spatial_dims
        self.weight = nn.Parameter(torch.empty(width, model.in_chans, *model.cfg.stem_strides))
        trunc_normal_(self.weight, std=(model.in_chans * 4**axes) ** -0.5)
        self.norm = nn.LayerNorm(width)
        self.reference = model.reference_spacing

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Turns images into tokens."""
        levels = [physical_patchify(tokens, self.weight, None, self.reference) for tokens in pyramid.levels]
        return pyramid._replace(levels=[tokens._replace(x=self.norm(tokens.x)) for tokens in levels])


class ConditionedStem(nn.Module):
    """A stem whose tokens are scaled and shifted by what an MLP makes of the spacing's logarithm."""

    def __init__(self, model: ResolutionAwareTransformer) -> None:
        super().__init__()
        width = model.cfg.stages()[0].dim_in
        self.stem, self.reference = model.stem, model.reference_spacing
        self.mlp = nn.Sequential(nn.Linear(model.spatial_dims, 32), nn.GELU(), nn.Linear(32, 2 * width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Turns images into tokens."""
        images = [tokens.grid for tokens in pyramid.levels]
        levels = [self._condition(*pair) for pair in zip(self.stem(pyramid).levels, images, strict=True)]
        return pyramid._replace(levels=levels)

    def _condition(self, tokens: Tokens, image: tuple) -> Tokens:
        ratio = image.spacing / image.spacing.new_tensor(self.reference)
        scale, shift = self.mlp(ratio.log2().float())[(slice(None), *[None] * len(self.reference))].chunk(2, dim=-1)
        return tokens._replace(x=tokens.x * (1 + scale) + shift)


class StridedConvolution(nn.Module):
    """What spatial grouping attention starts from, and nothing more: a strided convolution and a norm."""

    def __init__(self, sga: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = sga.strider, sga.norm1
        self.kernel_size, self.stride, self.padding = sga.kernel_size, sga.stride, sga.padding

    def forward(self, tokens: Tokens, return_assignment: bool = False) -> tuple[Tokens, None]:
        """Turns tokens into fewer."""
        x: Tensor = self.norm(channels_last(self.conv(channels_first(tokens.filled()))))
        mask = None if tokens.mask is None else pool_mask(tokens.mask, self.stride)
        return Tokens(x, tokens.grid.conv(self.kernel_size, self.stride, self.padding), mask), None


def with_physical_kernel(model: ResolutionAwareTransformer) -> None:
    """Gives a model a stem of one physical kernel."""
    model.stem = PhysicalKernel(model)


def with_conditioned_stem(model: ResolutionAwareTransformer) -> None:
    """Gives a model a stem that is told the spacing."""
    model.stem = ConditionedStem(model)


def with_strided_convolutions(model: ResolutionAwareTransformer) -> None:
    """Takes spatial grouping attention out of a model."""
    for stage in model.stages:
        if stage.downsample is not None:
            stage.downsample.sga = StridedConvolution(stage.downsample.sga)
