"""The networks of the study, at one budget: parameters and multiplications at 48 x 48 within 15% of the RAT's."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from candidates import with_conditioned_stem, with_physical_kernel, with_strided_convolutions
from torch import Tensor, nn
from torch.nn import functional as F

import rat_timm  # noqa: F401  (registers the models)
from rat_timm.grid import Grid, Tokens, channels_first, channels_last
from rat_timm.layers.resample import resample

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
        spacing: What is done with the spacing: it is "given" to the model; "hidden" from it; its logarithm is one more
            "channel" per axis; or images are "resized" to the training spacing, in training too.
        multiple: Its images' sizes have to be multiples of this; they are filled up with zeros.
        least: And at least as large as this.
        coarsened: Whether images are made coarser at random in training, and said to be so.
        levels: How many levels of a pyramid of the one image it is given, each half as fine as the one before, as long
            as there are four pixels along each axis, which is a token.
        change: What is changed in the model.
        lr: Learning rate at its peak: of 0.0005 and 0.001 the one with which more training images were right.
    """

    architecture: str
    options: Mapping[str, Any]
    spacing: Literal["given", "hidden", "channel", "resized"] = "hidden"
    multiple: int = 1
    least: int = 1
    coarsened: bool = False
    levels: int = 1
    change: Callable[[nn.Module], None] | None = None
    lr: float = 5e-4

    def create(self, axes: int, num_classes: int, in_chans: int = 1) -> "Classifier":
        """Builds it for images with so many axes."""
        channels = in_chans + (axes if self.spacing == "channel" else 0)
        volume = {"spatial_dims": 3} if axes == 3 else {}
        model = timm.create_model(
            self.architecture, num_classes=num_classes, in_chans=channels, **self.options, **volume
        )
        if self.change is not None:
            self.change(model)
        return Classifier(model, self)


class Classifier(nn.Module):
    """Takes images and their spacing, relative to the training spacing, whatever the network makes of them."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        super().__init__()
        self.model, self.network = model, network

    def forward(self, x: Tensor, factor: float) -> Tensor:
        """Returns logits for images ``[B, C, *size]`` whose pixels are ``factor`` wide along each axis."""
        if self.training and self.network.coarsened:
            x, factor = coarsen(x, factor)
        if self.network.spacing == "channel":
            x = torch.cat((x, torch.full_like(x[:, :1], math.log2(factor)).expand(-1, x.ndim - 2, *x.shape[2:])), dim=1)
        if self.network.spacing == "resized":
            x = at_spacing(x, factor, 1.0)
        if self.network.levels > 1:
            coarser = [2**level for level in range(self.network.levels) if min(x.shape[2:]) >= 4 * 2**level]
            return self.model([at_spacing(x, factor, factor * by) for by in coarser], spacing=[factor])
        x = F.pad(x, self._missing(x.shape[2:]))
        return self.model(x, spacing=factor) if self.network.spacing == "given" else self.model(x)

    def _missing(self, size: Sequence[int]) -> list[int]:
        step = self.network.multiple
        wanted = [max(-(-n // step) * step, self.network.least) for n in size]
        return [part for n, want in zip(reversed(size), reversed(wanted), strict=True) for part in (0, want - n)]


def at_spacing(x: Tensor, old: float, new: float) -> Tensor:
    """Resamples images ``[B, C, *size]`` to another spacing, which is the same along each axis."""
    size = x.shape[2:]
    tokens = Tokens(channels_last(x), Grid.create(size, old))
    return channels_first(resample(tokens, [new] * len(size)).x)


def coarsen(x: Tensor, factor: float) -> tuple[Tensor, float]:
    """Makes images coarser by a random factor, or by none."""
    coarser = factor * COARSER[int(torch.randint(len(COARSER), ()))]
    return at_spacing(x, factor, coarser), coarser


COARSER = (1.0, 1.4, 2.0, 2.8, 4.0)  # by what images are made coarser

_VIT, _PLAIN = "vit_small_patch16_rope_mixed_224", "rat_vit_small_patch16_rope_mixed_224"
_CONV, _SWIN = "convnext_atto", "swin_tiny_patch4_window7_224"
PEERS = {
    "convnext": Network(_CONV, CONV, least=32, lr=1e-3),
    "vit": Network(_VIT, {**VIT, **SIZES}, lr=1e-3),
    "swin": Network(_SWIN, {**SWIN, "strict_img_size": False}, multiple=4, least=32),
}
PHYSICAL = Network("test_rat", {**RAT, "physical_stem": True}, "given")

NETWORKS = {
    "rat": Network("test_rat", RAT, "given"),
    "rat, physical stem": PHYSICAL,
    "rat, spacing hidden": Network("test_rat", RAT),
    "plain rat": Network(_PLAIN, {**VIT, **SIZES, "physical_patches": True}, "given", lr=1e-3),
    **PEERS,
    **{f"{name}, channel": dataclasses.replace(peer, spacing="channel") for name, peer in PEERS.items()},
    **{f"{name}, resized": dataclasses.replace(peer, spacing="resized") for name, peer in PEERS.items()},
    "rat, log scaling": Network(
        "test_rat", {**RAT, "learnable_rose_scaling": True, "rose_initial_scaling": "log"}, "given"
    ),
    "rat, physical kernel": Network("test_rat", RAT, "given", change=with_physical_kernel),
    "rat, conditioned stem": Network("test_rat", RAT, "given", change=with_conditioned_stem),
    "rat, pyramid": Network("test_rat", RAT, "given", levels=3),
    "rat, strided convolutions": Network(
        "test_rat", {**PHYSICAL.options, "depths": (4, 2, 1, 1)}, "given", change=with_strided_convolutions
    ),
    "rat, physical stem, coarsened": dataclasses.replace(PHYSICAL, coarsened=True),
    "convnext, resized, coarsened": dataclasses.replace(PEERS["convnext"], spacing="resized", coarsened=True),
}
