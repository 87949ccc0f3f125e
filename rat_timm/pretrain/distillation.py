"""Distillation at physical coordinates: a student learns what a teacher's map has at the student's places.

A teacher of images teaches a student of volumes by slices: along the axis across them the student's map is sampled
where the slices are, in the plane the teacher's where the student's places are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dense.backbone import Backbone, in_parts, last_infos, last_maps, make_backbone, parts_for, read_for
from ..dense.decoders import BEYOND
from ..geometry.grid import Grid, Pyramid, Tokens, axis_values, channels_first
from ..geometry.parts import Part
from ..geometry.read import Told, what_is_told
from ..geometry.resample import resample
from ..geometry.sample import sample_at
from ..geometry.types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike
from ..models import RatVit, ResolutionAwareTransformer
from ..ops.masking import pool_mask
from .masked import read_alone


class Teacher(nn.Module):
    """A model that is not trained, and the map that it teaches, normalised at each place.

    Args:
        model: Of this package, or of timm's with ``forward_intermediates`` and ``feature_info``.
        index: Of the map among those of ``forward_intermediates``.
        spacing: Pixel size, for all axes or one per axis, to which images are brought before the teacher gets them: for
            models that know pixels and not their size. Default: images are given as they are.

    Attributes:
        num_features: Width of the map.

    Raises:
        ValueError: If the model has no maps.
    """

    def __init__(self, model: nn.Module, index: int = -1, *, spacing: float | Sequence[float] | None = None) -> None:
        super().__init__()
        infos: Any = getattr(model, "feature_info", None)
        if not hasattr(model, "forward_intermediates") or not infos:
            raise ValueError(f"model must have forward_intermediates and feature_info, got {type(model).__name__}")
        self.model: Any = model.eval().requires_grad_(False)
        self.index, self.spacing = range(len(infos))[index], spacing
        self.num_features, self.reduction = infos[index]["num_chs"], infos[index]["reduction"]
        self.spatial_dims: int = getattr(model, "spatial_dims", 2)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.register_buffer("shift", torch.zeros(1), persistent=False)

    @classmethod
    def create(
        cls, name: str | Path, index: int = -1, *, spacing: float | Sequence[float] | None = None, **kwargs: Any
    ) -> "Teacher":
        """Makes a teacher by its name.

        Args:
            name: That timm knows, or a folder that `rat_timm.hub.save` wrote.
            index: See the class.
            spacing: See the class.
            **kwargs: Of ``timm.create_model``; ``pretrained`` is on by default.
        """
        known = f"local-dir:{name}" if Path(name).is_dir() else str(name)
        model = timm.create_model(known, **{"pretrained": True, "num_classes": 0, **kwargs})
        return cls(model, index, spacing=spacing)

    def rescale(self, student: nn.Module) -> None:
        """Brings images that are normalised for a student's ``pretrained_cfg`` to what the teacher's says."""
        channels = getattr(self.model, "in_chans", 3)
        models: list[Any] = [student, self.model]
        (mean, std), (own_mean, own_std) = (
            [_of_channels(model.pretrained_cfg[name], channels).to(self.shift) for name in ("mean", "std")]
            for model in models
        )
        self.scale, self.shift = std / own_std, (mean - own_mean) / own_std

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tokens) -> Tokens:
        """Returns the map of an image ``[B, *size, C]``: ``[B, *grid, num_features]``, float32.

        Raises:
            ValueError: If the image has another number of axes.
        """
        axes = len(image.grid.shape)
        if axes != self.spatial_dims:
            raise ValueError(f"image must have the teacher's {self.spatial_dims} axes, got {axes}")
        image = image._replace(x=image.filled() * self.scale + self.shift)
        if self.spacing is not None:
            image = resample(image, axis_values(self.spacing, "spacing", axes))
        ours = isinstance(self.model, (ResolutionAwareTransformer, RatVit))
        made = self._of_ours(image) if ours else self._of_timm(image)
        x = F.layer_norm(made.x.float(), made.x.shape[-1:])
        return made._replace(x=x)

    def _of_ours(self, image: Tokens) -> Tokens:
        out = self.model.forward_intermediates(
            channels_first(image.x),
            [self.index],
            norm=True,
            output_dict=True,
            intermediates_only=True,
            spacing=image.grid.spacing,
            mask=image.mask,
            origin=image.grid.origin,
        )
        x, grid, mask = (out[name][0] for name in ("image_intermediates", "grids", "masks"))
        return Tokens(x.movedim(1, -1), grid, mask)

    def _of_timm(self, image: Tokens) -> Tokens:
        (x,) = self.model.forward_intermediates(
            channels_first(image.filled()), indices=[self.index], norm=True, intermediates_only=True
        )
        step, shape = self.reduction, tuple(x.shape[2:])
        grid, mask = image.grid, image.mask
        lower = grid.corners()[0]
        if mask is not None:
            mask = pool_mask(mask, [step] * len(shape))[(slice(None), *map(slice, shape))]
        made = Grid(shape, grid.spacing * step, lower + grid.spacing * step / 2)
        return Tokens(x.movedim(1, -1), made, mask)


def _of_channels(values: Sequence[float], channels: int) -> Tensor:
    """Returns numbers of colours, or their mean for images that have other channels."""
    numbers = torch.tensor(values)
    return numbers if len(values) == channels else numbers.mean().reshape(1)


class Lesson(NamedTuple):
    """A teacher's map.

    Attributes:
        maps: ``[B, *grid, C]``; of slices with an axis for them.
        axis: Across the slices; None for a map of the whole image.
    """

    maps: Tokens
    axis: int | None = None

    def compare(self, student: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Samples both maps where they are compared.

        Args:
            student: ``[B, *grid, C]``.

        Returns:
            The student's and the teacher's features, ``[B, *places, C]``, and which places both have,
            ``[B, *places]``.
        """
        grid = student.grid
        if self.axis is not None:
            grid = with_axis(grid, self.maps.grid, self.axis)
            student = sample_at(student, grid, BEYOND)
        taught = sample_at(self.maps, grid)
        valid = taught.mask if student.mask is None else taught.mask & student.mask  # type: ignore[operator]
        assert valid is not None
        return student.x, taught.x, valid

    def loss(self, student: Tokens) -> Tensor:
        """Returns the mean smooth L1 distance over the places of each sample, ``[B]``; zero where there are none."""
        own, taught, valid = self.compare(student)
        distance = F.smooth_l1_loss(own.float(), taught, reduction="none").mean(dim=-1)
        counts = valid.flatten(1).sum(dim=1)
        return torch.where(valid, distance, 0.0).flatten(1).sum(dim=1) / counts.clamp(min=1)


def with_axis(grid: Grid, other: Grid, axis: int) -> Grid:
    """Returns a grid that has the places of another one along one axis."""
    rows = max(len(grid.spacing), len(other.spacing))
    shape = list(grid.shape)
    shape[axis] = other.shape[axis]

    def with_values(own: Tensor, theirs: Tensor) -> Tensor:
        both = own.expand(rows, -1).clone()
        both[:, axis] = theirs.expand(rows, -1)[:, axis]
        return both

    return Grid(tuple(shape), with_values(grid.spacing, other.spacing), with_values(grid.origin, other.origin))


def lessons(
    teacher: Teacher,
    x: ImageOrPyramid,
    *,
    spacing: SpacingLike = None,
    mask: MaskLike = None,
    origin: OriginLike = None,
    planes: Sequence[int] = (0,),
    slices: int = 4,
    start: Tensor | None = None,
) -> list[Lesson]:
    """Asks a teacher.

    Args:
        teacher: Of images, or of what the student is of.
        x: Images or volumes ``[B, C, *size]``; of a pyramid, level 0 is taught.
        spacing: Physical pixel size; see `rat_timm`. Default: 1.
        mask: ``[B, *size]``, True = valid, or one per level.
        origin: Physical position of the first pixel's centre.
        planes: Of volumes, for a teacher of images: the axes across which slices are taken, 0 for slices (y, x).
        slices: How many of each plane, at regular distances.
        start: ``[B, planes]``, from 0 to below 1: where the first slice is, from the first place at which it can be to
            the last. Default: in the middle.

    Returns:
        A lesson for each plane, or one.

    Raises:
        ValueError: If an argument is out of range.
    """
    images = read_alone(x, spacing, mask, origin)
    image = images.levels[0]
    axes = len(image.grid.shape)
    if axes == teacher.spatial_dims:
        return [Lesson(teacher(image))]
    if slices < 1 or not planes or any(axis not in range(axes) for axis in planes):
        raise ValueError(f"slices must be positive and planes among {list(range(axes))}, got {slices}, {list(planes)}")
    if start is None:
        start = image.x.new_full((len(image.x), len(planes)), 0.5)
    return [_by_slices(teacher, image, axis, slices, start[:, i]) for i, axis in enumerate(planes)]


def _by_slices(teacher: Teacher, volume: Tokens, axis: int, slices: int, start: Tensor) -> Lesson:
    """Teaches slices across an axis."""
    batch, n = len(volume.x), volume.grid.shape[axis]
    count = min(slices, n)
    step = n // count
    first = (start.to(volume.grid.spacing) * (n - (count - 1) * step)).long()  # [B]
    chosen = first[:, None] + torch.arange(count, device=first.device) * step  # [B, count]
    maps = teacher(_cut(volume, axis, chosen))
    spacing, origin = (values.expand(batch, -1) for values in (volume.grid.spacing, volume.grid.origin))
    shape = list(maps.grid.shape)
    shape.insert(axis, count)
    grid = Grid(
        tuple(shape),
        _inserted(maps.grid.spacing, axis, spacing[:, axis] * step),
        _inserted(maps.grid.origin, axis, origin[:, axis] + spacing[:, axis] * first),
    )

    def stacked(maps: Tensor) -> Tensor:  # [B * count, *plane, ...] -> [B, ..., count, ...]
        return maps.unflatten(0, (batch, count)).movedim(1, 1 + axis)

    mask = None if maps.mask is None else stacked(maps.mask)
    return Lesson(Tokens(stacked(maps.x), grid, mask), axis)


def _cut(volume: Tokens, axis: int, chosen: Tensor) -> Tokens:
    """Cuts slices ``[B, count]`` out of volumes; returns them as images, ``[B * count, *plane, C]``."""
    samples = torch.arange(len(chosen), device=chosen.device)[:, None]

    def cut(x: Tensor) -> Tensor:
        return x.movedim(1 + axis, 1)[samples, chosen].flatten(0, 1)

    plane = [other for other in range(len(volume.grid.shape)) if other != axis]

    def in_plane(rows: Tensor) -> Tensor:
        return rows.expand(len(chosen), -1)[:, plane].repeat_interleave(chosen.shape[1], dim=0)

    shape = tuple(volume.grid.shape[other] for other in plane)
    grid = Grid(shape, in_plane(volume.grid.spacing), in_plane(volume.grid.origin))
    return Tokens(cut(volume.x), grid, None if volume.mask is None else cut(volume.mask))


def _inserted(rows: Tensor, axis: int, values: Tensor) -> Tensor:
    """Puts a value ``[B]`` for an axis into rows of the others, ``[1 or B * count, axes]``: ``[B, axes + 1]``."""
    rows = rows.expand(len(values), -1) if len(rows) == 1 else rows[:: len(rows) // len(values)]
    return torch.cat((rows[:, :axis], values[:, None].to(rows), rows[:, axis:]), dim=1)


class Distiller(nn.Module):
    """A student: a backbone, and a linear projection of its normalised maps to a teacher's width.

    Args:
        backbone: A registered name of a hierarchical or plain RAT, or such a model, whose classifier is removed.
        num_features: Width of the teacher's map.
        in_chans: Number of image channels. Default: the backbone's.
        stages: Of a hierarchical backbone: how many stages, counted from the last, are projected. They are added up on
            the finest one's grid.
        **backbone_kwargs: Of ``timm.create_model``, for a name.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_features: int,
        in_chans: int | None = None,
        stages: int = 2,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.backbone: Backbone = make_backbone(backbone, in_chans, backbone_kwargs)
        widths = [info["num_chs"] for info in last_infos(self.backbone, stages)]
        self.stages, self.num_features = stages, num_features
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_features)) for width in widths
        )

    def forward(
        self, x: ImageOrPyramid, *, spacing: SpacingLike = None, mask: MaskLike = None, origin: OriginLike = None
    ) -> Tokens:
        """Returns what the student says of level 0's places: ``[B, *grid, num_features]``; see the backbone's."""
        told = what_is_told(x, spacing, mask, origin)
        parts = parts_for(self.backbone, read_for(self.backbone, x, told), told)
        return in_parts(self, lambda part: self._project(part, told), parts, [part.rows for part in parts]).levels[0]

    def _project(self, part: Part, told: Told) -> Pyramid:
        maps = last_maps(self.backbone, part.images, told, self.stages)[0]
        made = [tokens._replace(x=project(tokens.x)) for project, tokens in zip(self.projections, maps, strict=True)]
        finest = made[0]
        x = torch.stack([finest.filled(), *(sample_at(other, finest.grid, BEYOND).x for other in made[1:])]).sum(dim=0)
        return Pyramid([finest._replace(x=x)])
