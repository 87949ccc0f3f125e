import torch

from rat_timm.geometry.box import Box, part_of, places_around
from rat_timm.geometry.grid import Grid


def test_boxes_are_sets_of_places():
    one, other = Box((0, 2), (5, 6)), Box((3, 0), (9, 4))
    assert one & other == Box((3, 2), (5, 4))
    assert one | other == Box((0, 0), (9, 6))
    assert (one.shape, one.size) == ((5, 4), 20)
    assert Box((5, 0), (3, 2)).size == 0
    assert one.grown((1, 2)) == Box((-1, 0), (6, 8))
    assert one.grown((1, 2)).clipped((5, 7)) == Box((0, 0), (5, 7))
    assert other.inside(Box((3, 0), (9, 9))) == Box((0, 0), (6, 4))
    assert Box((3, 5), (9, 8)).aligned((4, 2)) == Box((0, 4), (12, 8))


def test_a_part_of_a_grid_has_the_places_of_the_whole():
    grid = Grid.create((6, 8), (0.5, 0.3), (1.0, -2.0))
    box = Box((2, 1), (5, 7))
    part = part_of(grid, box)
    expected = grid.coordinates()[0][box.slices]
    torch.testing.assert_close(part.coordinates()[0], expected)
    assert torch.allclose(torch.tensor(part.numbers.origin), part.origin[0].float())


def test_places_around_are_those_between_which_others_lie():
    fine, coarse = Grid.create((12,), 1.0), Grid.create((3,), 4.0)  # centres 0.5, 1.5 ..; 2, 6, 10
    assert places_around(Box((2,), (5,)), fine, coarse) == Box((0,), (2,))  # 2.5 to 4.5
    assert places_around(Box((0,), (1,)), fine, coarse) == Box((0,), (1,))  # before the first centre
    assert places_around(Box((1,), (2,)), coarse, fine) == Box((5,), (7,))  # 6 lies between 5.5 and 6.5
    assert places_around(Box((3,), (4,)), fine, fine) == Box((3,), (4,))
