import math

import pytest
import torch
from test_predict_receptive import segmenter

from rat_timm.geometry.box import Box
from rat_timm.geometry.grid import Grid
from rat_timm.predict.measure import compared_with
from rat_timm.predict.network import Network
from rat_timm.predict.plan import CHUNKS, EDGES, MOST_PIXELS, make_plan

GLOBAL = {"attn_kernel_size": (3, 0)}


def planned(size, spacing=1.0, model=None, region=None, **options):
    network = Network(segmenter() if model is None else model, "labels")
    image = Grid.create(size, spacing)
    return make_plan(network, image, image, Box.whole(size) if region is None else region, **options), network


@pytest.mark.parametrize("size", [(500,) * 2, (61, 200), (130, 40)])
@pytest.mark.parametrize("tile", [24.0, (40.0, 17.0), 1000.0])
@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_weights_sum_to_one_and_tiles_cover_the_region(size, tile, options):
    plan, network = planned(size, model=segmenter(**options), tile=tile, halo=13.0)
    counts, covered = torch.zeros(size), torch.zeros(size)
    for number in range(plan.count):
        box = plan.box(number)
        covered[box.slices] += 1
        for window in plan.windows(box, network):
            part = window.box & box
            assert part.size
            weight = window.weight(part)
            counts[part.slices] += 1 if weight is None else weight[..., 0]
    assert bool((covered == 1).all())
    torch.testing.assert_close(counts, torch.ones(size))


def test_tiles_are_shards_of_whole_chunks_and_windows_start_at_strides():
    plan, network = planned((700, 600), spacing=0.5, tile=300.0)
    assert all(t % c == 0 for t, c in zip(plan.tile, plan.chunk, strict=True))
    assert plan.chunk == (200, 200)
    for number in range(plan.count):
        for window in plan.windows(plan.box(number), network):
            assert all(n % s == 0 for n, s in zip(window.seen.start, plan.stride, strict=True))
            assert window.seen == window.seen.clipped(plan.working.shape)


@pytest.mark.parametrize("axes", [2, 3])
def test_windows_are_longer_where_halos_are_long_and_they_fit(axes):
    """Most of what a window with a long halo sees is halo."""
    given = {"spatial_dims": axes, "depths": (1,), "embed_dim": 16, "num_heads": 1}
    near = segmenter(attn_kernel_size=3, **given)
    far = segmenter(attn_kernel_size=5 if axes == 3 else 99, **given)
    size = (5000,) * axes
    for model, is_longer in ((near, False), (far, True)):
        plan, network = planned(size, model=model)
        (edge,), (reach,) = set(plan.edge), set(network.reach)
        assert plan.is_exact
        assert EDGES[axes] <= edge <= 2 * EDGES[axes]
        assert (edge > EDGES[axes]) == is_longer == (4 * reach > EDGES[axes])
        assert (edge + 2 * reach) ** axes <= MOST_PIXELS
        assert all(e % c == 0 and c <= CHUNKS[axes] for e, c in zip(plan.edge, plan.chunk, strict=True))


def test_the_halo_is_as_long_as_the_model_looks_if_that_fits():
    plan, network = planned((4000, 4000))
    assert plan.is_exact
    window = next(plan.windows(plan.box(plan.count // 2 + plan.tiles[1] // 2), network))
    seen = [stop - start for start, stop in zip(*window.seen, strict=True)]
    for n, e, r, s in zip(seen, plan.edge, network.reach, plan.stride, strict=True):
        assert e + 2 * (r - s) <= n <= e + 2 * (r + s)  # the first place of a stride need not look as far as others
    far, _ = planned((9000, 9000), model=segmenter(depths=(1, 150), attn_kernel_size=7))
    assert not far.is_exact
    assert not planned((4000, 4000), halo=5.0)[0].is_exact
    assert planned((4000, 4000), halo=float(max(network.reach)))[0].is_exact


def test_a_small_image_is_one_window_that_sees_it_whole():
    plan, network = planned((100, 120), model=segmenter(**GLOBAL))
    assert (plan.is_whole, plan.is_exact, plan.count) == (True, True, 1)
    (window,) = plan.windows(plan.box(0), network)
    assert window.seen == Box.whole((100, 120))


@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_the_lattice_does_not_depend_on_tiles(options, monkeypatch):
    monkeypatch.setattr("rat_timm.predict.plan.TILE_BYTES", 0)
    small, network = planned((300, 200), model=segmenter(**options), tile=32.0, halo=10.0, largest=20.0)
    monkeypatch.undo()
    large = planned((300, 200), model=segmenter(**options), tile=32.0, halo=10.0, largest=20.0)[0]
    assert math.prod(small.tile) < math.prod(large.tile)

    def windows(plan):
        return {w.box for n in range(plan.count) for w in plan.windows(plan.known(n), network)}

    assert windows(small) == windows(large)


@pytest.mark.parametrize(("name", "value"), [("tile", 0.0), ("tile", (1.0,) * 3), ("halo", -1.0), ("halo", math.inf)])
def test_lengths_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive length or 2 of them"):
        planned((50, 50), **{name: value})


def test_windows_of_volumes_fit_in_memory():
    """A model that looks further than a window may be: no window is larger, nor what it is compared with."""
    plan, network = planned((512, 1024, 1024), model=segmenter("test_rat_3d", attn_kernel_size=3, depths=(1, 8)))
    assert not plan.is_exact
    window = next(plan.windows(plan.box(plan.count // 2), network))
    longer = compared_with(plan, window, network)
    assert 2 * window.seen.size < longer.size <= MOST_PIXELS
    assert longer & window.seen == window.seen


@pytest.mark.parametrize("size", [(5000, 5000), (512, 512, 512)])
def test_what_windows_are_compared_with_fits_in_memory(size):
    """Also for windows that someone made as large as they may be."""
    name = "test_rat" if len(size) == 2 else "test_rat_3d"
    plan, network = planned(
        size, model=segmenter(name, attn_kernel_size=(3, 0)), tile=MOST_PIXELS ** (1 / len(size)) / 2
    )
    window = next(plan.windows(plan.box(plan.count // 2), network))
    longer = compared_with(plan, window, network)
    assert window.seen.size < longer.size
    assert longer.size <= max(MOST_PIXELS, 1.6 * window.seen.size)
