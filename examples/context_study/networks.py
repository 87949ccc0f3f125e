"""The networks of the study, at one budget: parameters and multiplications within 15% of those of RAT on the pyramid.

All are called on a `Batch` and return logits at the crops' pixels. MuViT comes from its package, `muvit` 0.1.0 (BSD-3),
which has no decoder for segmentation: it gets the one that this package puts on plain transformers.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from monai.networks.nets import UNet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from context_study.tasks import Task
from context_study.views import Batch, Level, cut, show_nothing
from rat_timm import Grid
from rat_timm.dense import Segmenter
from rat_timm.dense.decoders import DECODERS, DetailLevels, SimplePyramid, add_context
from rat_timm.dense.segmenter import at_grid
from rat_timm.geometry.grid import Tokens, channels_first, channels_last
from rat_timm.geometry.sample import sample_at
from rat_timm.layers.grouping import CONVS

PYRAMID = ("crop", "overview")
_RAT, _VIT = "test_rat", "rat_vit_small_patch16_rope_mixed_224"


class Rat(nn.Module):
    """This package's `Segmenter`, whose backbone is a hierarchical or plain RAT."""

    def __init__(self, task: Task, views: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__()
        axes, alone = len(task.size), task.factors if views[0] == "overview" else (1,) * len(task.size)
        if len(views) > 1 and options["backbone"] == _RAT:
            options = {**options, "level_ratios": (1, task.factors)}
        # reference spacing: that of the finest image it is trained with
        self.model = Segmenter(
            num_classes=len(task.classes),
            in_chans=1,
            spacing=task.scaled(alone),
            spatial_dims=axes,
            context=True,
            detail="pixels",  # as when the results were measured
            **options,
        )

    def forward(self, batch: Batch) -> Tensor:
        """``[B, classes, *size]``."""
        levels = batch.levels
        masks = None
        if any(level.mask is not None for level in levels):
            masks = [_mask(level) for level in levels]
        told = {
            "spacing": [level.spacing for level in levels],
            "origin": [level.origin for level in levels],
            "mask": masks,
        }
        return self.model([level.image for level in levels], out=batch.place, **told)


def _mask(level: Level) -> Tensor:
    return torch.ones_like(level.image[:, 0], dtype=torch.bool) if level.mask is None else level.mask


class Muvit(nn.Module):
    """An encoder of the package `muvit`, with the decoder that `Segmenter` has for plain transformers.

    Its levels have one number of pixels. It is told where each begins and ends, in pixels of the crop. The overview
    reaches the crop by its attention alone, as the package has it; with ``adds_context`` by `add_context` too.
    """

    def __init__(self, task: Task, views: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__()
        axes, patch = len(task.size), tuple(options["patch_size"])
        encoder = getattr(_import_muvit(), f"MuViTEncoder{axes}d")
        # without boxes the levels' factors would be those of all axes; with boxes they are names
        levels = (1.0, float(max(task.factors)))
        width, self.adds_context = options["width"], options.get("adds_context", False)
        self.spacing = task.spacing
        self.encoder = encoder(
            1, levels, patch, **{k: v for k, v in options.items() if k not in ("patch_size", "width", "adds_context")}
        )
        self.pyramid = SimplePyramid(self.encoder.dim, patch)
        self.decoder = DECODERS["fpn"](self.pyramid.dims, width, axes)
        self.detail = DetailLevels(1, width, self.pyramid.strides, "pixels")
        self.classifier = CONVS[axes](self.detail.dims, len(task.classes), 3, padding=1)

    def forward(self, batch: Batch) -> Tensor:
        """``[B, classes, *size]``."""
        first = batch.levels[0]
        images = torch.stack([level.image for level in batch.levels], dim=1)  # [B, L, C, *size]
        features = self.encoder.compute_features(images, bbox=self._boxes(batch.levels))
        image = Tokens(channels_last(first.image), first.grid)
        decoded = self.detail(image, self._decode(features[:, 0], first))
        if self.adds_context:
            others = zip(features.unbind(1)[1:], batch.levels[1:], strict=True)
            context = [self.detail.project(self._decode(*other, is_context=True)) for other in others]
            decoded = add_context(decoded, context)
        logits = decoded._replace(x=channels_last(self.classifier(channels_first(decoded.x))))
        return channels_first(at_grid(logits, image, image.grid if batch.place is None else batch.place))

    def _decode(self, features: Tensor, level: Level, is_context: bool = False) -> Tokens:
        patch = self.encoder.patch_size
        grid = level.grid.conv(patch, patch, [0] * len(patch))
        return self.decoder(self.pyramid(Tokens(channels_last(features), grid), is_context))

    def _boxes(self, levels: Sequence[Level]) -> Tensor:
        """Where the centres of the first and of the last pixel of each level are, ``[B, L, 2, axes]``."""
        pixel = levels[0].origin.new_tensor(self.spacing)
        boxes = []
        for level in levels:
            last = [(n - 1) * step for n, step in zip(level.image.shape[2:], level.spacing, strict=True)]
            boxes.append(torch.stack([level.origin, level.origin + level.origin.new_tensor(last)], dim=1) / pixel)
        return torch.stack(boxes, dim=1).float()


def _import_muvit() -> Any:
    try:
        return importlib.import_module("muvit.encoders")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"MuViT needs {error.name}: pip install muvit==0.1.0. It is in no extra of this package, since it takes "
            "lightning, wandb and x-transformers, and Python 3.11 or 3.12"
        ) from error


class CropUnet(nn.Module):
    """MONAI's U-Net on the crop; with the overview as more channels, if there is one."""

    def __init__(self, task: Task, views: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.factors = task.factors
        channels = 1 if len(views) == 1 else 3
        self.model = _unet(task, channels, options)

    def forward(self, batch: Batch) -> Tensor:
        """``[B, classes, *size]``."""
        crop = batch.levels[0]
        return self.model(torch.cat([crop.image, *(self._about(crop, level) for level in batch.levels[1:])], dim=1))

    def _about(self, crop: Level, overview: Level) -> Tensor:
        """The overview as wide as it was in training, about the crop's middle, and where it shows something."""
        size = crop.image.shape[2:]
        spacing = [step * by for step, by in zip(crop.spacing, self.factors, strict=True)]
        half = crop.origin.new_tensor([(n - 1) / 2 for n in size])
        middle = crop.origin + half * crop.origin.new_tensor(crop.spacing)
        corner = middle - half * crop.origin.new_tensor(spacing)
        grid = Grid.create(size, spacing, corner, len(crop.image), crop.image.device)
        seen = sample_at(Tokens(channels_last(overview.image), overview.grid, overview.mask), grid)
        assert seen.mask is not None
        return torch.cat([channels_first(seen.x), seen.mask[:, None].float()], dim=1)


class FieldUnet(nn.Module):
    """MONAI's U-Net on the whole field of view at the crop's pixel size, of which the crop's part is read."""

    def __init__(self, task: Task, views: Sequence[str], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.size = task.size
        self.model = _unet(task, 1, options)

    def forward(self, batch: Batch) -> Tensor:
        """``[B, classes, *size]``."""
        (field,) = batch.levels
        assert batch.place is not None
        corner = ((batch.place.origin - field.origin) / batch.place.spacing).round().long()
        return cut(self.model(field.image), corner.tolist(), self.size)


def _unet(task: Task, channels: int, options: Mapping[str, Any]) -> nn.Module:
    options = {"num_res_units": 1, **options}
    return UNet(len(task.size), channels, len(task.classes), norm="batch", **options)


FAMILIES = {"rat": Rat, "vit": Rat, "muvit": Muvit, "unet": CropUnet, "field": FieldUnet}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the study.

    Attributes:
        family: A key of `FAMILIES`.
        views: What it is shown.
        options: Of its architecture: for a task, or by the number of axes for all others.
        lr: Learning rate at its peak.
        at_once: Share of a step's crops that it is given, as far as its budget goes.
        in_budget: Whether it has the budget of the others.
        without: Tasks for which it has no place in the budget.
    """

    family: Literal["rat", "vit", "muvit", "unet", "field"]
    views: tuple[str, ...]
    options: Mapping[int | str, Mapping[str, Any]]
    lr: float = 1e-3
    at_once: float = 1.0
    in_budget: bool = True
    without: tuple[str, ...] = ()

    def create(self, task: Task) -> nn.Module:
        """Builds it for a task."""
        return FAMILIES[self.family](task, self.views, self.options.get(task.name, self.options[len(task.size)]))


def count_cost(network: Network, task: Task) -> tuple[int, int]:
    """Returns parameters, and multiplications for one crop."""
    model, batch = network.create(task).eval(), show_nothing(task, network.views)
    # fused attention is not counted by every PyTorch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(batch)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


_RAT_2D = {"backbone": _RAT, "embed_dim": (32, 64, 96), "num_heads": (1, 2, 3), "stem_stride": 2, "width": 48}
_RAT_3D = {**_RAT_2D, "stem_stride": (1, 2, 2), "width": 32}
_VIT_2D = {
    "backbone": _VIT,
    "img_size": 48,
    "patch_size": 6,
    "embed_dim": 96,
    "depth": 5,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "width": 48,
}
_VIT_3D = {**_VIT_2D, "img_size": 24, "patch_depth": 4, "depth": 4, "width": 44}
# a patch of an overview has to be a pixel or more, and so is large in a crop
_PHYSICAL = {**_VIT_2D, "patch_size": 24, "depth": 3, "mlp_ratio": 3.0, "width": 36, "physical_patches": True}
_MUVIT = {
    2: {"patch_size": (6, 6), "num_layers": 5, "dim": 96, "heads": 3, "width": 56},
    3: {"patch_size": (4, 6, 6), "num_layers": 4, "dim": 96, "heads": 3, "width": 44},
}
_MUVIT_ADDED = {axes: {**options, "adds_context": True} for axes, options in _MUVIT.items()}
_UNET = {
    2: {"channels": (28, 48, 96, 160), "strides": (1, 2, 2)},
    3: {"channels": (24, 40, 64, 92), "strides": (1, 2, 2)},
    "brain": {"channels": (20, 36, 64, 96), "strides": (1, 2, 2)},  # more classes, which cost it more than others
}
_WIDE_UNET = {
    2: {"channels": (16, 32, 64, 96, 128), "strides": (2, 2, 2, 2)},
    # a residual unit at full resolution, of as many channels as there are classes, would be most of its cost
    3: {"channels": (8, 16, 32, 64, 96), "strides": (2, 2, 2, 2), "num_res_units": 0},
}
# one image has half of the multiplications, so that the network is deeper
_DEEPER = {2: {**_RAT_2D, "depths": (4, 4, 2)}, 3: {**_RAT_3D, "depths": (3, 3, 2)}}
_TWO = {2: {**_RAT_2D, "depths": (1, 2, 3)}, 3: {**_RAT_3D, "depths": (1, 2, 2)}}

PHYSICAL = "plain RAT, physical patches, pyramid"
OURS, MUVIT, CHANNELS = "RAT, pyramid", "MuViT, pyramid", "U-Net, overview in channels"
MUVIT_ADDED = "MuViT, pyramid, context added"
NETWORKS = {
    OURS: Network("rat", PYRAMID, _TWO),
    "RAT, crop": Network("rat", ("crop",), _DEEPER),
    "RAT, overview": Network("rat", ("overview",), _DEEPER),
    "plain RAT, pyramid": Network("vit", PYRAMID, {2: _VIT_2D, 3: _VIT_3D}),
    # overviews of volumes have so many of its patches that it takes more than twice the budget
    PHYSICAL: Network("vit", PYRAMID, {2: _PHYSICAL}, without=("tissue in volumes", "brain")),
    MUVIT: Network("muvit", PYRAMID, _MUVIT),
    MUVIT_ADDED: Network("muvit", PYRAMID, _MUVIT_ADDED),
    "U-Net, crop": Network("unet", ("crop",), _UNET),
    CHANNELS: Network("unet", PYRAMID, _UNET),
    "U-Net, whole field": Network("field", ("field",), _WIDE_UNET, at_once=0.125, in_budget=False),
}
"""Networks by name."""
