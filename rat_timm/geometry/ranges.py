"""The pixel sizes that a model was trained and validated at, and a warning about images of others.

A model learns its range from whoever trained it. It is saved with the weights, stands on the model card, and is known
again to whoever loads them:

```python
import tempfile
import timm
from rat_timm import hub

folder = tempfile.mkdtemp()
hub.save(timm.create_model("test_rat"), folder, spacing_range=(0.25, 2.0))  # or one pair per axis
model = timm.create_model(f"local-dir:{folder}", pretrained=True)
assert model.spacing_range == ((0.25, 2.0), (0.25, 2.0))
```

``model(image, spacing=4.0)`` now warns, once, that the model was validated at 0.25 to 2; the result is what it would
have been. ``model.spacing_range = None`` forgets the range; who trains on sets a new one.
"""

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias, cast

import torch

from .grid import Grid, Pyramid
from .read import Told

SpacingRange: TypeAlias = tuple[tuple[float, float], ...]
"""The smallest and the largest pixel size, along each axis."""

RangeLike: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | None
"""A pair (low, high) for all axes, or one pair per axis; None if it is not known."""

_ROUNDING = 1e-6  # relative: what float32 and files make of a number


class _Watch:
    """A range, and whether somebody was told of a call outside; replicas of a model share it."""

    def __init__(self, spacing_range: SpacingRange) -> None:
        self.range, self.has_warned = spacing_range, False


class KnowsRange:
    """What models of images know of pixel sizes: which ones they were trained and validated at."""

    reference_spacing: tuple[float, ...]
    _watch: _Watch | None = None

    @property
    def spacing_range(self) -> SpacingRange | None:
        """(low, high) per axis, in array-axis order (z, y, x) and the unit of the reference spacing; None: not known.

        It may be set, to a pair for all axes or to one per axis. `rat_timm.hub.save` saves it. A call that is told a
        spacing outside warns, once per model; nothing is changed or clipped. Compiled and traced models do not warn.
        """
        return None if self._watch is None else self._watch.range

    @spacing_range.setter
    def spacing_range(self, value: RangeLike) -> None:
        known = read_range(value, len(self.reference_spacing))
        self._watch = None if known is None else _Watch(known)

    def _check_range(self, told: Told, images: Pyramid) -> None:
        """Warns if a user has told of a spacing outside: that of any sample, of level 0 of a pyramid."""
        if torch.compiler.is_compiling() or self._watch is None or self._watch.has_warned:
            return
        if not isinstance(images, Pyramid) or told.spacing is None:  # symbolic tracing has no images yet
            return
        outside = _first_outside(images.levels[0].grid, self._watch.range)
        if outside is None:
            return
        self._watch.has_warned = True
        warnings.warn(
            f"spacing {tuple(float(f'{s:.6g}') for s in outside)} is outside of what the model was trained and "
            f"validated at: {describe_range(self._watch.range)}. (A model warns once.)",
            stacklevel=3,
        )


def read_range(value: RangeLike, axes: int) -> SpacingRange | None:
    """Reads a range of pixel sizes.

    Raises:
        ValueError: If it is not a pair of positive numbers, the lower first, or one such pair per axis.
    """
    if value is None:
        return None
    pairs = [value] * axes if _is_pair(value) else value
    if not isinstance(pairs, (list, tuple)) or len(pairs) != axes or not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            f"spacing_range must be two positive numbers, the lower first, or {axes} such pairs, one per axis, "
            f"got {value!r}"
        )
    return tuple((float(low), float(high)) for low, high in cast(Sequence[tuple[float, float]], pairs))


def range_of_json(spacing_range: SpacingRange | None) -> list | None:
    """Returns what `read_range` reads: one pair where all axes share it, which fits any number of axes."""
    if spacing_range is None:
        return None
    pairs = [list(pair) for pair in spacing_range]
    return pairs[0] if pairs.count(pairs[0]) == len(pairs) else pairs


def describe_range(spacing_range: SpacingRange) -> str:
    """Returns a range in words."""
    words = [f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in spacing_range]
    if len(set(words)) == 1:
        return f"{words[0]} along each axis"
    return ", ".join(f"{word} along {axis}" for word, axis in zip(words, "zyx"[-len(words) :], strict=True))


def _is_pair(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(v, Real) for v in value):
        return False
    return 0 < value[0] <= value[1] < float("inf")


def _first_outside(grid: Grid, spacing_range: SpacingRange) -> tuple[float, ...] | None:
    if grid.numbers.spacing is not None:
        rows = [grid.numbers.spacing]
    elif grid.spacing.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(grid.spacing):
        return None  # no values yet, or several at once
    else:  # on a GPU this waits for it, as reading the spacing has just done
        rows = grid.spacing.tolist()
    for row in rows:
        for step, (low, high) in zip(row, spacing_range, strict=True):
            if not low * (1 - _ROUNDING) <= step <= high * (1 + _ROUNDING):
                return tuple(row)
    return None
