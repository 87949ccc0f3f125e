"""Objects across tiles: what tiles labelled each on its own gets one number per object, without the whole in memory.

A tile is a box of the output, its inner region; tiles stand on a grid, with one number of tiles per axis, and are
numbered in C order. Each is labelled on its inner region and a halo around it, so that it sees whole what reaches into
it. Of these labels it keeps those of the pixels on both sides of its boundary (`faces_of`), a file that grows with the
tile's faces. From these files alone `join` finds which labels of which tiles are one object:

```python
import numpy as np

from rat_timm.predict.stitch import faces_of, join, relabel

whole = np.array([[1, 1, 1, 0, 2, 2]])
left = np.array([[5, 5, 5, 0]])  # a tile of three pixels, and one pixel of halo
right = np.array([[8, 0, 3, 3]])
faces = [faces_of(left, (slice(0, 1), slice(0, 3))), faces_of(right, (slice(0, 1), slice(1, 4)))]
tables, objects = join((1, 2), lambda tile, directions: faces[tile])
parts = [relabel(left[:, :3], tables[0]), relabel(right[:, 1:], tables[1])]
assert np.array_equal(np.concatenate(parts, axis=1), whole) and objects == 2
```

**What is one object.** The watershed of `rat_timm.dense.instances` floods over edges and corners too, so tiles that
share only an edge or a corner are neighbours like those that share a face. Two neighbours see the same pixels on both
sides of their boundary. There, a label of one and a label of the other are the same object if connected parts of them
agree: they share pixels on both sides of the boundary, and more than half of the smaller part. If tiles see what is
true, parts are the same pixels, and the rule is exact, for objects too that no tile sees whole, as long as each tile
keeps together what it sees connected. If they differ in a pixel (rounding moves where a watershed cuts), that pixel
must not make one object of two; a rule that asks for one pair of pixels only would.

**How large a halo is.** A pixel at least. What `rat_timm.dense.instances` makes of an object depends on nothing farther
away than the object itself and four standard deviations of its Gaussian, so that a halo of the largest object's extent
and these gives the objects of the whole. Exceptions: seeds that ``min_distance`` joins count as one object however long
their chain is, and in one part of the foreground if they hang together within the tile; pixels between two objects
whose distances are equal to the last bit go to the one from which the watershed comes first.
"""

import contextlib
import itertools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..optional import import_optional
from ..timm_api.checkpoints import replacing

Direction: TypeAlias = tuple[int, ...]
"""From a tile to a neighbour: -1, 0 or 1 per axis, not all 0."""

Labels: TypeAlias = NDArray[np.integer]


class Faces(NamedTuple):
    """What a tile keeps of its labels for its neighbours.

    Attributes:
        present: The labels that the inner region holds, sorted, without 0.
        beside: For each direction in which the tile sees pixels, labels ``[2, *size]``: of the pixels of the inner
            region that lie at the face, edge or corner, and of those next to them outside. ``size`` is the inner
            region's, along the axes where the direction is 0.
    """

    present: Labels
    beside: Mapping[Direction, Labels]


class Joined(NamedTuple):
    """Numbers of objects.

    Attributes:
        tables: For each tile, in C order: the object's number at each label, 0 at 0 and at labels that the inner region
            does not hold; see `relabel`.
        objects: How many there are. They are numbered from 1.
    """

    tables: list[Labels]
    objects: int


Load: TypeAlias = Callable[[int, Sequence[Direction]], Faces | None]
"""Gives the faces of a tile, at least those in some directions; None: a tile without objects, which has no file."""


def directions(axes: int) -> list[Direction]:
    """Returns the directions of all neighbours, those that come later in C order last."""
    return [each for each in itertools.product((-1, 0, 1), repeat=axes) if any(each)]


def faces_of(labels: Labels, inner: Sequence[slice]) -> Faces:
    """Cuts out what a tile keeps.

    Args:
        labels: ``[*size]``, of the tile with its halo, whole numbers, 0 = background.
        inner: The inner region, in pixels of ``labels``. Where it ends with the labels, the image ends.

    Raises:
        ValueError: If an argument does not fit.
    """
    if not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise ValueError(f"labels must be whole numbers from 0, got {labels.dtype} {list(labels.shape)}")
    bounds = [(part.start, part.stop, part.step) for part in inner]
    if len(inner) != labels.ndim or not all(
        step in (None, 1) and start is not None and stop is not None and 0 <= start < stop <= size
        for (start, stop, step), size in zip(bounds, labels.shape, strict=True)
    ):
        raise ValueError(f"inner must be slices with pixels of labels {list(labels.shape)}, got {list(inner)}")
    beside = {}
    for direction in directions(labels.ndim):
        near, beyond = _places(inner, direction)
        if all(part.start >= 0 and part.stop <= n for part, n in zip(beyond, labels.shape, strict=True)):
            flat = tuple(0 if step else slice(None) for step in direction)
            beside[direction] = np.stack([labels[near][flat], labels[beyond][flat]])
    present = np.unique(labels[tuple(inner)])
    return Faces(present[present > 0], beside)


def _places(inner: Sequence[slice], direction: Direction) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Returns where the pixels at a face, edge or corner are, and those next to them outside."""
    near = [
        part if not step else slice(part.stop - 1, part.stop) if step > 0 else slice(part.start, part.start + 1)
        for part, step in zip(inner, direction, strict=True)
    ]
    beyond = [slice(part.start + step, part.stop + step) for part, step in zip(near, direction, strict=True)]
    return tuple(near), tuple(beyond)


def save_faces(path: str | PathLike, faces: Faces) -> None:
    """Writes a tile's faces as a compressed npz file, which is there as a whole or not at all."""
    path = Path(path)
    arrays: dict[str, Any] = {_name(direction): labels for direction, labels in faces.beside.items()}
    with replacing(path.parent) as folder, (folder / path.name).open("wb") as stream:
        np.savez_compressed(stream, present=faces.present, **arrays)


def load_faces(path: str | PathLike, only: Sequence[Direction] | None = None) -> Faces:
    """Reads what `save_faces` wrote.

    Args:
        path: The file.
        only: Directions to read, of those that there are. None: all.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else or damaged.
    """
    with _reading(path), np.load(path, allow_pickle=False) as file:
        axes = max((len(name) for name in file.files if name != "present"), default=0)
        wanted = directions(axes) if only is None else only
        return Faces(file["present"], {each: file[_name(each)] for each in wanted if _name(each) in file.files})


@contextlib.contextmanager
def _reading(path: str | PathLike) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} must be a file of save_faces: {error}") from error


def _name(direction: Direction) -> str:
    return "".join("-0+"[step + 1] for step in direction)


def join(grid: Sequence[int], load: Load) -> Joined:
    """Finds which labels of which tiles are one object, and numbers objects.

    Objects are numbered in the order of their first tile and of their labels there, whatever the order in which tiles
    were computed. Objects without a pixel in an inner region have no number. Memory grows with the number of objects;
    of the faces, two tiles' are held at a time.

    Args:
        grid: Number of tiles along each axis.
        load: Gives the faces of a tile.

    Raises:
        ValueError: If two neighbours' faces do not fit, or grid is wrong.
        ImportError: If SciPy or scikit-image is not installed; with the extra that installs them.
    """
    grid = tuple(grid)
    if not grid or any(n < 1 for n in grid):
        raise ValueError(f"grid must be a number of tiles per axis, got {list(grid)}")
    tiles = range(math.prod(grid))
    present = [_present(load(tile, ())) for tile in tiles]
    first = np.cumsum([0, *map(len, present)])  # each label of a tile that the output holds is a node of a graph
    links = [np.empty((2, 0), np.int64)]
    for tile in tiles:
        for neighbour, labels in _links(tile, grid, present, load):
            pairs = zip((tile, neighbour), labels, strict=True)
            links.append(np.stack([first[one] + np.searchsorted(present[one], label) for one, label in pairs]))
    numbers, count = _numbers(np.concatenate(links, axis=1), int(first[-1]))
    return Joined([_table(*each) for each in zip(present, np.split(numbers, first[1:-1]), strict=True)], count)


def _present(faces: Faces | None) -> Labels:
    return np.empty(0, np.int64) if faces is None else faces.present


def _links(tile: int, grid: Sequence[int], present: Sequence[Labels], load: Load) -> Iterator[tuple[int, Labels]]:
    """Yields neighbours that come later, and pairs of labels ``[2, pairs]``, the tile's and theirs, of one object."""
    neighbours = {
        direction: other
        for direction, other in _later_neighbours(tile, grid)
        if len(present[tile]) and len(present[other])
    }
    own = load(tile, list(neighbours)) if neighbours else None
    for direction, other in neighbours.items():
        back = tuple(-step for step in direction)
        theirs = load(other, [back])
        if own is None or theirs is None or direction not in own.beside or back not in theirs.beside:
            raise ValueError(f"tiles {tile} and {other} must have a halo: one sees no pixel of the other, {direction}")
        one, two = own.beside[direction], theirs.beside[back][::-1]  # the same pixels
        if one.shape != two.shape:
            raise ValueError(f"tiles {tile} and {other} must share a face, got {list(one.shape)} and {list(two.shape)}")
        yield other, _same(one, two)


def _later_neighbours(tile: int, grid: Sequence[int]) -> Iterator[tuple[Direction, int]]:
    place = np.unravel_index(tile, grid)
    for direction in directions(len(grid)):
        other = tuple(int(at) + step for at, step in zip(place, direction, strict=True))
        if direction > (0,) * len(grid) and all(0 <= at < n for at, n in zip(other, grid, strict=True)):
            yield direction, int(np.ravel_multi_index(other, tuple(grid)))


def _same(one: Labels, two: Labels) -> Labels:
    """Returns the pairs of labels ``[2, pairs]`` that are one object, of what two tiles see, ``[2, *size]``."""
    label, sparse = import_optional("skimage.measure", "dense").label, import_optional("scipy.sparse", "dense")
    parts, other_parts = label(one), label(two)  # connected over edges and corners too
    shape = int(parts.max()) + 1, int(other_parts.max()) + 1
    near, beyond = (  # [parts, other_parts], how many pixels they share on either side
        sparse.coo_array((np.ones(a.size, np.int64), (a.ravel(), b.ravel())), shape).tocsr()
        for a, b in zip(parts, other_parts, strict=True)
    )
    a, b = near.multiply(beyond).nonzero()
    a, b = a[(a > 0) & (b > 0)], b[(a > 0) & (b > 0)]
    shared, size, other_size = (near + beyond)[a, b], np.bincount(parts.ravel()), np.bincount(other_parts.ravel())
    agree = 2 * shared > np.minimum(size[a], other_size[b])
    pairs = [_label_of(parts, one)[a[agree]], _label_of(other_parts, two)[b[agree]]]
    return np.unique(np.stack(pairs), axis=1)


def _label_of(parts: Labels, labels: Labels) -> Labels:
    """Returns the label that each part has."""
    out = np.zeros(int(parts.max()) + 1, labels.dtype)
    out[parts.ravel()] = labels.ravel()
    return out


def _numbers(links: Labels, nodes: int) -> tuple[Labels, int]:
    """Numbers connected nodes of a graph from 1, in the order of the first node of each, and counts them."""
    sparse = import_optional("scipy.sparse", "dense")
    graph = sparse.coo_array((np.ones(links.shape[1], bool), tuple(links)), (nodes, nodes))
    component = sparse.csgraph.connected_components(graph, directed=False)[1] if nodes else np.empty(0, np.int64)
    _, first, member = np.unique(component, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.min_scalar_type(max(len(first), 2**31)))  # uint32, if it can be
    number[np.argsort(first)] = np.arange(1, len(first) + 1)
    return number[member], len(first)


def _table(present: Labels, numbers: Labels) -> Labels:
    table = np.zeros(int(present.max(initial=0)) + 1, numbers.dtype)
    table[present] = numbers
    return table


def relabel(labels: Labels, table: Labels) -> Labels:
    """Returns the objects' numbers at the pixels of a tile's inner region.

    Args:
        labels: Of the inner region, from which the tile's faces were cut.
        table: The tile's, of `join`.

    Raises:
        ValueError: If the table is not of these labels.
    """
    if labels.size and (labels.min() < 0 or labels.max() >= len(table)):
        raise ValueError(f"labels must be those of the table, 0 to {len(table) - 1}, got {labels.max()}")
    numbers = table[labels]
    if not np.array_equal(numbers > 0, labels > 0):
        raise ValueError("labels must be those of the table, got some that it has no number for")
    return numbers
