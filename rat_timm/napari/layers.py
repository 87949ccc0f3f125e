"""From napari's layers to layers: what their scale, units and axes say, and where a prediction lies among them.

Layers are asked for ``name``, ``data``, ``ndim``, ``rgb``, ``multiscale``, ``units``, ``axis_labels`` and
``data_to_world``, and nothing of napari is imported here.
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..data.pyramid import Level
from ..data.readers import read_grids
from ..data.units import is_length, metres_of
from ..geometry.grid import Grid, per_axis
from ..predict import Options, predict
from ..predict.facts import as_trained
from ..predict.network import Network, load_model
from ..predict.store import read_whole

if TYPE_CHECKING:
    from napari.layers import Image, Layer

LayerData: TypeAlias = tuple[np.ndarray, dict[str, Any], str]
"""What napari makes a layer of: the array, keywords of the layer, and its kind."""
_SAME = 1e-6


class Frame(NamedTuple):
    """Where a layer's pixels are in napari's world.

    Attributes:
        name: Of the layer.
        steps: From a pixel to the next along each axis, a column for each, ``[ndim, ndim]``.
        start: Where the first pixel's centre is, ``[ndim]``.
        units: Of each axis.
        labels: Of each axis.
    """

    name: str
    steps: np.ndarray
    start: np.ndarray
    units: tuple[str, ...]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, layer: "Layer", name: str) -> "Frame":
        """Reads a layer's transform.

        Raises:
            ValueError: If pixels are sheared: they have no size along each axis then.
        """
        start = np.array(layer.data_to_world([0] * layer.ndim), dtype=float)
        ends = [layer.data_to_world([float(i == axis) for i in range(layer.ndim)]) for axis in range(layer.ndim)]
        steps = np.array(ends, dtype=float).T - start[:, None]
        directions = steps / np.linalg.norm(steps, axis=0)
        if not np.allclose(directions.T @ directions, np.eye(layer.ndim), atol=_SAME):
            raise ValueError(f"{name} must not be sheared, as layer {layer.name!r} is by its affine or shear")
        return cls(layer.name, steps, start, tuple(map(str, layer.units)), tuple(layer.axis_labels))

    @property
    def sizes(self) -> np.ndarray:
        """How far it is from a pixel to the next along each axis."""
        return np.linalg.norm(self.steps, axis=0)

    def spacing(self, axes: int, unit: str) -> tuple[float, ...]:
        """Returns the pixel size along the last axes.

        Args:
            axes: How many.
            unit: In which, and of the scale of layers whose units are no lengths.

        Raises:
            ValueError: If nothing says it, or units differ between axes.
        """
        own = set(self.units[-axes:])
        if len(own) > 1:
            raise ValueError(
                f"image must have one unit along all {axes} axes, got {sorted(own)} in layer {self.name!r}"
            )
        sizes, (own_unit,) = self.sizes[-axes:], own
        if is_length(own_unit):
            return tuple(sizes * (metres_of(own_unit) / metres_of(unit)))
        if np.allclose(sizes, 1, rtol=_SAME):
            raise ValueError(f"spacing must be given: layer {self.name!r} has scale 1 and no unit of length")
        return tuple(sizes)

    def moved(self, first: Sequence[float], factors: Sequence[float]) -> dict[str, Any]:
        """Returns the keywords of a layer that starts at a pixel and whose pixels are larger by factors."""
        steps = self.steps * np.asarray(factors)
        start, sizes = self.start + self.steps @ np.asarray(first), np.linalg.norm(steps, axis=0)
        options: dict[str, Any] = {"scale": sizes, "units": self.units, "axis_labels": self.labels}
        directions = steps / sizes
        if np.allclose(directions, np.eye(len(sizes)), atol=_SAME):
            return {**options, "translate": start}
        affine = np.eye(len(sizes) + 1)
        affine[:-1, :-1], affine[:-1, -1] = directions, start
        return {**options, "affine": affine}


class Picture(NamedTuple):
    """An image that a model takes, made of layers.

    Attributes:
        level: Its pixels; the first one's centre is at zero.
        frame: Where the first layer is.
        first: The pixel of the layer along each axis with which it starts: where several stand for one, their middle.
        factors: How many pixels of the layer one stands for along each axis.
    """

    level: Level
    frame: Frame
    first: list[float]
    factors: list[float]

    def options(self, out: Grid) -> dict[str, Any]:
        """Returns the keywords of a layer for a map of the image, whose spacing and origin are the image's."""
        axes, step = len(out.shape), self.level.grid.spacing[0]
        first = [*self.first[:-axes], *(out.origin[0] / step).tolist()]
        return self.frame.moved(first, [*self.factors[:-axes], *(out.spacing[0] / step).tolist()])


def picture_of(
    layers: Sequence["Image"],
    axes: int,
    channels: int,
    unit: str = "um",
    spacing: float | Sequence[float] | None = None,
    channel_axis: int | None = None,
    position: Sequence[int] | None = None,
) -> Picture:
    """Makes an image for a model of layers.

    Args:
        layers: One, or several of one shape and place, each with some of the channels. Of a multiscale layer level 0.
        axes: Number of spatial axes of the model: the layers' last ones.
        channels: Number of channels of the model. Of RGBA, A is left out where it takes three.
        unit: See `Frame.spacing`.
        spacing: The pixel size, in place of the layer's scale.
        channel_axis: Axis of a layer with the channels. Default: of RGB the last one, else the one in front of the
            spatial axes that has as many, if the model takes more than one.
        position: Where to cut the image out along the other axes, one index for each axis of the layer; those of
            channels and space are not looked at.

    Raises:
        ValueError: If something does not fit.
    """
    if not layers:
        raise ValueError("image must be a layer, got none")
    frames = [Frame.of(layer, "image") for layer in layers]
    each = channels // len(layers)
    parts = [_part(layer, axes, each, channel_axis, position) for layer in layers]
    shape = parts[0].shape
    for part, frame in zip(parts, frames, strict=True):
        same = frame.steps.shape == frames[0].steps.shape and np.allclose(
            np.column_stack([frame.steps, frame.start]), np.column_stack([frames[0].steps, frames[0].start]), _SAME
        )
        if part.shape != shape or not same:
            raise ValueError(
                f"image must be layers of one shape, scale and place, got {frame.name!r} with {part.shape}"
            )
    step = frames[0].spacing(axes, unit) if spacing is None else spacing
    step = tuple(per_axis(step, "spacing", axes, positive=True)[0].tolist())
    grid = Grid.create(shape, step, [0.0] * axes)
    level = Level(grid, functools.partial(_read_all, [part.read for part in parts]))
    return Picture(level, frames[0], parts[0].first, parts[0].factors)


class _Part(NamedTuple):
    """The pixels of one layer that are read, and where they lie in it; see `Picture`."""

    shape: tuple[int, ...]
    read: Callable[[Sequence[slice]], Tensor]
    first: list[float]
    factors: list[float]


def _part(layer: "Image", axes: int, channels: int, channel_axis: int | None, position: Sequence[int] | None) -> _Part:
    pixels = layer.data[0] if layer.multiscale else layer.data
    shape, is_rgb = pixels.shape, bool(getattr(layer, "rgb", False))
    lead = layer.ndim - axes
    if lead < 0:
        raise ValueError(f"image must have {axes} axes, as the model has, got {layer.ndim} in layer {layer.name!r}")
    index: list[Any] = [None if position is None else int(position[axis]) for axis in range(lead)]
    first, factors = [*map(float, (i or 0 for i in index)), *[0.0] * axes], [1.0] * layer.ndim
    place = None if is_rgb else _channel_axis(layer.name, shape[:lead], channels, channel_axis)
    if place is not None:
        index[place], first[place], factors[place] = slice(None), (shape[place] - 1) / 2, float(shape[place])
    for axis, at in enumerate(index):
        if at is None and shape[axis] > 1:
            raise ValueError(f"position must be an index for axis {axis} of layer {layer.name!r}, of shape {shape}")
        if isinstance(at, int) and not 0 <= at < shape[axis]:
            raise ValueError(f"position must lie in layer {layer.name!r} of shape {shape}, got {at} for axis {axis}")
    leading = tuple(0 if at is None else at for at in index)
    keep = 3 if is_rgb and channels == 3 else None

    def read(region: Sequence[slice]) -> Tensor:
        part = np.asarray(pixels[(*leading, *region)])
        part = np.moveaxis(part, -1, 0)[:keep] if is_rgb else part if place is not None else part[None]
        return torch.from_numpy(np.ascontiguousarray(part, dtype=np.float64 if part.dtype == float else np.float32))

    return _Part(tuple(shape[lead : lead + axes]), read, first, factors)


def _channel_axis(name: str, leading: Sequence[int], channels: int, asked: int | None) -> int | None:
    if asked is not None:
        if not 0 <= asked < len(leading):
            raise ValueError(f"channel_axis must be in front of the spatial axes of layer {name!r}, got {asked}")
        return asked
    fitting = [axis for axis, n in enumerate(leading) if n == channels > 1]
    if len(fitting) > 1:
        raise ValueError(
            f"channel_axis must be one of {fitting}: several axes of layer {name!r} have {channels} places"
        )
    return fitting[0] if fitting else None


def _read_all(parts: Sequence[Callable[[Sequence[slice]], Tensor]], region: Sequence[slice]) -> Tensor:
    return torch.cat([read(region) for read in parts])


def mask_of(layer: "Layer", picture: Picture) -> Level:
    """Returns what a layer says is valid, where it is not zero, in the coordinates of an image.

    Args:
        layer: Of any pixel size, turned as the image is.
        picture: The image.

    Raises:
        ValueError: If it is turned otherwise, or has other axes.
    """
    axes = len(picture.level.grid.shape)
    part = _part(layer, axes, 1, None, None)
    frame = Frame.of(layer, "mask")
    ours, theirs = picture.frame.steps[-axes:, -axes:], frame.steps[-axes:, -axes:]
    index = np.linalg.solve(ours, theirs)  # a step of the mask in the image's pixels
    if not np.allclose(index, np.diag(np.diag(index)), atol=_SAME) or (np.diag(index) <= 0).any():
        raise ValueError(f"mask must be turned as the image is, which layer {layer.name!r} is not")
    first = np.linalg.solve(ours, frame.start[-axes:] - picture.frame.start[-axes:])
    step = picture.level.grid.spacing[0].numpy()
    return Level(Grid.create(part.shape, np.diag(index) * step, first * step), part.read)


def predict_layers(
    layers: Sequence["Image"],
    model: str | PathLike | nn.Module,
    *,
    mask: "Layer | None" = None,
    channel_axis: int | None = None,
    position: Sequence[int] | None = None,
    **options: Any,
) -> list[LayerData]:
    """Predicts an image of napari's layers.

    Args:
        layers: See `picture_of`.
        model: See `rat_timm.predict.predict`.
        mask: A layer that is not zero where pixels are valid: others influence nothing, and become 0.
        channel_axis: See `picture_of`.
        position: See `picture_of`.
        **options: Of `rat_timm.predict.Options`. Layers without a unit of length have their scale in ``unit``.

    Returns:
        A Labels layer for labels and instances; an Image layer for probabilities and features, with one axis more, in
        front. Both lie where the image does; along axes that were cut they have one place.

    Raises:
        ValueError: If an argument does not fit.
    """
    given = as_trained(Options(**{"progress": False, **options}), model)
    network = Network(load_model(model), given.task, given.stage)
    picture = picture_of(layers, network.axes, network.in_chans, given.unit, given.spacing, channel_axis, position)
    changes: dict[str, Any] = {"spacing": None}
    if mask is not None:
        changes["background"] = mask_of(mask, picture)
    with tempfile.TemporaryDirectory(prefix="rat_timm-") as folder:
        output = Path(folder) / "prediction.ome.zarr"
        predict([picture.level], network.model, output, given, **changes)
        return [_layer_data(read_whole(output), read_grids(output, given.unit)[0], picture, given.task)]


def _layer_data(values: np.ndarray, out: Grid, picture: Picture, task: str) -> LayerData:
    options = {**picture.options(out), "name": f"{picture.frame.name} {task}"}
    lead = (1,) * (len(picture.first) - len(out.shape))
    if task in ("labels", "instances"):
        return values.reshape(lead + out.shape).astype(np.int32), options, "labels"
    for name, value in (("scale", 1.0), ("translate", 0.0), ("units", "pixel"), ("axis_labels", "channel")):
        if name in options:
            options[name] = (value, *options[name])
    if "affine" in options:
        affine = np.eye(len(options["affine"]) + 1)
        affine[1:, 1:] = options["affine"]
        options["affine"] = affine
    return values.reshape(len(values), *lead, *out.shape), options, "image"
