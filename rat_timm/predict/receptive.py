"""Receptive fields: which pixels a part of a map depends on, layer by layer from the map back to the image.

A box of places is followed backwards through the layers. What a layer does along one axis does not depend on the other
axes, and what it does at the image's border is what it does there: neighbourhoods are moved inwards, windows of
groupings and kernels are cut off. So a tile that holds the box of pixels, and starts at a multiple of the stride, gives
what the whole image gives.

Global attention (with several levels or prefix tokens, joint attention too) and dense groupings see all places,
whatever the box: they are listed with their reason, and followed as if they saw their own windows or place alone. What
is said of the other layers then still holds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm

from torch import nn

from ..dense.decoders import ContrastConv, cell_grid, refined
from ..dense.segmenter import Segmenter
from ..geometry.box import Box, places_around
from ..geometry.grid import Grid
from ..layers.grouping import extent_and_padding
from ..models import RatVit, ResolutionAwareTransformer
from ..models.rat.config import RatConfig, StageConfig
from ..models.rat.places import embedded, grouped

_FAR = 1 << 12  # strides from any border


@dataclass(frozen=True)
class ReceptiveField:
    """How far beyond a place a model looks.

    Attributes:
        pixels: At most so many of the pixels that the model computes with, to either side along each axis; None if it
            is not bounded.
        length: The same as a length, for pixels of the reference spacing.
        unbounded: Each layer that sees everything, and why; empty if there is none.
    """

    pixels: tuple[int, ...] | None
    length: tuple[float, ...] | None
    unbounded: tuple[str, ...]


def receptive_field(model: nn.Module, stage: int = -1) -> ReceptiveField:
    """Returns how far beyond a place of its output a model looks, away from the image's border.

    Args:
        model: A `rat_timm.dense.Segmenter`, whose places are pixels of the image at the pixel size at which the model
            computes; or a backbone, whose places are those of a stage's map.
        stage: The stage of a hierarchical backbone.

    Raises:
        ValueError: If the model is another one.
    """
    unbounded = tuple(unbounded_layers(model, stage))
    if unbounded:
        return ReceptiveField(None, None, unbounded)
    reach = bounded_reach(model, stage)
    reference = backbone_of(model).reference_spacing
    return ReceptiveField(reach, tuple(n * s for n, s in zip(reach, reference, strict=True)), ())


def bounded_reach(model: nn.Module, stage: int = -1) -> tuple[int, ...]:
    """Returns how many pixels the layers that are bounded look to either side along each axis."""
    step = total_stride(model, stage)
    grid = Grid.create([2 * _FAR * n for n in step])
    maps = map_grid(model, grid, stage)
    pixels = [1] * len(step)  # of a place
    if not isinstance(model, Segmenter):
        pixels = [max(1, round(n)) for n in (maps.spacing / grid.spacing)[0].tolist()]
    reach = [0] * len(step)
    for place in range(max(n // p for n, p in zip(step, pixels, strict=True))):  # one of each kind
        own = Box(*(tuple(_FAR * n // p + place + end for n, p in zip(step, pixels, strict=True)) for end in (0, 1)))
        cell = _tokens_in(own, pixels, grid.shape)
        seen = needed(model, grid, places_around(own, grid, maps) if isinstance(model, Segmenter) else own, stage)
        sides = zip(reach, seen.start, seen.stop, cell.start, cell.stop, strict=True)
        reach = [max(most, first - start, stop - last) for most, start, stop, first, last in sides]
    return tuple(reach)


def unbounded_layers(model: nn.Module, stage: int = -1, levels: int = 1) -> Iterator[str]:
    """Yields each layer that sees everything, and why.

    Args:
        model: See `receptive_field`.
        stage: See `receptive_field`.
        levels: How many levels images have.
    """
    backbone = backbone_of(model)
    if isinstance(backbone, RatVit):
        yield "every block attends to all patches of all levels"
        return
    has_prefix = False
    for index, here in enumerate(_stages(backbone, stage)):
        has_prefix = has_prefix or here.reg_tokens > 0
        if here.sga_attention_type == "dense":
            yield f"the grouping before stage {index + 1} is dense: it normalises over all tokens"
        if here.conv_kernel_size:
            continue
        if here.attn_kernel_size is None:
            yield f"blocks of stage {index + 1} attend to all tokens"
        elif here.joint_attention and has_prefix:
            yield f"blocks of stage {index + 1} attend to all tokens, as there are prefix tokens"
        elif here.joint_attention and levels > 1:
            yield f"blocks of stage {index + 1} attend to all tokens, as there are several levels"


def total_stride(model: nn.Module, stage: int = -1, spacing: Sequence[float] | None = None) -> tuple[int, ...]:
    """Returns the multiples of pixels at which a tile may start: places of all maps then lie where the whole's do.

    Args:
        model: See `receptive_field`.
        stage: See `receptive_field`.
        spacing: The image's pixel size, for a plain transformer whose patches are physical.
    """
    backbone = backbone_of(model)
    if isinstance(backbone, RatVit):
        patch = tuple(backbone.patch_embed.proj.kernel_size)
        if not backbone.physical_patches or spacing is None:
            return patch
        sizes = zip(patch, backbone.reference_spacing, spacing, strict=True)
        return tuple(max(1, round(n * reference / step)) for n, reference, step in sizes)
    steps = [here.total_stride for here in _stages(backbone, stage)]
    if isinstance(model, Segmenter) and model.detail is not None:
        steps.append(model.detail.conv_2.stride)
        if isinstance(model.detail.conv_1, ContrastConv):
            steps.append(model.detail.conv_1.cells)
    return tuple(lcm(*along) for along in zip(*steps, strict=True))


def backbone_of(model: nn.Module) -> ResolutionAwareTransformer | RatVit:
    """Returns the backbone of a segmenter, or a backbone itself.

    Raises:
        ValueError: If it is neither.
    """
    backbone = model.backbone if isinstance(model, Segmenter) else model
    if not isinstance(backbone, ResolutionAwareTransformer | RatVit):
        raise ValueError(
            "model must be a rat_timm.dense.Segmenter, a ResolutionAwareTransformer or a RatVit, got "
            f"{type(model).__name__}"
        )
    return backbone


def map_grid(model: nn.Module, grid: Grid, stage: int = -1) -> Grid:
    """Returns the grid of what a model makes of an image on ``grid``, at the pixel size at which it computes."""
    backbone = backbone_of(model)
    if isinstance(model, Segmenter) and model.detail is not None:
        return grid
    if isinstance(backbone, ResolutionAwareTransformer):
        maps = _stage_grids(backbone.cfg, grid)
        return maps[0] if isinstance(model, Segmenter) else maps[_index(backbone, stage)]
    step = total_stride(model, spacing=grid.spacing[0].tolist())
    patches = cell_grid(grid, step)
    if not isinstance(model, Segmenter):
        return patches
    assert model.pyramid is not None
    factors = [a * b for a, b in zip(model.pyramid.finest_1.factors, model.pyramid.finest_2.factors, strict=True)]
    return refined(patches, factors)


def needed(model: nn.Module, grid: Grid, box: Box, stage: int = -1) -> Box:
    """Returns the pixels on which a part of a map depends, as far as layers are bounded.

    Args:
        model: See `receptive_field`.
        grid: Where the pixels of the whole image are, at the pixel size at which the model computes.
        box: Places of `map_grid`.
        stage: See `receptive_field`.
    """
    backbone = backbone_of(model)
    if isinstance(backbone, RatVit):
        return places_around(box, map_grid(model, grid, stage), grid)
    cfg = backbone.cfg
    grids = _stage_grids(cfg, grid)
    if not isinstance(model, Segmenter):
        maps: list[Box | None] = [None] * _index(backbone, stage) + [box]
        return _before_backbone(cfg, grid, grids, maps, groups=False)
    pixels = box = _conv_3(box, grid if model.detail is not None else grids[0])  # of the classifier
    if model.detail is not None:
        pixels, box = _before_detail(model, grid, grids[0], box)
    boxes = _before_decoder(model, grids, box)
    groups = model.decoder.needs_assignments
    through = _before_backbone(cfg, grid, grids, boxes, groups)
    return through if model.detail is None else pixels | through


def _stages(backbone: ResolutionAwareTransformer, stage: int) -> Sequence[StageConfig]:
    return backbone.cfg.stages()[: _index(backbone, stage) + 1]


def _index(backbone: ResolutionAwareTransformer, stage: int) -> int:
    count = len(backbone.stages)
    if not -count <= stage < count:
        raise ValueError(f"stage must be from 0 to {count - 1}, or from the end, got {stage}")
    return stage % count


def _stage_grids(cfg: RatConfig, grid: Grid) -> list[Grid]:
    return list(accumulate(cfg.stages(), grouped, initial=embedded(grid, cfg)))[1:]


def _before_detail(model: Segmenter, grid: Grid, finest: Grid, box: Box) -> tuple[Box, Box]:
    """Returns the pixels that the detailed levels see, and the places of the decoder's map that they sample."""
    assert model.detail is not None
    step, ones = model.detail.conv_2.stride, (1,) * len(grid.shape)
    conv = ((3,) * len(ones), step, ones)
    half = grid.conv(*conv) if max(step) > 1 else grid
    fine = _conv_3(box, grid)  # of fuse_1
    halves = _conv_3(places_around(fine, grid, half), half)  # of fuse_2
    fine = _conv_3(fine | _before_conv(halves, grid.shape, *conv), grid)
    if isinstance(model.detail.conv_1, ContrastConv):
        cells = model.detail.conv_1.cells
        means = places_around(fine, grid, cell_grid(grid, cells))
        fine = fine | _before_conv(means, grid.shape, cells, cells, [0] * len(cells))
    return fine, places_around(halves, half, finest)


def _before_decoder(model: Segmenter, grids: Sequence[Grid], box: Box) -> list[Box | None]:
    """Returns the places of each stage's map that the decoder needs for places of its own map."""
    stages = model.backbone.cfg.stages()
    boxes: list[Box | None] = []
    for index, grid in enumerate(grids[:-1]):
        box = _conv_3(box, grid)
        boxes.append(box)
        if model.decoder.needs_assignments:
            above = stages[index + 1]
            box = _cells_around(box, above, grids[index + 1].shape, _radius(above))
        else:
            box = places_around(box, grid, grids[index + 1])
    return [*boxes, box]


def _before_backbone(
    cfg: RatConfig, grid: Grid, grids: Sequence[Grid], maps: Sequence[Box | None], groups: bool
) -> Box:
    """Returns the pixels that places of the stages' maps depend on; with ``groups``, their tokens' assignments too."""
    stages = cfg.stages()
    box = maps[-1]
    shapes = _stem_shapes(cfg, grid)
    for index in reversed(range(len(maps))):
        stage, fine = stages[index], maps[index - 1] if index else None
        assert box is not None
        box = _before_blocks(box, stage, grids[index].shape)
        if stage.sga_attention_type is not None:
            shape = grids[index - 1].shape if index else shapes[-1]
            box = _before_grouping(box, stage, shape, grids[index].shape, cfg.iters, fine if groups else None)
        if fine is not None:
            box = box | fine
    assert box is not None
    for conv, shape in zip(reversed(cfg.stem_convs), reversed(shapes[:-1]), strict=True):
        box = _before_conv(box, shape, *conv)
    return box


def _stem_shapes(cfg: RatConfig, grid: Grid) -> list[tuple[int, ...]]:
    """Returns the shape of the image and of what each of the stem's convolutions makes."""
    shapes = [grid.shape]
    for conv in cfg.stem_convs:
        grid = grid.conv(*conv)
        shapes.append(grid.shape)
    return shapes


def _before_grouping(
    box: Box,
    stage: StageConfig,
    fine: tuple[int, ...],
    coarse: tuple[int, ...],
    iters: int,
    assigned: Box | None,
) -> Box:
    """Returns the tokens that groups depend on, and the assignments of the tokens ``assigned``."""
    conv = stage.grouping_conv
    if stage.sga_attention_type != "sparse":
        return _before_conv(box, fine, *conv)
    radius = _radius(stage)
    # a group takes from tokens within the radius, whose shares other groups have: within two radii, of tokens in three
    starts = _wider(box, radius, 2 * iters, coarse)
    cells = _wider(box, radius, 2 * iters + 1, coarse)
    if assigned is not None:  # by the queries of the last iteration
        own = _cells_of(assigned, stage.stride)
        starts = starts | _wider(own, radius, 2 * iters - 1, coarse)
        cells = cells | _wider(own, radius, 2 * iters, coarse)
    return _before_conv(starts, fine, *conv) | _tokens_in(cells, stage.stride, fine)


def _radius(stage: StageConfig) -> tuple[int, ...]:
    return tuple(n // 2 for n in stage.neighborhood_kernel)


def _wider(box: Box, radius: Sequence[int], times: int, shape: Sequence[int]) -> Box:
    return box.grown([n * times for n in radius]).clipped(shape)


def _cells_of(box: Box, stride: Sequence[int]) -> Box:
    whole = box.aligned(stride)
    return Box(*(tuple(n // s for n, s in zip(side, stride, strict=True)) for side in whole))


def _cells_around(box: Box, stage: StageConfig, coarse: Sequence[int], radius: Sequence[int]) -> Box:
    return _wider(_cells_of(box, stage.stride), radius, 1, coarse)


def _tokens_in(cells: Box, stride: Sequence[int], shape: Sequence[int]) -> Box:
    tokens = Box(*(tuple(n * s for n, s in zip(side, stride, strict=True)) for side in cells))
    return tokens.clipped(shape)


def _conv_3(box: Box, grid: Grid) -> Box:
    return box.grown([1] * len(grid.shape)).clipped(grid.shape)


def _before_conv(
    box: Box, shape: Sequence[int], extent: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Box:
    """Returns what a convolution sees, and the cells under its stride, whose masks it pools."""
    start = tuple(a * s - p for a, s, p in zip(box.start, stride, padding, strict=True))
    ends = zip(box.stop, stride, padding, extent, strict=True)
    stop = tuple((b - 1) * s - p + e for b, s, p, e in ends)
    return Box(start, stop).clipped(shape) | _tokens_in(box, stride, shape)


def _before_blocks(box: Box, stage: StageConfig, shape: Sequence[int]) -> Box:
    """Returns the tokens that a stage's blocks see, as far as they are bounded."""
    if stage.conv_kernel_size:
        _, reach = extent_and_padding(stage.conv_kernel_size, stage.conv_dilation)
        return box.grown([n * stage.depth for n in reach]).clipped(shape)
    for _ in range(stage.depth if stage.attn_kernel_size else 0):
        box = _before_windows(box, shape, stage.attn_kernel_size or ())
    return box


def _before_windows(box: Box, shape: Sequence[int], kernel: Sequence[int]) -> Box:
    """Returns the keys of neighbourhoods, which are moved inwards at the border."""
    start, stop = [], []
    for first, end, n, k in zip(box.start, box.stop, shape, kernel, strict=True):
        k = min(k, n)
        start.append(min(max(first - k // 2, 0), n - k))
        stop.append(min(max(end - 1 - k // 2, 0), n - k) + k)
    return Box(tuple(start), tuple(stop)) | box
