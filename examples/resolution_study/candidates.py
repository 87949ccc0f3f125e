"""Changes to the hierarchical RAT that the study tries.

They are put in front of a model, by hooks on what it is given: its own stem is told pixels alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from rat_timm.geometry.grid import Grid, Tokens, channels_first, channels_last
from rat_timm.models.rat import ResolutionAwareTransformer
from rat_timm.models.rope_vit.patches import physical_patchify

Arguments = tuple[tuple[Tensor], dict[str, Any]]


class PhysicalKernel(nn.Module):
    """A stem of one kernel without overlap, which is resampled to one physical size (FlexiViT, MSPE).

    Its tokens, each spread over as many pixels as a token has, are the images of a model whose stem takes one of them.
    """

    def __init__(self, model: ResolutionAwareTransformer) -> None:
        super().__init__()
        width = model.cfg.stages()[0].dim_in
        self.stride, self.reference = model.cfg.stem_strides, model.reference_spacing
        self.weight = nn.Parameter(torch.empty(width, model.in_chans, *self.stride))
        trunc_normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.norm = nn.LayerNorm(width)

    def spread(self, model: nn.Module, images: tuple[Tensor], told: Mapping[str, Any]) -> Arguments:
        """Turns what the model is given, an image with a spacing, into tokens that are spread."""
        image = Tokens(channels_last(images[0]), Grid.create(images[0].shape[2:], told["spacing"]))
        tokens = physical_patchify(image, self.weight, None, self.reference)
        x = channels_first(self.norm(tokens.x))
        for axis, n in enumerate(self.stride, start=2):
            x = x.repeat_interleave(n, dim=axis)
        return (x,), {"spacing": tokens.grid.spacing / tokens.grid.spacing.new_tensor(self.stride)}

    def forward(self, image: Tensor, masks: list[None]) -> Tensor:
        """Takes one of the pixels of each token."""
        return image[(..., *(slice(None, None, n) for n in self.stride))]


class ConditionedStem(nn.Module):
    """A stem whose tokens are scaled and shifted by what an MLP makes of the spacing's logarithm."""

    def __init__(self, model: ResolutionAwareTransformer) -> None:
        super().__init__()
        width = model.cfg.stages()[0].dim_in
        self.stem, self.reference = model.stem, model.reference_spacing
        self.mlp = nn.Sequential(nn.Linear(model.spatial_dims, 32), nn.GELU(), nn.Linear(32, 2 * width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)
        self.ratio = torch.ones(len(self.reference), dtype=torch.float64)

    def listen(self, model: nn.Module, images: tuple[Tensor], told: Mapping[str, Any]) -> None:
        """Notes the spacing that the model is told."""
        self.ratio = torch.tensor([s / r for s, r in zip(told["spacing"], self.reference, strict=True)])

    def forward(self, image: Tensor, masks: list[None]) -> Tensor:
        """Turns an image into tokens."""
        axes = (slice(None), *[None] * len(self.reference))
        scale, shift = (part[axes] for part in self.mlp(self.ratio.log2().float()).chunk(2))  # [C, 1, 1]
        return self.stem(image, masks) * (1 + scale) + shift


def with_physical_kernel(model: ResolutionAwareTransformer) -> None:
    """Gives a model a stem of one physical kernel."""
    model.stem = PhysicalKernel(model)
    model.in_chans = len(model.stem.weight)
    model.register_forward_pre_hook(model.stem.spread, with_kwargs=True)


def with_conditioned_stem(model: ResolutionAwareTransformer) -> None:
    """Gives a model a stem that is told the spacing."""
    model.stem = ConditionedStem(model)
    model.register_forward_pre_hook(model.stem.listen, with_kwargs=True)
