"""The networks of the study, at one budget: parameters and multiplications at 48 x 48 within 15% of each other."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rat_timm  # noqa: F401  (registers the models)

RAT = {"depths": (3, 2, 1, 1)}
VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 4.3}
SIZES = {"dynamic_img_size": True, "dynamic_img_pad": True}
CONV = {"depths": (3, 2, 2, 1), "dims": (48, 72, 80, 80)}
SWIN = {"img_size": 48, "window_size": 6, "embed_dim": 32, "depths": (3, 2, 1), "num_heads": (1, 2, 4)}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what it is told of the pixel size.

    Attributes:
        architecture: A name of timm's registry.
        options: Keywords of `timm.create_model`.
        spacing: "given" to the model; "hidden"; or as one more "channel" per axis, which holds its logarithm.
        multiple: Its images' sizes have to be multiples of this; they are filled up with zeros.
        least: And at least as large as this.
    """

    architecture: str
    options: Mapping[str, Any]
    spacing: Literal["given", "hidden", "channel"] = "hidden"
    multiple: int = 1
    least: int = 1

    def create(self, axes: int, num_classes: int, in_chans: int = 1) -> "Classifier":
        """Builds it for images with so many axes."""
        channels = in_chans + (axes if self.spacing == "channel" else 0)
        volume = {"spatial_dims": 3} if axes == 3 else {}
        model = timm.create_model(
            self.architecture, num_classes=num_classes, in_chans=channels, **self.options, **volume
        )
        return Classifier(model, self)


class Classifier(nn.Module):
    """Takes images and their spacing, relative to the training spacing, whatever the network makes of them."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        super().__init__()
        self.model, self.network = model, network

    def forward(self, x: Tensor, spacing: Tensor) -> Tensor:
        """Returns logits for images ``[B, C, *size]`` with spacing ``[B, axes]``."""
        if self.network.spacing == "channel":
            planes = spacing.log2()[(..., *[None] * spacing.shape[1])].expand(-1, -1, *x.shape[2:])
            x = torch.cat((x, planes.to(x.dtype)), dim=1)
        x = F.pad(x, self._missing(x.shape[2:]))
        return self.model(x, spacing=spacing) if self.network.spacing == "given" else self.model(x)

    def _missing(self, size: Sequence[int]) -> list[int]:
        step = self.network.multiple
        wanted = [max(-(-n // step) * step, self.network.least) for n in size]
        return [part for n, want in zip(reversed(size), reversed(wanted), strict=True) for part in (0, want - n)]


_VIT, _PLAIN = "vit_small_patch16_rope_mixed_224", "rat_vit_small_patch16_rope_mixed_224"
_CONV, _SWIN = "convnext_atto", "swin_tiny_patch4_window7_224"
_SWIN_OPTIONS = {**SWIN, "strict_img_size": False}

NETWORKS = {
    "rat": Network("test_rat", RAT, "given"),
    "rat, spacing hidden": Network("test_rat", RAT),
    "plain rat": Network(_PLAIN, {**VIT, **SIZES, "physical_patches": True}, "given"),
    "convnext": Network(_CONV, CONV, least=32),
    "vit": Network(_VIT, {**VIT, **SIZES}),
    "swin": Network(_SWIN, _SWIN_OPTIONS, multiple=4, least=32),
    "convnext, channel": Network(_CONV, CONV, "channel", least=32),
    "vit, channel": Network(_VIT, {**VIT, **SIZES}, "channel"),
    "swin, channel": Network(_SWIN, _SWIN_OPTIONS, "channel", multiple=4, least=32),
    "rat, channel": Network("test_rat", RAT, "channel"),
    "rat, log scaling": Network(
        "test_rat", {**RAT, "learnable_rose_scaling": True, "rose_initial_scaling": "log"}, "given"
    ),
}
