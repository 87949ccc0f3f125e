"""Models as prediction uses them: parts of an image in, a map of the same part out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..dense.segmenter import Segmenter
from ..geometry.box import Box, places_around
from ..geometry.grid import Grid, exact_dtype
from ..models import RatVit, ResolutionAwareTransformer
from .receptive import backbone_of, bounded_reach, map_grid, needed, total_stride, unbounded_layers

TASKS = ("labels", "probabilities", "instances", "features")
HUB = "hf-hub:"


@dataclass(frozen=True)
class Network:
    """A model and what it is asked for.

    Attributes:
        model: A segmenter or a backbone, in evaluation mode.
        task: One of `TASKS`.
        stage: Of a hierarchical backbone, whose map is the result.
        is_compiled: Whether calls are compiled.
        levels: How many levels it is given.
    """

    model: nn.Module
    task: str
    stage: int = -1
    is_compiled: bool = False
    levels: int = 1

    def __post_init__(self) -> None:
        backbone_of(self.model)
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {TASKS}, got {self.task!r}")
        if self.task != "features" and not isinstance(self.model, Segmenter):
            raise ValueError(
                f"task {self.task!r} needs a Segmenter, got a {type(self.model).__name__}: it has features"
            )
        if self.task == "instances" and self.channels != 2:
            raise ValueError(f"task 'instances' needs a model of two channels, got {self.channels}")

    @property
    def backbone(self) -> ResolutionAwareTransformer | RatVit:
        """The model's backbone."""
        return backbone_of(self.model)

    @property
    def axes(self) -> int:
        """Number of axes of the images."""
        return self.backbone.spatial_dims

    @property
    def in_chans(self) -> int:
        """Number of channels of the images."""
        return self.backbone.in_chans

    @property
    def channels(self) -> int:
        """Number of channels of the map."""
        if isinstance(self.model, Segmenter):
            return self.model.num_features if self.task == "features" else self.model.num_classes
        info: Any = self.backbone.feature_info[self.stage]
        return info["num_chs"]

    @property
    def is_resampled(self) -> bool:
        """Whether the model brings images to its reference spacing."""
        return isinstance(self.backbone, ResolutionAwareTransformer) and self.backbone.cfg.physical_stem

    @property
    def unbounded(self) -> list[str]:
        """Each layer that sees everything, and why."""
        return list(unbounded_layers(self.model, self.stage, self.levels))

    @cached_property
    def reach(self) -> tuple[int, ...]:
        """How many pixels the bounded layers look to either side along each axis."""
        return bounded_reach(self.model, self.stage)

    def spacing(self, image: Grid) -> tuple[float, ...]:
        """Returns the pixel size at which the model computes on an image."""
        own = image.numbers.spacing or tuple(image.spacing[0].tolist())
        return self.backbone.reference_spacing if self.is_resampled else own

    def stride(self, working: Grid) -> tuple[int, ...]:
        """Returns the multiples of pixels at which a part of an image may start."""
        return total_stride(self.model, self.stage, working.spacing[0].tolist())

    def map_grid(self, working: Grid) -> Grid:
        """Returns the grid of the map of an image."""
        return map_grid(self.model, working, self.stage)

    def needed(self, working: Grid, box: Box) -> Box:
        """Returns the pixels on which a part of the map depends, as far as layers are bounded."""
        return needed(self.model, working, box, self.stage)

    def under(self, working: Grid, box: Box) -> Box:
        """Returns the pixels between whose centres a part of the map lies."""
        return places_around(box, self.map_grid(working), working)

    def __call__(
        self, images: Sequence[Tensor], grids: Sequence[Sequence[Grid]], masks: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Computes maps of a batch of parts of an image, each with its context.

        Args:
            images: ``[B, C, *size]`` of each level, finest first.
            grids: Where each sample's pixels are, for each level.
            masks: ``[B, *size]``, True = valid, or None, for each level.

        Returns:
            ``[B, *map_grid(part).shape, channels]``, in float32 at least, and which places are valid, None if all are.
        """
        told: dict[str, Any] = {"spacing": tuple(grids[0][0].numbers.spacing or grids[0][0].spacing[0].tolist())}
        x: Any = images[0]
        mask: Any = masks[0]
        if len(images) > 1:
            x, mask = list(images), None if all(m is None for m in masks) else list(masks)
            told["spacing"] = [tuple(level[0].spacing[0].tolist()) for level in grids]
            told["origin"] = [torch.cat([grid.origin for grid in level]) for level in grids]
        map_, valid = self._function(x, {**told, "mask": mask})
        return map_.to(exact_dtype(map_.dtype)), valid

    @cached_property
    def _function(self) -> Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor | None]]:
        return torch.compile(self._map) if self.is_compiled else self._map

    def _map(self, x: Any, told: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.model, Segmenter):
            features = self.model.forward_features(x, **told)
            if self.task == "features":
                return features.x, features.mask
            return self.model.classify(features), features.mask
        stage = self.stage if self.stage >= 0 else len(self.backbone.feature_info) + self.stage
        out: Any = self.backbone.forward_intermediates(
            x,
            [stage],
            norm=True,
            stop_early=True,
            output_fmt="NHWC",
            output_dict=True,
            intermediates_only=True,
            **told,
        )
        map_, mask = out["image_intermediates"][0], out["masks"][0]
        return (map_, mask) if isinstance(x, Tensor) else (map_[0], mask[0])


def check_source(source: str | PathLike) -> None:
    """Checks that a name is one of `load_model`'s.

    Raises:
        FileNotFoundError: If it is not.
    """
    name, folder = str(source), Path(source)
    if folder.exists():
        there = (folder / "config.json").is_file()
    else:
        there = name.startswith(HUB) or timm.is_model(name.partition(".")[0])
    if not there:
        inside = (folder / "model" / "config.json").is_file()
        hint = f"; there is one in {folder / 'model'}" if inside else ""
        raise FileNotFoundError(
            2, f"model: no folder with a config.json, hf-hub: name or registered name: {name}{hint}", name
        )


def load_model(source: str | PathLike | nn.Module) -> nn.Module:
    """Returns a model in evaluation mode.

    Args:
        source: A folder that `Segmenter.save` or `rat_timm.hub.save` wrote, ``hf-hub:owner/name`` with the same, a
            registered name of a backbone with weights, or a model.

    Raises:
        ValueError: If the weights are damaged, or the model is of another kind.
        FileNotFoundError: If there are none.
    """
    if isinstance(source, nn.Module):
        return source.eval()
    name = str(source)
    if name.startswith(HUB):
        from huggingface_hub import snapshot_download

        name, _, revision = name.removeprefix(HUB).partition("@")
        name = snapshot_download(name, revision=revision or None, allow_patterns=["config.json", "*.safetensors"])
    check_source(name)
    folder = Path(name)
    if (folder / "config.json").is_file():
        if '"segmenter"' in (folder / "config.json").read_text():
            return Segmenter.load(folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return timm.create_model(name, pretrained=True).eval()
