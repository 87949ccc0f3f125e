"""Networks for the pixels of images: this package's segmenters, and those of segmentation_models_pytorch to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from rat_timm.dense import Segmenter
from rat_timm.geometry.grid import Grid, Tokens, fill
from rat_timm.geometry.sample import sample_at
from rat_timm.geometry.types import SpacingLike
from rat_timm.optional import import_optional
from rat_timm.timm_api.families import FAMILIES
from training.config import Config, axes_of

SMP = "smp:"


def create_network(config: Config, channels: int, classes: int, spacing: Sequence[float]) -> nn.Module:
    """Returns a network that is called as a `Segmenter` is.

    Args:
        config: Says which one.
        channels: Of the images.
        classes: Channels that come out.
        spacing: The reference spacing of a model that starts without weights, where ``model_args`` say no other.
    """
    if not config.model.startswith(SMP):
        if axes_of(config) != len(spacing):
            raise ValueError(
                f"model must be for {len(spacing)} axes, as the data have, got {config.model!r} for {axes_of(config)}; "
                "names of models for volumes end in _3d"
            )
        return Segmenter(
            config.model,
            classes,
            decoder=config.decoder,
            width=config.width,
            detail=config.detail,
            context=len(config.levels) > 1,
            in_chans=channels,
            **level_args(config),
            **backbone_args(config, spacing),
        )
    if len(spacing) != 2:
        raise ValueError(f"model must be one of this package's for volumes, got {config.model}")
    smp = import_optional("segmentation_models_pytorch", "test")
    architecture, _, encoder = config.model.removeprefix(SMP).partition("-")
    weights = "imagenet" if config.pretrained else None
    network = smp.create_model(
        architecture, f"tu-{encoder}", weights, in_channels=channels, classes=classes, **config.model_args
    )
    return ImageAlone(network)


def backbone_args(config: Config, spacing: Sequence[float]) -> dict[str, Any]:
    """Returns timm's keywords; a reference spacing is given where no weights are, which have one."""
    check_weights(config)
    own = {} if config.pretrained else {"spacing": tuple(spacing)}
    return {"pretrained": config.pretrained, **own, **config.model_args}


def check_weights(config: Config) -> None:
    """Checks that there are the weights that a config asks for.

    Raises:
        ValueError: If there are none.
    """
    if config.pretrained and timm.is_model(config.model) and not timm.is_model_pretrained(config.model):
        raise ValueError(f"pretrained must be false for {config.model}, of which there are no weights")


def level_args(config: Config) -> dict[str, Any]:
    """Returns what tells a hierarchical RAT the pixel sizes of levels that it is trained with."""
    name = config.model.partition(".")[0]
    if len(config.levels) == 1 or name not in FAMILIES["rat"].variants or "level_ratios" in config.model_args:
        return {}
    return {"level_ratios": tuple(config.levels)}


class ImageAlone(nn.Module):
    """A network that sees images alone, called as a `Segmenter` is.

    Images are filled up with zeros to multiples of ``multiple`` pixels. What is told says where logits are asked for,
    and the network nothing.

    Args:
        network: Returns ``[B, classes, *size]`` for ``[B, C, *size]``.
        multiple: Of its sizes.
    """

    def __init__(self, network: nn.Module, multiple: int = 32) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(
        self,
        x: Tensor,
        *,
        spacing: SpacingLike = None,
        mask: Tensor | None = None,
        origin: SpacingLike = None,
        out: Grid | None = None,
    ) -> Tensor:
        """See `Segmenter.forward`; of pyramids it takes none."""
        if not isinstance(x, Tensor):
            raise ValueError(f"levels must be [1] for networks that see images alone, got {len(x)} levels")
        size = x.shape[2:]
        logits = self.network(F.pad(x, [part for n in reversed(size) for part in (0, -n % self.multiple)]))
        logits = logits[(..., *(slice(n) for n in size))].movedim(1, -1)
        if out is not None:
            grid = Grid.create(size, 1.0 if spacing is None else spacing, origin, len(x), x.device)
            return sample_at(Tokens(logits, grid, mask), out, reach=1.0).x.movedim(-1, 1)
        return fill(logits, mask).movedim(-1, 1)


def save_network(network: nn.Module, folder: Path) -> None:
    """Saves a network without pickles."""
    if isinstance(network, Segmenter):
        network.save(folder)
    else:
        network.network.save_pretrained(folder)


def load_network(config: Config, folder: Path) -> nn.Module:
    """Loads what `save_network` saved."""
    if not config.model.startswith(SMP):
        return Segmenter.load(folder)
    smp = import_optional("segmentation_models_pytorch", "test")
    return ImageAlone(smp.from_pretrained(str(folder))).eval()


def mean_and_std(network: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    """Returns those of the images that a network's backbone was made for."""
    cfgs = (getattr(module, "pretrained_cfg", None) for module in network.modules())
    known = next((cfg for cfg in cfgs if isinstance(cfg, dict) and "mean" in cfg), {})
    return known.get("mean", IMAGENET_DEFAULT_MEAN), known.get("std", IMAGENET_DEFAULT_STD)


def spread(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """Returns a model with the weights of another of its kind, on the CPU and in evaluation mode."""
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return model.cpu().eval()
