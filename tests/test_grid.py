import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rat_timm.geometry.grid import Grid, axis_values, field_center, per_axis, pyramid_grids

axes = st.integers(1, 3)


@st.composite
def convolutions(draw):
    dims = draw(axes)
    kernel = [draw(st.sampled_from([1, 3, 5, 7])) for _ in range(dims)]
    stride = [draw(st.integers(1, 4)) for _ in range(dims)]
    shape = [draw(st.integers(1, 20)) for _ in range(dims)]
    spacing = [draw(st.floats(0.1, 10)) for _ in range(dims)]
    origin = [draw(st.floats(-100, 100)) for _ in range(dims)]
    return kernel, stride, shape, spacing, origin


@given(convolutions())
def test_conv_puts_results_where_a_real_convolution_reads(case):
    """A centred kernel of ones over the coordinates themselves gives the coordinates of its results."""
    kernel, stride, shape, spacing, origin = case
    padding = [(k - 1) // 2 for k in kernel]
    out = Grid.create(shape, spacing, origin).conv(kernel, stride, padding)
    for axis, length in enumerate(shape):
        line = origin[axis] + spacing[axis] * torch.arange(-padding[axis], length + padding[axis], dtype=torch.float64)
        weight = torch.full((1, 1, kernel[axis]), 1 / kernel[axis], dtype=torch.float64)
        read = torch.nn.functional.conv1d(line[None, None], weight, stride=stride[axis])[0, 0]
        assert out.shape[axis] == len(read)
        positions = out.origin[0, axis] + out.spacing[0, axis] * torch.arange(len(read))
        torch.testing.assert_close(positions, read, rtol=1e-12, atol=1e-9)


def test_default_origin_lets_a_pyramid_share_its_outer_corner():
    fine, coarse = Grid.create((8, 8), 0.5), Grid.create((4, 4), 1.0)
    for a, b in zip(fine.corners(), coarse.corners(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fine.origin, torch.full((1, 2), 0.25, dtype=torch.float64))


def test_coordinates_by_hand():
    grid = Grid.create((2, 3), (2.0, 0.5), (10.0, -1.0))
    expected = [[[10, -1], [10, -0.5], [10, 0]], [[12, -1], [12, -0.5], [12, 0]]]
    assert torch.equal(grid.coordinates()[0], torch.tensor(expected, dtype=torch.float64))


def test_positions_are_centred_and_in_units():
    grid = Grid.create((4, 6), (2.0, 0.5), (1e7, -1e7))
    positions = grid.positions(field_center([grid]), (2.0, 2.0))
    offset = torch.stack(positions.dense().offset, dim=-1)
    assert offset.dtype == torch.float32
    assert offset.flatten(0, -2).mean(dim=0).abs().max() == 0
    assert torch.equal(offset[0, 1, 0] - offset[0, 0, 0], torch.tensor([1.0, 0.0]))
    assert [s.item() for s in positions.spacing] == [1.0, 0.25]


def test_per_sample_spacing_gives_each_sample_its_own_coordinates():
    spacing = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    both = Grid.create((3, 5), spacing, batch_size=2)
    for row, single in zip(both.coordinates(), spacing, strict=True):
        assert torch.equal(row, Grid.create((3, 5), single).coordinates()[0])


@given(st.permutations(range(3)), st.floats(-1e6, 1e6))
def test_field_center_ignores_order_and_moves_with_the_field(order, shift):
    grids = [Grid.create((8, 8), 1.0), Grid.create((4, 4), 0.5, (3.0, 5.0)), Grid.create((2, 9), 2.0, (-4.0, 0.0))]
    center = field_center(grids)
    assert torch.equal(field_center([grids[i] for i in order]), center)
    moved = [grid._replace(origin=grid.origin + shift) for grid in grids]
    torch.testing.assert_close(field_center(moved), center + shift)


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        (0.0, "spacing must be positive"),
        (-1.0, "spacing must be positive"),
        (float("nan"), "spacing must be positive"),
        (float("inf"), "spacing must be positive"),
        ((1.0, 0.0), "spacing must be positive"),
        ((1.0, 1.0, 1.0), r"spacing must be a number, 2 values"),
        ("wide", "spacing must be numbers"),
        (torch.ones(3, 2), r"shape \[2, 2\]"),
        (torch.ones(2, 2, 2), r"got shape \[2, 2, 2\]"),
    ],
)
def test_bad_spacing_is_named(spacing, message):
    with pytest.raises(ValueError, match=message):
        Grid.create((4, 4), spacing, batch_size=2)


def test_bad_origin_is_named():
    with pytest.raises(ValueError, match="origin must be finite"):
        Grid.create((4, 4), 1.0, (0.0, float("nan")))


def test_per_axis_forms_agree():
    rows = torch.full((1, 3), 2.0, dtype=torch.float64)
    for value in (2, 2.0, (2, 2, 2), [2.0, 2.0, 2.0], torch.tensor(2), torch.full((3,), 2.0), torch.full((1, 3), 2.0)):
        assert torch.equal(per_axis(value, "spacing", 3), rows)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), (1, 2, 3), (1, "a")])
def test_axis_values_names_the_argument(value):
    with pytest.raises(ValueError, match="stem_stride must be a positive number or 2"):
        axis_values(value, "stem_stride", 2)


def spacings(grids):
    return [grid.spacing[0].tolist() for grid in grids]


def test_pyramid_spacing_follows_from_sizes():
    grids = pyramid_grids([(8, 12), (4, 4)], reference=(0.5, 0.5))
    assert spacings(grids) == [[0.5, 0.5], [1.0, 1.5]]
    assert torch.equal(grids[0].corners()[1], grids[1].corners()[1])


@pytest.mark.parametrize("spacing", [2.0, [2.0], (2.0, 2.0), [(2.0, 2.0)], torch.tensor([2.0, 2.0])])
def test_one_entry_is_level_zero(spacing):
    assert spacings(pyramid_grids([(8, 8), (4, 4), (2, 2)], spacing, reference=(1.0, 1.0))) == [[2, 2], [4, 4], [8, 8]]


def test_one_entry_per_level():
    grids = pyramid_grids([(8, 8), (4, 4), (2, 2)], [1.0, (2.0, 3.0), torch.tensor(5.0)], reference=(1.0, 1.0))
    assert spacings(grids) == [[1, 1], [2, 3], [5, 5]]


def test_levels_share_the_corner_of_a_level_zero_with_an_origin():
    grids = pyramid_grids([(8, 8), (4, 4)], 1.0, [(10.0, 20.0)], reference=(1.0, 1.0))
    assert torch.equal(grids[0].corners()[0], grids[1].corners()[0])
    assert grids[0].origin[0].tolist() == [10.0, 20.0]


@pytest.mark.parametrize(
    ("spacing", "origin", "message"),
    [
        ([1.0, 2.0], None, "may mean 2 axes or 2 levels"),
        ([1.0, 2.0, 3.0], None, r"one entry per level \(2\)"),
        ([1.0, (2.0, -2.0)], None, "level 1: spacing must be positive"),
        (None, [None, (1.0, 2.0)], "level 1: origin without spacing"),
        (1.0, [(0.0, 0.0), (1.0, 2.0, 3.0)], "level 1: origin without spacing"),
        ([1.0, (2.0, 2.0)], [(0.0, 0.0), (1.0, 2.0, 3.0)], "level 1: origin must be a number, 2 values"),
    ],
)
def test_wrong_pyramid_forms_name_the_level(spacing, origin, message):
    with pytest.raises(ValueError, match=message):
        pyramid_grids([(8, 8), (4, 4)], spacing, origin, reference=(1.0, 1.0))


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("axes", [2, 3])
def test_what_pytorchs_collate_makes_of_tuples(axes, batch):
    samples = [tuple(0.5 + i + axis / 4 for axis in range(axes)) for i in range(batch)]
    collated = torch.utils.data.default_collate(samples)
    assert isinstance(collated, (list, tuple))
    grid = Grid.create((4,) * axes, collated, collated, batch_size=batch)
    expected = torch.tensor(samples, dtype=torch.float64)
    assert torch.equal(grid.spacing, expected)
    assert torch.equal(grid.origin, expected)
    with pytest.raises(ValueError, match="spacing must be"):
        Grid.create((4,) * axes, collated[:-1], batch_size=batch)
    if batch > 1:
        with pytest.raises(ValueError, match="spacing must be"):
            Grid.create((4,) * axes, collated, batch_size=batch + 1)
