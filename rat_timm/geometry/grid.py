"""Where tokens are: regular grids in physical space, and the tokens that stand on them."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
N = TypeVar("N", int, float)

_HUGE = 1e30  # from here on, distances of some million pixels overflow in float32; their ratios from its inverse on

Scalars = float | Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor] | Tensor
"""A physical quantity: one number, one value per axis, or ``[batch, axes]``; always in array-axis order (z, y, x).

A list of tensors ``[batch]`` has one per axis: PyTorch's default collate makes it of the samples' tuples. (Where there
are several levels, a list has one entry for each of them.)
"""


class Positions(NamedTuple):
    """Where tokens are as seen by one layer, in that layer's unit of length.

    Attributes:
        offset: Displacement from the layer's centre, one float32 tensor per axis, together broadcastable to
            ``[1 or B, *grid]``: on a grid each depends on the place along its own axis only. Zero means "not rotated".
        spacing: Distance between neighbours on the token's own grid, likewise, broadcastable to ``offset``.
    """

    offset: tuple[Tensor, ...]
    spacing: tuple[Tensor, ...]

    def dense(self) -> "Positions":
        """Returns the same with ``[1 or B, *grid]`` for every axis."""
        full = torch.broadcast_tensors(*self.offset)
        return Positions(full, tuple(s.expand_as(o) for s, o in zip(self.spacing, full, strict=True)))


class Numbers(NamedTuple):
    """What a grid's tensors hold, in Python's numbers; None where only the tensor tells, or samples differ.

    Sizes may depend on them, and what is worked out of them once serves every image of the kind.

    Attributes:
        spacing: One per axis.
        origin: One per axis.
    """

    spacing: tuple[float, ...] | None = None
    origin: tuple[float, ...] | None = None

    def moved(self, stride: Sequence[float], shift: Sequence[float]) -> "Numbers":
        """Returns those of a grid that starts ``shift`` places further on and takes steps of ``stride`` places."""
        if self.spacing is None:
            return Numbers()
        spacing = tuple(s * n for s, n in zip(self.spacing, stride, strict=True))
        if self.origin is None:
            return Numbers(spacing)
        return Numbers(spacing, tuple(o + s * d for o, s, d in zip(self.origin, self.spacing, shift, strict=True)))


class Grid(NamedTuple):
    """A regular grid of pixel or token centres: the one carrier of geometry.

    Attributes:
        shape: Number of places along each axis, in array-axis order (z, y, x).
        spacing: Physical distance between neighbours, ``[1 or B, axes]``: one row for the batch or one per sample.
        origin: Physical position of the first place's centre (as in NIfTI and OME-NGFF), ``[1 or B, axes]``.
        numbers: The same in Python's numbers, as far as a user gave numbers.
    """

    shape: tuple[int, ...]
    spacing: Tensor
    origin: Tensor
    numbers: Numbers = Numbers()

    @classmethod
    def create(
        cls,
        shape: Sequence[int],
        spacing: Scalars = 1.0,
        origin: Scalars | None = None,
        batch_size: int = 1,
        device: torch.device | None = None,
    ) -> "Grid":
        """Builds a grid from what a user says about an image.

        Args:
            shape: Number of pixels along each axis.
            spacing: Physical size of a pixel: a number, one value per axis, ``[B, axes]``, or one tensor ``[B]`` per
                axis.
            origin: Physical position of the first pixel's centre, in the same forms. Default: half the spacing, so that
                images of one field of view at several resolutions share their outer corner.
            batch_size: Number of samples, which a ``[B, axes]`` argument must match.
            device: Where the geometry is kept.

        Raises:
            ValueError: If a value has another form, is not finite, or a spacing is not positive.
        """
        axes = len(shape)
        rows = per_axis(spacing, "spacing", axes, batch_size, device, positive=True)
        step = _numbers(spacing, axes)
        if origin is None:
            return cls(tuple(shape), rows, rows / 2, Numbers(step, _along(step, 0.5)))
        start = per_axis(origin, "origin", axes, batch_size, device)
        return cls(tuple(shape), rows, start, Numbers(step, _numbers(origin, axes)))

    def conv(self, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> "Grid":
        """Returns the grid on which a convolution of this grid puts its results."""
        shape = tuple(
            (n + 2 * p - k) // s + 1 for n, k, s, p in zip(self.shape, kernel_size, stride, padding, strict=True)
        )
        shift = [(k - 1) / 2 - p for k, p in zip(kernel_size, padding, strict=True)]
        return Grid(
            shape,
            self.spacing * self.spacing.new_tensor(list(stride)),
            self.origin + self.spacing * self.spacing.new_tensor(shift),
            self.numbers.moved(stride, shift),
        )

    def corners(self) -> tuple[Tensor, Tensor]:
        """Returns the outer corners of the field of view, lower and upper, each ``[1 or B, axes]``."""
        lower = self.origin - self.spacing / 2
        return lower, lower + self.spacing * self.spacing.new_tensor(self.shape)

    def coordinates(self) -> Tensor:
        """Returns the physical position of every centre, ``[1 or B, *shape, axes]``."""
        ticks = [self._ticks(axis) for axis in range(len(self.shape))]
        index = torch.stack(torch.broadcast_tensors(*ticks), dim=-1)  # [*shape, axes]
        return self._rows(self.origin) + index * self._rows(self.spacing)

    def positions(self, center: Tensor, unit: Sequence[float]) -> Positions:
        """Returns the centres as displacements from ``center`` ``[1 or B, axes]``, divided by ``unit`` per axis.

        Raises:
            ValueError: If somebody has brought the geometry to half precision, in which positions are lost.
        """
        check_exact(self.spacing, "spacing")
        offset, spacing = [], []
        for axis, length in enumerate(unit):
            shape = [-1, *(1 for _ in self.shape)]
            step, start = self.spacing[:, axis].view(shape), (self.origin - center)[:, axis].view(shape)
            offset.append(((start + self._ticks(axis) * step) / length).float())
            spacing.append((step / length).float())
        return Positions(tuple(offset), tuple(spacing))

    def _ticks(self, axis: int) -> Tensor:
        ticks = torch.arange(self.shape[axis], device=self.origin.device, dtype=self.origin.dtype)
        return ticks.view([-1 if other == axis else 1 for other in range(len(self.shape))])

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *(1 for _ in self.shape), len(self.shape))  # [1 or B, 1.., axes]


class Tokens(NamedTuple):
    """One level of a pyramid: features, where they are, and which of them are real.

    Attributes:
        x: Features, ``[B, *grid.shape, C]``.
        grid: The places they stand at.
        mask: ``[B, *grid.shape]``, bool, True = valid; None if all are.
    """

    x: Tensor
    grid: Grid
    mask: Tensor | None = None

    def filled(self) -> Tensor:
        """Returns the features with zeros at the invalid places."""
        return fill(self.x, self.mask)


class Pyramid(NamedTuple):
    """What travels through the model: levels that share blocks, and prefix tokens that have no place.

    Attributes:
        levels: One entry per image of the pyramid.
        prefix: ``[B, P, C]``, or None before the first stage that has them.
        single: Whether the user gave one image and not a list.
        is_constant: Whether numbers alone say where images are, to no tracer, so that what is worked out of them may be
            kept for the next images of the kind.
    """

    levels: list[Tokens]
    prefix: Tensor | None = None
    single: bool = True
    is_constant: bool = False

    def unwrap(self, per_level: list[T]) -> T | list[T]:
        """Returns a list with one entry per level as it is, or its only entry where the user gave one image."""
        return per_level[0] if self.single else per_level

    @property
    def features(self) -> list[Tensor]:
        """The levels' features, channels last, zero where invalid."""
        return [tokens.filled() for tokens in self.levels]

    @property
    def masks(self) -> list[Tensor | None]:
        """The levels' masks, True = valid."""
        return [tokens.mask for tokens in self.levels]


def fill(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` ``[B, *grid, C]`` with zeros where ``mask`` ``[B, *grid]`` is False; None masks nothing."""
    return x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the type to compute in where half precisions would lose too much: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_exact(geometry: Tensor, name: str) -> None:
    """Raises ``ValueError`` if geometry is in half precision."""
    if geometry.dtype.itemsize < 4:
        raise ValueError(
            f"{name} must be float32 or float64 inside the model, got {geometry.dtype}: FSDP's mixed precision casts "
            "what modules are given; set cast_forward_inputs=False and give images in the parameters' type"
        )


def channels_first(x: Tensor) -> Tensor:
    """``[B, *grid, C]`` -> ``[B, C, *grid]``."""
    return x.movedim(-1, 1)


def channels_last(x: Tensor) -> Tensor:
    """``[B, C, *grid]`` -> ``[B, *grid, C]``."""
    return x.movedim(1, -1)


def field_center(grids: Sequence[Grid]) -> Tensor:
    """Returns the centre of the box around the fields of view of all ``grids``, ``[1 or B, axes]``.

    It moves with the grids and does not depend on their order.
    """
    lower, upper = zip(*(grid.corners() for grid in grids), strict=True)
    low, high = lower[0], upper[0]
    for other_low, other_high in zip(lower[1:], upper[1:], strict=True):
        low, high = torch.minimum(low, other_low), torch.maximum(high, other_high)
    return (low + high) / 2


def pyramid_grids(
    shapes: Sequence[Sequence[int]],
    spacing: Scalars | Sequence[Scalars | None] | None = None,
    origin: Scalars | Sequence[Scalars | None] | None = None,
    *,
    reference: Sequence[float],
    batch_size: int = 1,
    device: torch.device | None = None,
) -> list[Grid]:
    """Builds the grids of a pyramid's levels.

    Args:
        shapes: The levels' sizes in pixels.
        spacing: None (level 0 has the reference spacing), one entry (level 0's), or a list with one entry per level; an
            entry is a number, one value per axis, or a ``[B, axes]`` tensor. Where it is not given, a level's spacing
            follows from level 0 by the ratio of their sizes.
        origin: Likewise; where it is not given, levels share the outer corner of level 0's field of view,
            which lies at zero by default.
        reference: The model's reference spacing, per axis.
        batch_size: Number of samples.
        device: Where the geometry is kept.

    Raises:
        ValueError: If an argument has another form; the message names the level.
    """
    axes = len(shapes[0])
    spacings = _per_level(spacing, "spacing", len(shapes), axes)
    origins = _per_level(origin, "origin", len(shapes), axes)
    grids: list[Grid] = []
    for level, shape in enumerate(shapes):
        try:
            size, start = spacings[level], origins[level]
            if level == 0:
                grids.append(Grid.create(shape, reference if size is None else size, start, batch_size, device))
            else:
                grids.append(_lower_level(grids[0], shape, size, start, batch_size, device))
        except ValueError as error:
            raise ValueError(f"level {level}: {error}" if len(shapes) > 1 else str(error)) from None
    return grids


def _numbers(value: Any, axes: int) -> tuple[float, ...] | None:
    """Returns a physical quantity per axis if Python's numbers say it, None if a tensor does."""
    values = (value,) * axes if _is_number(value) else value
    said = isinstance(values, (list, tuple)) and all(_is_number(v) for v in values)
    if not said:
        return None
    # a compiler knows them as symbols, so that one program serves all; `fixed` makes constants of them
    return tuple(values) if torch.compiler.is_compiling() else tuple(float(v) for v in values)


def _along(values: Sequence[float] | None, factor: float) -> tuple[float, ...] | None:
    return None if values is None else tuple(v * factor for v in values)


def fixed(number: N) -> N:
    """Returns a number on which sizes depend as a constant of the program that a compiler makes.

    Compilers take a number, or a size, that has changed for one that may be any: all that is worked out of it is then
    symbolic, and one such program takes longer to compile than ten of constants.
    """
    if not torch.compiler.is_compiling():
        return number
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # takes long to import

    return cast(N, guard_scalar(number))


def _lower_level(
    base: Grid,
    shape: Sequence[int],
    spacing: Scalars | None,
    origin: Scalars | None,
    batch_size: int,
    device: torch.device | None,
) -> Grid:
    """Builds another level's grid; what is not given follows from level 0's field of view."""
    if spacing is None and origin is not None:
        raise ValueError("origin without spacing: a field of view that starts elsewhere need not have level 0's extent")
    if spacing is None:
        ratio = [a / b for a, b in zip(base.shape, shape, strict=True)]
        # from pixel centre to pixel centre, both half a pixel from the corner
        numbers = base.numbers.moved(ratio, [(r - 1) / 2 for r in ratio])
        rows = base.spacing * base.spacing.new_tensor(ratio)
        return Grid(tuple(shape), rows, base.corners()[0] + rows / 2, numbers)
    grid = Grid.create(shape, spacing, origin, batch_size, device)
    if origin is None:
        step, start = grid.numbers.spacing, None
        if step and base.numbers.spacing and base.numbers.origin:
            pairs = zip(base.numbers.origin, base.numbers.spacing, step, strict=True)
            start = tuple(first + (own - other) / 2 for first, other, own in pairs)
        grid = grid._replace(origin=base.corners()[0] + grid.spacing / 2, numbers=Numbers(step, start))
    return grid


def per_axis(
    value: Scalars,
    name: str,
    axes: int,
    batch_size: int = 1,
    device: torch.device | None = None,
    positive: bool = False,
) -> Tensor:
    """Reads a number, one value per axis, or ``[B, axes]`` into a ``[1 or B, axes]`` tensor.

    They must be finite, and ``positive`` where that is said; a tensor's values are not looked at while tracing.
    float64, so that positions stay exact however far the origin is; float32 where a device has no float64 (MPS).
    """
    dtype = torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64
    values: Any = (value,) * axes if _is_number(value) else value
    if isinstance(values, (list, tuple)) and all(_is_number(v) for v in values):
        _check_numbers(values, name, positive)
        # not as_tensor, for which torch.compile would make one program per value
        rows = torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])
    else:
        rows = _as_rows(values, name, dtype, device)
        _check_tensor(rows, name, positive)
    if rows.ndim == 0:
        return rows.expand(1, axes)
    # the rows' number last, and with the batch's first: a comparison fixes a dynamic size in an export
    if rows.ndim > 2 or rows.shape[-1] != axes or (rows.ndim == 2 and rows.shape[0] not in (batch_size, 1)):
        raise ValueError(
            f"{name} must be a number, {axes} values (one per axis, in array order), "
            f"or have shape [{batch_size}, {axes}] (one row per sample), got shape {list(rows.shape)}"
        )
    return rows.reshape(-1, axes)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)  # Python's and NumPy's


def _as_rows(value: Any, name: str, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    try:
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) and v.ndim == 1 for v in value):
            return torch.stack([v.to(device=device, dtype=dtype) for v in value], dim=-1)  # one per axis
        return torch.as_tensor(value, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, got {value!r}") from error


def _check_numbers(values: Sequence[float], name: str, positive: bool) -> None:
    least = 1 / _HUGE if positive else -_HUGE
    if not all(least < v < _HUGE for v in values):
        raise ValueError(f"{name} must be {_kind(positive)}, got {tuple(values)}")


def _check_tensor(rows: Tensor, name: str, positive: bool) -> None:
    if torch.compiler.is_compiling() or rows.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(rows):
        return  # a traced tensor has no values yet, one that is mapped over (vmap) has several
    valid = (rows > (1 / _HUGE if positive else -_HUGE)) & (rows < _HUGE)
    if not bool(valid.all()):
        raise ValueError(f"{name} must be {_kind(positive)}, got {rows.tolist()}")


def _kind(positive: bool) -> str:
    return f"positive and from {1 / _HUGE:g} to {_HUGE:g}" if positive else f"finite and less than {_HUGE:g}"


def _per_level(value: Any, name: str, levels: int, axes: int) -> list:
    """Spreads an argument over the levels, None where a level's value is to be derived."""
    derived = [None] * (levels - 1)
    if not isinstance(value, (list, tuple)):
        return [value, *derived]
    numbers = all(_is_number(entry) for entry in value)
    if levels == 1:
        return [value[0] if len(value) == 1 else value]
    if numbers and len(value) == axes:
        if axes == levels:
            raise ValueError(
                f"{name} {value!r} may mean {axes} axes or {levels} levels: "
                f"give [{tuple(value)!r}] for level 0, or one tuple per level"
            )
        return [value, *derived]
    if len(value) not in (1, levels):
        raise ValueError(f"{name} must have one entry per level ({levels}) or one for level 0, got {len(value)}")
    return [*value, *derived][:levels]


def axis_values(value: float | Sequence[float], name: str, axes: int) -> tuple[float, ...]:
    """Reads a constructor's number or per-axis sequence of positive numbers."""
    return tuple(float(v) for v in _axis_numbers(value, name, axes))


def _axis_numbers(value: Any, name: str, axes: int) -> Sequence[Real]:
    values = (value,) * axes if _is_number(value) else value
    fits = isinstance(values, (list, tuple)) and len(values) == axes and all(_is_number(v) for v in values)
    if not fits or not all(0 < v < math.inf for v in values):
        raise ValueError(f"{name} must be a positive number or {axes} of them (one per axis), got {value!r}")
    return values


def integers(value: int | Sequence[int], name: str, axes: int) -> tuple[int, ...]:
    """Reads a positive whole number or one per axis."""
    values = [v for v in _axis_numbers(value, name, axes) if isinstance(v, Integral)]
    if len(values) != axes:
        raise ValueError(f"{name} must be whole, got {value!r}")
    return tuple(int(v) for v in values)


def merge_axes(values: Sequence[float]) -> float | list[float]:
    """Returns one number for values that all axes share, which fits any number of axes; else a list of them."""
    return values[0] if len(set(values)) == 1 else list(values)
