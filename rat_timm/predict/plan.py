"""Tiles and windows: which part of the output is written at once, and what the model sees for it.

The output lies in tiles, each of which is one shard of the file: a task computes and writes one tile, and no other
touches it. A tile is put together from windows, each of which is one call of the model. Windows stand on a lattice of
the whole output, whatever the tiles are, so that tiles do not change what comes out.

    output   |        tile 0         |        tile 1         |
    exact    |  w 0  |  w 1  |  w 2  |  w 3  |  w 4  |  w 5  |        each with a halo as long as the model looks
    blended  | w0|  w 1  |  w 2  |  w 3  |  w 4  |  w 5  | w6|        each with a shorter halo; weights fall and rise

Where the halo is as long as the model looks, a window's values are those of the whole image. Where it is not, the
values of two windows differ at their seam, and are blended: weights fall from one to the other over half of the halo on
either side. Tiles then end in the middle of windows, which both tiles compute, so that neither waits for the other and
no sum of logits is kept for the whole image: that is what blending costs, (n + 1) windows for n along each axis of a
tile.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..geometry.box import Box, places_around
from ..geometry.grid import Grid
from .network import Network
from .source import rescaling

EDGES = {1: 4096, 2: 512, 3: 64}
"""Pixels of a window's own part along each axis, by the number of axes."""
CHUNKS = {1: 4096, 2: 256, 3: 64}
"""At most so many pixels of a chunk of the output along each axis."""
MOST_PIXELS = 1 << 22
"""Of a window, and of what it is compared with: longer halos than fit are shortened."""
TILE_BYTES = 1 << 29
"""Of the sums of a tile."""


@dataclass(frozen=True)
class Window:
    """One call of the model.

    Attributes:
        box: The part of the output that its values have weight in.
        seen: The pixels that the model sees, at the pixel size at which it computes.
        rise: Along each axis, over how many places weights rise.
        fall: Along each axis, over how many places weights fall.
    """

    box: Box
    seen: Box
    rise: tuple[int, ...]
    fall: tuple[int, ...]

    def weight(self, part: Box) -> Tensor | None:
        """Returns the weights ``[*part, 1]`` in a part of the box; None if all are 1."""
        if not any(self.rise) and not any(self.fall):
            return None
        inside, weight = part.inside(self.box), torch.ones(())
        for axis, (length, rise, fall) in enumerate(zip(self.box.shape, self.rise, self.fall, strict=True)):
            along = taper(length, rise, fall)[inside.slices[axis]]
            weight = weight * along.view([-1 if axis == other else 1 for other in range(len(self.rise))])
        return weight.unsqueeze(-1)


@lru_cache(maxsize=64)
def taper(length: int, rise: int, fall: int) -> Tensor:
    """Returns weights that rise from 0 to 1 over the first places and fall over the last ones.

    Where one window's fall over as many places as the next one's rise, they sum to 1.
    """
    weight = torch.ones(length)
    if rise:
        weight[:rise] = (torch.arange(rise) + 0.5) / rise
    if fall:
        weight[length - fall :] = 1 - (torch.arange(fall) + 0.5) / fall
    return weight


@dataclass(frozen=True)
class Plan:
    """How an output is computed.

    Attributes:
        out: Where all places of the image's output are; the region is a box of it.
        region: What is predicted.
        working: Where the image's pixels are at the pixel size at which the model computes.
        maps: Where the places of the model's map are.
        stride: Multiples of working pixels at which windows start.
        edge: Output places of a window's own part along each axis.
        tile: Output places of a tile along each axis, a multiple of ``chunk``.
        chunk: Output places of a chunk along each axis.
        margin: Output places around a tile of which it has to know the values.
        halo: Working pixels around a window's own part that the model sees, where that is not exact.
        is_exact: Whether windows see all that the model looks at.
        is_whole: Whether one window sees the whole image.
    """

    out: Grid
    region: Box
    working: Grid
    maps: Grid
    stride: tuple[int, ...]
    edge: tuple[int, ...]
    tile: tuple[int, ...]
    chunk: tuple[int, ...]
    margin: tuple[int, ...]
    halo: tuple[int, ...]
    is_exact: bool
    is_whole: bool = False

    @property
    def tiles(self) -> tuple[int, ...]:
        """Number of tiles along each axis."""
        return tuple(-(-n // t) for n, t in zip(self.region.shape, self.tile, strict=True))

    @property
    def count(self) -> int:
        """Number of tiles."""
        return math.prod(self.tiles)

    def box(self, tile: int) -> Box:
        """Returns where a tile lies in the region; tiles are numbered in C order."""
        place = np.unravel_index(tile, self.tiles)
        start = tuple(int(at) * t for at, t in zip(place, self.tile, strict=True))
        return Box(start, tuple(a + t for a, t in zip(start, self.tile, strict=True))).clipped(self.region.shape)

    def known(self, tile: int) -> Box:
        """Returns a tile and the margin around it, in the region."""
        return self.box(tile).grown(self.margin).clipped(self.region.shape)

    def windows(self, box: Box, network: Network) -> Iterator[Window]:
        """Yields the windows whose values have weight in a box of the region."""
        ranges = [self._along(axis, a, b) for axis, (a, b) in enumerate(zip(*box, strict=True))]
        for place in product(*ranges):
            yield self._window(place, network)

    def _along(self, axis: int, start: int, stop: int) -> range:
        """Returns which windows have weight between two places of an axis."""
        edge, first, over = self.edge[axis], self._first(axis), self.overlap[axis]
        low = max(0, (start - over - first) // edge + 1)
        high = min(self.lattice[axis] - 1, max(0, (stop - 1 + over - first) // edge + 1))
        return range(low, high + 1)

    def _first(self, axis: int) -> int:
        """Returns where the first window's own part ends."""
        return self.edge[axis] if self.is_exact else self.edge[axis] // 2

    @property
    def lattice(self) -> tuple[int, ...]:
        """Number of windows along each axis; the last one's own part may be longer, so that weights have room."""
        ends = zip(self.region.shape, self.edge, self.overlap, strict=True)
        return tuple(1 + max(0, (n - max(o, 1) - self._first(a)) // e + 1) for a, (n, e, o) in enumerate(ends))

    @property
    def overlap(self) -> tuple[int, ...]:
        """Places on either side of a seam over which weights fall and rise."""
        if self.is_exact:
            return (0,) * len(self.edge)
        step = (self.working.spacing / self.out.spacing)[0].tolist()
        return tuple(min(int(h * s / 2), e // 4) for h, s, e in zip(self.halo, step, self.edge, strict=True))

    def _window(self, place: Sequence[int], network: Network) -> Window:
        start, stop, before, after = zip(*(self._side(axis, at) for axis, at in enumerate(place)), strict=True)
        box = Box(
            tuple(a - b for a, b in zip(start, before, strict=True)),
            tuple(a + b for a, b in zip(stop, after, strict=True)),
        )
        seen = self.seen(Box(start, stop), network)
        return Window(box, seen, tuple(2 * b for b in before), tuple(2 * b for b in after))

    def _side(self, axis: int, at: int) -> tuple[int, int, int, int]:
        """Returns where a window's own part lies along an axis, and how far before and after it has weight."""
        first, edge, over, last = self._first(axis), self.edge[axis], self.overlap[axis], self.lattice[axis] - 1
        start = first + (at - 1) * edge if at else 0
        stop = first + at * edge if at < last else self.region.shape[axis]
        return start, stop, (over if at else 0), (over if at < last else 0)

    def seen(self, box: Box, network: Network, halo: Sequence[int] | None = None) -> Box:
        """Returns the pixels that the model sees for a box of the region; ``halo`` in place of the plan's."""
        if self.is_whole and halo is None:
            return Box.whole(self.working.shape)
        places = places_around(box.moved(self.region.start), self.out, self.maps)
        if self.is_exact and halo is None:
            pixels = network.needed(self.working, places)
        else:
            pixels = network.under(self.working, places).grown(self.halo if halo is None else halo)
        return pixels.aligned(self.stride).clipped(self.working.shape)


def make_plan(
    network: Network,
    image: Grid,
    out: Grid,
    region: Box,
    *,
    tile: float | Sequence[float] | None = None,
    halo: float | Sequence[float] | None = None,
    largest: float = 0.0,
) -> Plan:
    """Plans tiles and windows.

    Args:
        network: The model.
        image: Where the image's pixels are.
        out: Where the places of its output are.
        region: What is predicted, in places of ``out``.
        tile: A window's own part, a length per axis.
        halo: How far windows see beyond their own part, a length per axis. Default: as far as the model looks, if that
            is bounded and windows stay below `MOST_PIXELS`; else a quarter of a window's own part.
        largest: Diameter of the largest object, a length, for instances.

    Raises:
        ValueError: If a length is not positive.
    """
    spacing, axes = network.spacing(image), len(out.shape)
    step, working = out.spacing[0].tolist(), rescaling(image, spacing)[1]
    lengths = _lengths(tile, "tile", axes, step) or _default_edge(network, working, spacing, step)
    chunk, edge = zip(*map(_chunk_and_edge, lengths, region.shape, [CHUNKS[axes]] * axes), strict=True)
    own = [length * s / w for length, s, w in zip(lengths, step, spacing, strict=True)]
    pixels = _lengths(halo, "halo", axes, spacing, least=0)
    is_whole = all(n <= e for n, e in zip(working.shape, own, strict=True))
    is_exact = is_whole or (not network.unbounded and _is_exact(pixels, network.reach, own, working.shape))
    margin = tuple(math.ceil(largest / s) for s in step)
    count = 1 if is_exact and not any(margin) else _windows_per_tile(edge, network.channels, region.shape, margin)
    limits = [-(-n // c) * c for n, c in zip(region.shape, chunk, strict=True)]
    return Plan(
        out,
        region,
        working,
        network.map_grid(working),
        network.stride(working),
        edge,
        tuple(min(count * e, most) for e, most in zip(edge, limits, strict=True)),
        chunk,
        margin,
        pixels or tuple(math.ceil(e / 4) for e in own),
        is_exact,
        is_whole,
    )


def _lengths(
    value: float | Sequence[float] | None, name: str, axes: int, step: Sequence[float], least: int = 1
) -> tuple[int, ...] | None:
    """Returns lengths in pixels, rounded up."""
    if value is None:
        return None
    values = [value] * axes if isinstance(value, int | float) else list(value)
    if len(values) != axes or not all(0 <= v < math.inf and v >= least * 1e-30 for v in values):
        raise ValueError(f"{name} must be a positive length or {axes} of them, one per axis, got {value!r}")
    return tuple(max(least, math.ceil(v / s - 1e-6)) for v, s in zip(values, step, strict=True))


def _default_edge(network: Network, image: Grid, spacing: Sequence[float], step: Sequence[float]) -> tuple[int, ...]:
    """Returns a window's own part in output places: up to twice as long where the halo is long and fits."""
    axes = len(step)
    edge = EDGES[axes]
    reach, stride = max(network.reach), max(network.stride(image))
    if not network.unbounded and 4 * reach > edge:
        fitting = round(MOST_PIXELS ** (1 / axes)) - 2 * reach
        edge = max(edge, min(2 * edge, fitting // stride * stride))
    return tuple(max(1, round(edge * s / o)) for s, o in zip(spacing, step, strict=True))


def _chunk_and_edge(edge: int, n: int, chunk: int) -> tuple[int, int]:
    """Returns the length of a chunk, and that of a window's own part, a whole number of them."""
    edge = min(edge, n)
    count = -(-edge // chunk)
    chunk = -(-edge // count)
    return chunk, count * chunk


def _is_exact(halo: Sequence[int] | None, reach: Sequence[int], own: Sequence[float], shape: Sequence[int]) -> bool:
    if halo is not None:
        return all(h >= min(r, n) for h, r, n in zip(halo, reach, shape, strict=True))
    return math.prod(min(2 * r + e, n) for r, e, n in zip(reach, own, shape, strict=True)) <= MOST_PIXELS


def _windows_per_tile(edge: Sequence[int], channels: int, shape: Sequence[int], margin: Sequence[int]) -> int:
    """Returns how many windows a tile has along each axis: as many as its sums leave room for, 8 at most."""
    count = 1
    for count in range(8, 1, -1):
        sizes = (min(count * e, n) + 2 * m for e, n, m in zip(edge, shape, margin, strict=True))
        if 4 * channels * math.prod(sizes) <= TILE_BYTES:
            break
    return count
