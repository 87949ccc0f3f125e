"""Tiles labelled each on its own, and joined, are the whole labelled at once, but for numbering."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from rat_timm.dense import instance_targets, instances
from rat_timm.predict.stitch import Faces, directions, faces_of, join, load_faces, relabel, save_faces
from test_instances import balls, network_that_is_right


def tiles_of(size, tile, halo):
    """Returns the grid of tiles, and of each tile in C order the slices of its inner region and of it with its halo."""
    starts = [range(0, n, step) for n, step in zip(size, tile, strict=True)]
    boxes = []
    for corner in itertools.product(*starts):
        ends = [min(at + step, n) for at, step, n in zip(corner, tile, size, strict=True)]
        inner = tuple(map(slice, corner, ends))
        boxes.append(
            (
                inner,
                tuple(slice(max(i.start - halo, 0), min(i.stop + halo, n)) for i, n in zip(inner, size, strict=True)),
            )
        )
    return tuple(map(len, starts)), boxes


def within(inner, outer):
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))


def stitched(size, tile, halo, labelled, order=None):
    """Labels tiles in any order, joins them, and puts them together; ``labelled`` gives a tile's labels."""
    grid, boxes = tiles_of(size, tile, halo)
    faces, parts = {}, {}
    for index in range(len(boxes)) if order is None else order(len(boxes)):
        inner, outer = boxes[index]
        labels = labelled(index, outer)
        if labels is not None:
            faces[index] = faces_of(labels, within(inner, outer))
            parts[index] = labels[within(inner, outer)]
    tables, objects = join(grid, lambda index, _: faces.get(index))
    assert len(tables) == len(boxes)
    out = np.zeros(size, np.int64)
    for index, (inner, _) in enumerate(boxes):
        if index in parts:
            out[inner] = relabel(parts[index], tables[index])
        else:
            assert tables[index].tolist() == [0]
    assert np.array_equal(np.unique(out[out > 0]), np.arange(1, objects + 1))
    return out


def assert_same_objects(found, expected):
    """The numbers differ at most."""
    pairs = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert np.array_equal(found == 0, expected == 0)


def connected(values):
    """Numbers connected places of one value, over corners too, one value after another."""
    out, count = np.zeros(values.shape, np.int64), 0
    for value in np.unique(values[values > 0]):
        part = label(values == value, connectivity=values.ndim)
        out[part > 0] = part[part > 0] + count
        count += part.max()
    return out


def renumbered(labels, generator):
    """Gives labels the numbers 1..n at random."""
    numbers = np.unique(labels[labels > 0])
    table = np.zeros(labels.max(initial=0) + 1, np.int64)
    table[numbers] = generator.permutation(len(numbers)) + 1
    return table[labels]


@st.composite
def cases(draw):
    axes = draw(st.sampled_from([2, 3]))
    size = tuple(draw(st.integers(1, 16 if axes == 2 else 7)) for _ in range(axes))
    tile = tuple(draw(st.integers(1 if math.prod(size) < 150 else 2, n + 1)) for n in size)
    return size, tile, draw(st.integers(1, 4)), draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4))


@given(cases(), st.floats(0.0, 1.0), st.sampled_from(["seen", "split"]))
@settings(max_examples=80)
def test_tiles_that_see_what_is_true_make_the_whole(case, share, kind):
    """Snakes, specks that touch over corners, objects larger than tiles: any labels.

    "seen": a tile gives one number to what is one object. "split": it gives one to each part that it sees connected.
    """
    size, tile, halo, seed, values = case
    generator = np.random.default_rng(seed)
    whole = connected(generator.integers(1, values + 1, size) * (generator.random(size) < share))

    def labelled(_, outer):
        seen = whole[outer]
        return renumbered(seen if kind == "seen" else connected(seen), generator)

    found = stitched(size, tile, halo, labelled, order=generator.permutation)
    assert_same_objects(found, whole)


@pytest.mark.parametrize("axes", [2, 3])
def test_numbers_do_not_depend_on_the_order_of_tiles(axes):
    generator = np.random.default_rng(0)
    size, tile = (11, 13, 9)[:axes], (4, 3, 5)[:axes]
    whole = connected(generator.integers(0, 3, size))
    found = [
        stitched(size, tile, 2, lambda _, outer: connected(whole[outer]), order)
        for order in (range, lambda n: range(n - 1, -1, -1), generator.permutation)
    ]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    # numbers grow with the first tile that an object lies in
    first = np.full(found[0].max() + 1, -1)
    for index, (inner, _) in reversed(list(enumerate(tiles_of(size, tile, 0)[1]))):
        first[np.unique(found[0][inner])] = index
    assert (np.diff(first[1:]) >= 0).all()


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("direction", ["edge", "corner"])
def test_an_object_may_pass_through_an_edge_or_a_corner_of_tiles_alone(axes, direction):
    size = (6,) * axes
    whole = np.zeros(size, np.int64)
    other = 3 if direction == "corner" else 2
    whole[(2,) * axes] = whole[(3, 3, other)[:axes]] = 1
    whole[(0,) * axes] = 2
    assert connected(whole).max() == 2
    found = stitched(size, (3,) * axes, 1, lambda _, outer: connected(whole[outer]))
    assert_same_objects(found, whole)


def test_an_object_that_no_tile_or_only_one_sees_whole():
    """A snake: each tile sees pieces. A bar: the middle tile sees it whole, the others see an end of it."""
    snake = np.zeros((11, 11), np.int64)
    snake[::2] = snake[1::4, -1] = snake[3::4, 0] = 1
    for tile in ((2, 3), (1, 1), (5, 4), (4, 11)):
        found = stitched(snake.shape, tile, 1, lambda _, outer: connected(snake[outer]))
        assert_same_objects(found, snake)

    bar = np.zeros((3, 12), np.int64)
    bar[1, 3:9] = 1
    found = stitched(bar.shape, (3, 4), 2, lambda _, outer: bar[outer])
    assert_same_objects(found, bar)


def test_what_one_tile_sees_as_two_is_one_if_its_neighbour_does():
    """The right tile cuts the end of a bar in two."""
    left, right = np.array([[0, 1, 1, 1, 1]] * 2), np.array([[4, 4, 4, 4], [5, 5, 5, 5]])
    faces = [faces_of(left, (slice(0, 2), slice(0, 3))), faces_of(right, (slice(0, 2), slice(2, 4)))]
    tables, objects = join((1, 2), lambda tile, _: faces[tile])
    assert objects == 1
    assert tables[1][[4, 5]].tolist() == [1, 1]


@pytest.mark.parametrize("case", ["across", "along", "none"])
def test_a_pixel_on_which_tiles_differ_does_not_make_one_object_of_two(case):
    """Two objects touch; the cut between them, across the tiles' boundary or along it, lies a pixel further in one."""
    whole = np.repeat([[1, 2]], 5, axis=1).repeat(8, axis=0)  # [8, 10]
    whole = whole if case != "along" else np.repeat([1, 2], 4)[:, None].repeat(10, axis=1)
    moved = whole.copy()
    if case == "across":
        moved[:, 5] = 1
    elif case == "along":
        moved[4] = 1
    found = stitched((8, 10), (4, 10), 3, lambda tile, outer: (whole if tile else moved)[outer])
    assert found.max() == 2
    assert_same_objects(found[:4], moved[:4])
    assert_same_objects(found[4:], whole[4:])


def test_objects_outside_the_output_have_no_number():
    """A tile numbers what it sees in its halo; the tile there sees nothing, and has no file."""
    labels = np.zeros((4, 6), np.int64)
    labels[1, 2], labels[1, 4], labels[2, 3:5] = 3, 1, 1
    tables, objects = join((1, 2), lambda tile, _: None if tile else faces_of(labels, (slice(0, 4), slice(0, 3))))
    assert objects == 1
    assert [table.tolist() for table in tables] == [[0, 0, 0, 1], [0]]


def test_tables_are_small_numbers():
    tables, _ = join((1,), lambda *_: faces_of(np.array([0, 7], np.uint64), (slice(0, 2),)))
    assert tables[0].dtype == np.uint32
    assert relabel(np.array([7, 0], np.uint16), tables[0]).dtype == np.uint32


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_faces_are_the_pixels_on_both_sides(axes):
    labels = np.arange(1, 1 + 5**axes, dtype=np.int32).reshape((5,) * axes)
    inner = (slice(1, 4), slice(0, 2), slice(2, 5))[:axes]
    faces = faces_of(labels, inner)
    assert np.array_equal(faces.present, np.sort(labels[inner].ravel()))
    for direction in directions(axes):
        near, beyond = [], []
        for place in itertools.product(*(range(part.start, part.stop) for part in inner)):
            other = tuple(at + step for at, step in zip(place, direction, strict=True))
            # towards the direction it leaves the inner region along each axis that it has
            leaves = all(
                not step or not part.start <= at < part.stop
                for at, step, part in zip(other, direction, inner, strict=True)
            )
            if leaves and all(0 <= at < 5 for at in other):
                near.append(labels[place])
                beyond.append(labels[other])
        if near:
            assert faces.beside[direction].reshape(2, -1).tolist() == [near, beyond]
        else:
            assert direction not in faces.beside


def test_files_hold_what_was_saved(tmp_path):
    labels = np.random.default_rng(0).integers(0, 9, (5, 6, 7)).astype(np.int32)
    faces = faces_of(labels, (slice(1, 4), slice(0, 6), slice(2, 6)))
    path = tmp_path / "tile.npz"
    save_faces(path, faces)
    again = load_faces(path)
    assert again.beside.keys() == faces.beside.keys()
    assert np.array_equal(again.present, faces.present)
    assert all(np.array_equal(again.beside[each], labels) for each, labels in faces.beside.items())
    assert again.present.dtype == np.int32
    some = load_faces(path, [(1, 0, 0), (0, 1, 0)])
    assert list(some.beside) == [(1, 0, 0)]  # the image ends at the other
    assert load_faces(path, []).beside == {}
    assert [file.name for file in tmp_path.iterdir()] == ["tile.npz"]


def test_a_file_that_could_not_be_written_is_not_there(tmp_path):
    save_faces(tmp_path / "tile.npz", Faces(np.array([1]), {}))

    class Broken(dict):
        def items(self):
            yield (1, 0), np.array([[1], [2]])
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_faces(tmp_path / "tile.npz", Faces(np.array([2]), Broken()))
    assert [file.name for file in tmp_path.iterdir()] == ["tile.npz"]
    assert load_faces(tmp_path / "tile.npz").present.tolist() == [1]


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_faces(tmp_path / "none.npz")
    path = tmp_path / "tile.npz"
    save_faces(path, faces_of(np.ones((40, 40), np.int64), (slice(1, 30), slice(1, 30))))
    data = path.read_bytes()
    np.savez(tmp_path / "other.npz", a=1)
    for damaged in (data[: len(data) // 2], b"", b"text", (tmp_path / "other.npz").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tile\.npz must be a file of save_faces"):
            load_faces(path)


def test_joining_files_reads_each_face_once(tmp_path):
    generator = np.random.default_rng(3)
    whole = connected(generator.integers(0, 3, (12, 15)))
    grid, boxes = tiles_of(whole.shape, (5, 4), 2)
    for index, (inner, outer) in enumerate(boxes):
        save_faces(tmp_path / f"{index}.npz", faces_of(connected(whole[outer]), within(inner, outer)))
    read = []

    def load(index, only):
        faces = load_faces(tmp_path / f"{index}.npz", only)
        read.extend((index, direction) for direction in faces.beside)
        return faces

    tables, objects = join(grid, load)
    assert objects == whole.max()
    assert len(read) == len(set(read))
    out = np.zeros_like(whole)
    for (inner, outer), table in zip(boxes, tables, strict=True):
        out[inner] = relabel(connected(whole[outer])[within(inner, outer)], table)
    assert_same_objects(out, whole)


def discs(size, spacing, radius, seed):
    """Balls that touch, at random places."""
    generator = np.random.default_rng(seed)
    extent = np.array(size) * spacing
    return balls(
        size,
        spacing,
        generator.random((round(0.6 * extent.prod() / (2 * radius) ** len(size)), len(size))) * extent,
        radius,
    )


@pytest.mark.parametrize(
    ("size", "spacing", "tile", "seed"),
    [
        ((150, 170), (1.0, 1.0), (40, 61), 0),
        ((120, 90), (0.5, 1.5), (50, 32), 1),
        ((40, 36, 44), (2.0, 1.5, 1.5), (20, 17, 30), 2),
    ],
)
def test_instances_of_tiles_are_those_of_the_whole(size, spacing, tile, seed):
    """The halo: an object's largest extent, and where the Gaussian ends (four standard deviations)."""
    radius, scale = 6.0, 4.0
    labels = discs(size, spacing, radius, seed)
    maps = network_that_is_right(instance_targets(labels[None], spacing, scale))
    whole = instances(maps, spacing, scale=scale)[0].numpy()
    assert whole.max() > 20
    extents = [np.ptp(np.nonzero(whole == i), axis=1) + 1 for i in range(1, whole.max() + 1)]
    halo = math.ceil(np.max(extents) + 4 * scale / 10 / min(spacing)) + 1

    def labelled(_, outer):
        return instances(maps[(slice(None), slice(None), *outer)], spacing, scale=scale)[0].numpy()

    assert_same_objects(stitched(size, tile, halo, labelled), whole)


@pytest.mark.parametrize(
    ("labels", "inner", "message"),
    [
        (np.ones((3, 3)), (slice(0, 3),) * 2, r"labels must be whole numbers from 0, got float64 \[3, 3\]"),
        (-np.ones((3, 3), np.int8), (slice(0, 3),) * 2, "labels must be whole numbers from 0"),
        (np.ones((3, 3), np.int8), (slice(0, 3),), r"inner must be slices with pixels of labels \[3, 3\]"),
        (np.ones((3, 3), np.int8), (slice(0, 3), slice(1, 4)), "inner must be slices"),
        (np.ones((3, 3), np.int8), (slice(0, 3), slice(1, 1)), "inner must be slices"),
        (np.ones((3, 3), np.int8), (slice(0, 3), slice(None)), "inner must be slices"),
        (np.ones((3, 3), np.int8), (slice(0, 3), slice(0, 3, 2)), "inner must be slices"),
    ],
)
def test_labels_that_do_not_fit(labels, inner, message):
    with pytest.raises(ValueError, match=message):
        faces_of(labels, inner)


def test_faces_that_do_not_fit():
    labels = np.ones((4, 6), np.int64)
    full = slice(0, 4)
    left, right = faces_of(labels, (full, slice(0, 3))), faces_of(labels, (full, slice(3, 6)))
    blind, short = faces_of(labels, (full, slice(0, 6))), faces_of(labels, (slice(0, 3), slice(3, 6)))
    assert join((1, 2), lambda tile, _: (left, right)[tile]).objects == 1
    with pytest.raises(ValueError, match=r"tiles 0 and 1 must have a halo: one sees no pixel of the other, \(0, 1\)"):
        join((1, 2), lambda tile, _: (left, blind)[tile])
    with pytest.raises(ValueError, match=r"tiles 0 and 1 must share a face, got \[2, 4\] and \[2, 3\]"):
        join((1, 2), lambda tile, _: (left, short)[tile])
    for grid in ((), (1, 0)):
        with pytest.raises(ValueError, match="grid must be a number of tiles per axis"):
            join(grid, lambda *_: None)


def test_labels_of_another_table():
    table = np.array([0, 5, 0, 2], np.uint32)
    assert relabel(np.array([[1, 3], [0, 1]]), table).tolist() == [[5, 2], [0, 5]]
    for labels in ([4], [-1]):
        with pytest.raises(ValueError, match="labels must be those of the table, 0 to 3"):
            relabel(np.array(labels), table)
    with pytest.raises(ValueError, match="labels must be those of the table, got some that it has no number for"):
        relabel(np.array([2]), table)
