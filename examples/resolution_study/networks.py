"""The networks of the study, at one budget: parameters and multiplications at 48 x 48 within 15% of the RAT's."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rat_timm  # noqa: F401  (registers the models)
from rat_timm.geometry.grid import Grid, Tokens, channels_first, channels_last
from rat_timm.geometry.resample import resample
from resolution_study.candidates import with_conditioned_stem, with_physical_kernel

RAT_OPTIONS = {"depths": (3, 2, 1, 1), "embed_dim": (32, 64, 64, 112), "num_heads": (1, 2, 2, 4), "physical_stem": True}
# as the defaults were when most candidates were tried
FORMER_OPTIONS = {
    "depths": (3, 2, 1, 1),
    "physical_stem": True,
    "group_width": "fine",
    "sga_attention_type": ("sparse", "sparse", "dense"),
    "sga_mlp_ratio": 1.0,
    "iters": 3,
}
PIXEL_OPTIONS = {**FORMER_OPTIONS, "physical_stem": False}
VOLUMES = {"spatial_dims": 3, "group_width": "fine", "sga_mlp_ratio": 1.0}  # as the registered RATs for volumes
VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 4.3}
SIZES = {"dynamic_img_size": True, "dynamic_img_pad": True}
CONV = {"depths": (3, 2, 2, 1), "dims": (48, 72, 80, 80)}
SWIN = {"img_size": 48, "window_size": 6, "embed_dim": 32, "depths": (3, 2, 1), "num_heads": (1, 2, 4)}

RAT, TOLD, HIDDEN, COARSENED = "rat", "rat, physical stem", "rat, spacing hidden", "rat, physical stem, coarsened"
FORMER = "rat, physical stem, former grouping"


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
        coarsened: Whether half of the images in training, at random, are made coarser, and said to be so.
        levels: How many levels of a pyramid of the one image it is given, each half as fine as the one before, as long
            as there are four pixels along each axis, which is a token.
        change: What is changed in the model.
        longer: By what it is trained longer than the others.
        changed: The name of the network that it is a change of, if it is one.
        lr: Learning rate at its peak.
    """

    architecture: str
    options: Mapping[str, Any]
    spacing: Literal["given", "hidden", "channel", "resized"] = "hidden"
    multiple: int = 1
    least: int = 1
    coarsened: bool = False
    levels: int = 1
    change: Callable[[nn.Module], None] | None = None
    longer: int = 1
    changed: str = ""
    lr: float = 5e-4

    @property
    def is_rat(self) -> bool:
        """Whether it is one of this package's."""
        return "rat" in self.architecture.split("_")

    def create(self, spacing: Sequence[float], num_classes: int, in_chans: int = 1) -> "Classifier":
        """Builds it for images that are trained at a spacing, one value per axis."""
        axes = len(spacing)
        options = dict(self.options)
        if self.is_rat:
            options |= {"spacing": tuple(spacing), **(VOLUMES if axes == 3 else {})}
        channels = in_chans + (axes if self.spacing == "channel" else 0)
        model = timm.create_model(self.architecture, num_classes=num_classes, in_chans=channels, **options)
        if self.change is not None:
            self.change(model)
        return Classifier(model, self, spacing)


class Classifier(nn.Module):
    """Takes images and how coarse they are, relative to the training spacing, whatever the network makes of it."""

    def __init__(self, model: nn.Module, network: Network, spacing: Sequence[float]) -> None:
        super().__init__()
        self.model, self.network, self.spacing = model, network, spacing

    def forward(self, x: Tensor, ratio: Sequence[float]) -> Tensor:
        """Returns logits for images ``[B, C, *size]`` whose pixels are ``ratio`` times the training spacing wide."""
        if self.training and self.network.coarsened and float(torch.rand(())) >= 0.5:
            x, ratio = coarsen(x, ratio)
        if self.network.spacing == "channel":
            told = x.new_tensor(ratio).log2().view(1, -1, *[1] * (x.ndim - 2))
            x = torch.cat((x, told.expand(len(x), -1, *x.shape[2:])), dim=1)
        if self.network.spacing == "resized":
            x = at_spacing(x, ratio, [1.0] * len(ratio))
        spacing = [step * by for step, by in zip(self.spacing, ratio, strict=True)]
        if self.network.levels > 1:
            return self.model(self._pyramid(x, ratio), spacing=[spacing])
        x = F.pad(x, self._missing(x.shape[2:]))
        return self.model(x, spacing=spacing) if self.network.spacing == "given" else self.model(x)

    def _pyramid(self, x: Tensor, ratio: Sequence[float]) -> list[Tensor]:
        coarser = [2**level for level in range(self.network.levels) if min(x.shape[2:]) >= 4 * 2**level]
        return [at_spacing(x, ratio, [by * each for each in ratio]) for by in coarser]

    def _missing(self, size: Sequence[int]) -> list[int]:
        step = self.network.multiple
        wanted = [max(-(-n // step) * step, self.network.least) for n in size]
        return [part for n, want in zip(reversed(size), reversed(wanted), strict=True) for part in (0, want - n)]


def at_spacing(x: Tensor, old: Sequence[float], new: Sequence[float]) -> Tensor:
    """Resamples images ``[B, C, *size]`` to another spacing."""
    return channels_first(resample(Tokens(channels_last(x), Grid.create(x.shape[2:], old)), new).x)


def coarsen(x: Tensor, ratio: Sequence[float]) -> tuple[Tensor, list[float]]:
    """Makes images coarser by a random factor, whose logarithm is uniform."""
    factor = COARSER ** float(torch.rand(()))
    coarser = [factor * each for each in ratio]
    return at_spacing(x, ratio, coarser), coarser


COARSER = 4.0  # by what images are made coarser, at most

_VIT, _PLAIN = "vit_small_patch16_rope_mixed_224", "rat_vit_small_patch16_rope_mixed_224"
_CONV, _SWIN = "convnext_atto", "swin_tiny_patch4_window7_224"
PEERS = {
    "convnext": Network(_CONV, CONV, least=32, lr=1e-3),
    "vit": Network(_VIT, {**VIT, **SIZES}, lr=1e-3),
    "swin": Network(_SWIN, {**SWIN, "strict_img_size": False}, multiple=4, least=32),
}
PHYSICAL = Network("test_rat", RAT_OPTIONS, "given", changed=FORMER)
CONVNEXT = dataclasses.replace(PEERS["convnext"], spacing="resized")

NETWORKS = {
    TOLD: PHYSICAL,
    FORMER: Network("test_rat", FORMER_OPTIONS, "given", changed=RAT),
    RAT: Network("test_rat", PIXEL_OPTIONS, "given"),
    HIDDEN: Network("test_rat", PIXEL_OPTIONS, changed=RAT),
    "plain rat": Network(_PLAIN, {**VIT, **SIZES, "physical_patches": True}, "given", lr=1e-3),
    **PEERS,
    "convnext, channel": dataclasses.replace(PEERS["convnext"], spacing="channel"),
    "convnext, channel, longer": dataclasses.replace(PEERS["convnext"], spacing="channel", longer=3),
    "convnext, resized": CONVNEXT,
    "swin, resized": dataclasses.replace(PEERS["swin"], spacing="resized"),
    "rat, log scaling": Network(
        "test_rat",
        {**PIXEL_OPTIONS, "learnable_rose_scaling": True, "rose_initial_scaling": "log"},
        "given",
        changed=RAT,
    ),
    "rat, physical kernel": Network("test_rat", PIXEL_OPTIONS, "given", change=with_physical_kernel, changed=RAT),
    "rat, conditioned stem": Network("test_rat", PIXEL_OPTIONS, "given", change=with_conditioned_stem, changed=RAT),
    "rat, pyramid": Network("test_rat", PIXEL_OPTIONS, "given", levels=3, changed=RAT),
    "rat, strided convolutions": Network(
        "test_rat",
        {**FORMER_OPTIONS, "depths": (4, 2, 1, 1), "sga_attention_type": "none"},
        "given",
        changed=FORMER,
    ),
    COARSENED: dataclasses.replace(PHYSICAL, coarsened=True, changed=TOLD),
    "convnext, resized, coarsened": dataclasses.replace(CONVNEXT, coarsened=True),
    "swin, resized, coarsened": dataclasses.replace(PEERS["swin"], spacing="resized", coarsened=True),
}
