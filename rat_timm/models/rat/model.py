"""The Resolution Aware Transformer: a hierarchical backbone for images and volumes that knows physical coordinates.

Follows the seed packages ``resolution-aware-transformer``, ``spatial-grouping-attention`` (arXiv 2505.16993) and
``rotary-spatial-embeddings`` (arXiv 2403.13298), with the layout and budgets of NAT (arXiv 2204.07143).
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import Proxy

from ...geometry.grid import Pyramid, Tokens, fill, integers, merge_axes
from ...geometry.parts import Part, join_parts, parts_at_reference, to_reference
from ...geometry.plans import KEPT, keep
from ...geometry.ranges import KnowsRange, RangeLike, range_of_json
from ...geometry.read import Told, read_images, what_is_told
from ...geometry.types import ImageOrPyramid, MapOrMaps, MaskLike, OriginLike, SpacingLike
from ...layers.head import carried_mask, with_mask
from ...layers.rose import RotarySpatialEmbedding
from ...layers.sharded import run_parts, tie
from ...ops.assignment import Assignment
from .config import RatConfig
from .places import StageInput, pool_masks, stage_places
from .stage import Head, MapNorm, NoNorm, Stage, StageOutput, Stem, whole_output

# geometry steers these functions, so that symbolic tracing has to take each as a whole
for _function in (
    "what_is_told",
    "read_images",
    "to_reference",
    "stage_inputs",
    "whole_output",
    "_on_grids",
    "_with_output",
    "_maps",
    "_features",
):
    torch.fx.wrap(_function)


class Run(NamedTuple):
    """What the stages made of images.

    Attributes:
        last: The last stage that ran, before the final norm.
        stages: The stages that were asked for.
        assignments: For each grouping that ran, how each level's tokens were grouped; empty if not asked for.
    """

    last: Pyramid
    stages: list[Pyramid]
    assignments: list[list[Assignment | None]]


class Maps(NamedTuple):
    """What convolutions and norms take of a pyramid.

    Attributes:
        maps: ``[B, C, *grid]``, or one per level for a list.
        masks: ``[B, *grid]``, True = valid, or None, for each level.
    """

    maps: MapOrMaps
    masks: list[Tensor | None]


class ResolutionAwareTransformer(KnowsRange, nn.Module):
    """Hierarchical RAT.

    Args:
        cfg: The architecture.
        in_chans: Number of image channels.
        num_classes: Number of classes; 0 for pooled features.
        global_pool: "avg" over valid tokens, "token" for the first of ``reg_tokens``, "" for maps.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections and in MLPs.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth rate of the last block.
        device: PyTorch's.
        dtype: PyTorch's.
        spacing_range: Pixel sizes that the model was trained and validated at: (low, high), or one pair per axis; calls
            outside warn (see `rat_timm.geometry.ranges`).
        **overrides: Any field of `RatConfig`, to change ``cfg``.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an override is not a field of `RatConfig`.
    """

    def __init__(
        self,
        cfg: RatConfig | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spacing_range: RangeLike = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cfg = dataclasses.replace(cfg or RatConfig(), **overrides)
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans must be positive and num_classes not negative, got {in_chans}, {num_classes}")
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        for name, rate in (rates | {"drop_path_rate": drop_path_rate}).items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {rate}")
        stages = self.cfg.stages()
        self._check_pool(global_pool)
        self.in_chans = int(in_chans)
        self.num_classes = int(num_classes)
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.reference_spacing = self.cfg.reference
        """Pixel size per axis at which tokens sit one rotary unit apart."""
        self.spacing_range = spacing_range
        self._min_size = (1,) * self.cfg.spatial_dims if self.cfg.physical_stem else self.cfg.stem_strides

        self.stem = Stem(
            in_chans,
            stages[0].dim_in,
            self.cfg.spatial_dims,
            self.cfg.stem_kernel_size,
            self.cfg.stem_strides,
            self.cfg.mask_token,
            linear=self.cfg.linear_stem,
            norm_eps=self.cfg.norm_eps,
            pool=self.cfg.stem_pool,
            **dd,
        )
        drop_path = calculate_drop_path_rates(drop_path_rate, [stage.depth for stage in stages], stagewise=True)
        self.stages = nn.ModuleList(
            Stage(self.cfg, stage, rates, proj_drop_rate, attn_drop_rate, **dd)
            for stage, rates in zip(stages, drop_path, strict=True)
        )
        self.norm = MapNorm(self.num_features, **dd) if self.cfg.final_norm else NoNorm()
        self.head = Head(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.feature_info = [
            {
                "num_chs": stage.dim,
                "reduction": max(stage.total_stride),
                "module": f"stages.{i}",
                "stride": stage.total_stride,
                "spacing": tuple(s * n for s, n in zip(self.reference_spacing, stage.total_stride, strict=True)),
            }
            for i, stage in enumerate(stages)
        ]
        self._traits = {"first_conv": None}  # timm adapts no channels: checkpoint_filter_fn does, in 3D too
        self.apply(_init_weights)

    def forward(
        self,
        x: ImageOrPyramid,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps:
        """Classifies images, or returns pooled features where there are no classes.

        Args:
            x: Image ``[B, C, *size]`` of any size, or a pyramid: a list of images of one scene.
            spacing: Physical pixel size in array-axis order (z, y, x): a number, one value per axis, ``[B, axes]`` per
                sample, one tensor ``[B]`` per axis, or a list with one of these per level. Default: the reference
                spacing for the first level; for the others what gives them the same field of view.
            mask: ``[B, *size]``, True = valid, or one per level. What is masked influences nothing.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``. Default: levels share
                the outer corner of their field of view.

        Returns:
            ``[B, num_classes]``; without pooling ``[B, channels, *grid]``, or a list of them for a list.

        Raises:
            ValueError: If an argument does not fit the model or another argument.
        """
        last = self._run(self._read(x, spacing, mask, origin)).last
        given = _maps(last)
        maps, prefix, _ = whole_output(self.norm(given.maps, last.prefix))
        return self.head(maps, given.masks, prefix)

    def forward_features(
        self,
        x: ImageOrPyramid,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> MapOrMaps:
        """Returns the last stage's map, ``[B, C, *grid]``, or a list of maps for a list; see `forward`.

        The tensor carries its mask, for `forward_head`; what is computed of it does not.
        """
        last = self._run(self._read(x, spacing, mask, origin)).last
        return _features(self._normalized(last))

    def _read(self, x: ImageOrPyramid, spacing: SpacingLike, mask: MaskLike, origin: OriginLike) -> list[Part]:
        """Reads a batch; samples whose images are brought to grids of their own are parts of their own."""
        told = what_is_told(x, spacing, mask, origin)
        images = read_images(x, told, self.reference_spacing, self.in_chans, self._min_size)
        if told.spacing is not None:
            self._check_range(told, images)
        return self.parts_at_reference(images, told)

    def parts_at_reference(self, images: Pyramid, told: Told) -> list[Part]:
        """Brings a batch to the pixel sizes that a physical stem sees; without that, or a spacing, to none.

        Args:
            images: What `rat_timm.geometry.read.read_images` read.
            told: What was told of them.

        Returns:
            Samples whose images come out in sizes of their own are parts of their own.

        Raises:
            ValueError: If an image would become too large, or sizes depend on tensors where that can not be.
        """
        if not self.cfg.physical_stem or told.spacing is None:  # which is the reference spacing
            return [Part(None, images)]
        if isinstance(images, Proxy):
            return [Part(None, to_reference(images, self.reference_spacing, self.cfg.ratios))]
        return parts_at_reference(images, self.reference_spacing, self.cfg.ratios)

    def _run(
        self,
        parts: Sequence[Part],
        take: Sequence[int] = (),
        count: int | None = None,
        return_assignments: bool = False,
    ) -> Run:
        """Runs the first ``count`` stages on each part of a batch; keeps those in ``take``."""

        def run(part: Part) -> Run:
            return self._run_stages(part.images, take, count, return_assignments)

        alone = not (dist.is_available() and dist.is_initialized())
        runs = [run(part) for part in parts] if alone else run_parts(self, run, parts, _tied)
        return runs[0] if len(runs) == 1 else _join(runs, parts)

    def _run_stages(self, images: Pyramid, take: Sequence[int], count: int | None, return_assignments: bool) -> Run:
        inputs = stage_inputs(self.cfg, images)
        given = _maps(images)
        x, prefix, last = self.stem(given.maps, given.masks), None, 0
        kept: list[Pyramid] = []
        assignments: list[list[Assignment | None]] = []
        for last, stage in enumerate(itertools.islice(self.stages, count)):
            x, prefix, grouped = whole_output(stage(x, inputs[last], prefix, return_assignments))
            if return_assignments and grouped is not None:
                assignments.append(grouped)
            if last in take:
                kept.append(_on_grids(x, inputs[last], prefix))
        return Run(_on_grids(x, inputs[last], prefix), kept, assignments)

    def run_on_grids(self, images: Pyramid, return_assignments: bool = False) -> Run:
        """Runs all stages on images that `rat_timm.geometry.read` has read; nothing is resampled.

        Args:
            images: Channels last; where the stem is physical, at the reference spacing.
            return_assignments: Whether to return how each stage's tokens were grouped.

        Returns:
            All stages, finest first, the last one normalised.
        """
        run = self._run_stages(images, range(len(self.stages)), None, return_assignments)
        last = self._normalized(run.last)
        return run._replace(last=last, stages=[*run.stages[:-1], last])

    def _normalized(self, pyramid: Pyramid) -> Pyramid:
        return _with_output(pyramid, whole_output(self.norm(_maps(pyramid).maps, pyramid.prefix)))

    def forward_head(
        self, x: MapOrMaps, pre_logits: bool = False, mask: MaskLike = None, prefix: Tensor | None = None
    ) -> MapOrMaps:
        """Pools and classifies what `forward_features` returned.

        Args:
            x: Map ``[B, C, *grid]``, or a list of maps.
            pre_logits: Whether to stop before the classifier.
            mask: ``[B, *grid]``, bool, True = valid, or one per map: which places to pool over. Not the images' mask.
                Default: what `forward_features` and `forward_intermediates` know of the very tensor that they returned.
            prefix: ``[B, P, C]``, for ``global_pool="token"``.

        Raises:
            ValueError: If a mask does not fit its map, or a token is to be pooled and there is none.
        """
        maps = list(x) if isinstance(x, (list, tuple)) else [x]
        masks: list[Any] = [carried_mask(level) for level in maps]
        if mask is not None:
            masks = list(mask) if isinstance(x, (list, tuple)) else [mask]
        return self.head(x, masks, prefix, pre_logits)

    def forward_intermediates(
        self,
        x: ImageOrPyramid,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
        return_assignments: bool = False,
    ) -> list[MapOrMaps] | tuple[MapOrMaps, list[MapOrMaps]] | dict[str, Any]:
        """Returns the maps of several stages.

        Args:
            x: See `forward`.
            indices: The stages: None for all, the last n for a number, or a sequence.
            norm: Whether the last stage's map is taken after the final norm.
            stop_early: Whether to stop at the last stage asked for.
            output_fmt: "NCHW" for channels first, "NHWC" for channels last, in 3D too.
            intermediates_only: Whether to leave out the final features.
            spacing: See `forward`.
            mask: See `forward`. Masked places of maps are zero.
            origin: See `forward`.
            output_dict: Whether to return a dict: "image_features" and "prefix" (not with ``intermediates_only``),
                "image_intermediates", and for each of these maps its `Grid` in "grids" and its mask in "masks".
            return_assignments: Whether the dict has "assignments" too: for each grouping that ran, finest first, its
                `Assignment`.

        Returns:
            The final features (as `forward_features`; stopped early, those of the last stage that ran) and the list of
            maps, or the list alone; or a dict. For a pyramid each map, grid, mask and assignment is a list, one per
            level.
        """
        if return_assignments and not output_dict:
            raise ValueError("return_assignments needs output_dict=True")
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        kept_stages, last = feature_take_indices(len(self.stages), indices)
        parts = self._read(x, spacing, mask, origin)
        if len(parts) > 1 and (return_assignments or not output_dict):
            raise ValueError(
                "spacing must be the same for all samples where the stem is physical and maps come without their "
                "grids, or with assignments: each sample's map lies on a grid of its own. Take samples of one spacing "
                "at a time, or output_dict=True, which tells grids and masks"
            )
        count = last + 1 if stop_early else len(self.stages)
        run = self._run(parts, kept_stages, count, return_assignments)
        pyramid, kept = run.last, run.stages
        if count == len(self.stages) and (norm or not intermediates_only):
            pyramid = self._normalized(pyramid)
            if norm and count - 1 in kept_stages:
                kept[-1] = pyramid
        maps = [_maps(stage).maps if output_fmt == "NCHW" else stage.unwrap(stage.features) for stage in kept]
        if not output_dict:
            return maps if intermediates_only else (_features(pyramid), maps)
        final = {} if intermediates_only else {"image_features": _features(pyramid), "prefix": pyramid.prefix}
        return {
            **final,
            "image_intermediates": maps,
            "grids": [level.unwrap([tokens.grid for tokens in level.levels]) for level in kept],
            "masks": [level.unwrap(level.masks) for level in kept],
            **({"assignments": [pyramid.unwrap(g) for g in run.assignments]} if return_assignments else {}),
        }

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one asked for, and with them norm and head; returns the stages' indices."""
        take_indices, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = NoNorm()
        self.stages = self.stages[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.head.in_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Returns the classifier, `nn.Identity` if there are no classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new classifier where the old one was; ``global_pool`` None keeps the pooling."""
        self._check_pool(global_pool)
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Chooses whether groupings and blocks are computed again in the backward pass instead of being kept."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Sequence[int] | None = None) -> None:
        """Checks that images of a size can be taken. Nothing depends on it: every forward takes any size."""
        if img_size is not None:
            size = integers(img_size, "img_size", self.cfg.spatial_dims)
            if any(n < least for n, least in zip(size, self.cfg.stem_strides, strict=True)):
                raise ValueError(f"img_size must be at least {self.cfg.stem_strides} (the stem's stride), got {size}")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns how parameters are grouped into layers, for layer-wise learning rates."""
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|reg_tokens)", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks}

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay would harm: geometry, temperatures and tokens."""
        kept = ("freqs", "temp", "reg_tokens", "mask_token", "rpb", "scale_a", "scale_b", "scale_c", "scale_d")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in kept}

    def init_non_persistent_buffers(self) -> None:
        """Computes the buffers that no checkpoint holds, after a move off the meta device."""
        for module in self.modules():
            if isinstance(module, RotarySpatialEmbedding):
                module.init_non_persistent_buffers()

    @property
    def spatial_dims(self) -> int:
        """Number of axes of the images: 2 or 3."""
        return self.cfg.spatial_dims

    @property
    def embed_dim(self) -> int:
        """Width of stage 1, as in timm's hierarchical models."""
        return self.cfg.stages()[0].dim

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens that have no place, which no map holds."""
        return self.cfg.prefix_tokens

    @property
    def global_pool(self) -> str:
        """The head's pooling: "avg", "token", or "" for none."""
        return self.head.pool_type

    def model_args(self) -> dict[str, Any]:
        """Returns the keywords that make this model again, as JSON has them; without ``num_classes`` and rates."""
        args = dataclasses.asdict(self.cfg)
        args["reg_tokens"], args["leading_tokens"] = self.cfg.prefix_tokens, 0
        args["spacing"] = merge_axes(self.reference_spacing)
        args["spacing_range"] = range_of_json(self.spacing_range)
        return {**args, "in_chans": self.in_chans, "global_pool": self.head.pool_type}

    def _check_pool(self, global_pool: str | None) -> None:
        if global_pool == "token" and not self.cfg.prefix_tokens:
            raise ValueError("global_pool 'token' needs reg_tokens > 0")


def stage_inputs(cfg: RatConfig, images: Pyramid) -> list[StageInput]:
    """Returns where each stage's tokens are and which are valid.

    What is worked out of numbers is kept for the next images of the kind.
    """
    masks, kinds, is_constant = [], [], images.is_constant
    for _, grid, mask in images.levels:
        masks.append(mask)
        kinds.append((grid.shape, *grid.numbers))
        is_constant = is_constant and None not in grid.numbers
    follow = functools.partial(stage_places, cfg, [tokens.grid for tokens in images.levels])
    if is_constant:
        key = (cfg, tuple(kinds), images.levels[0].x.device)
        kept = KEPT.get(key)
        places = keep(key, follow) if kept is None else kept.plan
    else:
        places = follow()
    whole = [None] * len(masks)
    if cfg.mask_token or all(mask is None for mask in masks):
        return [StageInput(here, whole, whole) for here in places]
    return pool_masks(places, masks, cfg)


def _on_grids(x: MapOrMaps, at: StageInput, prefix: Tensor | None) -> Pyramid:
    """Puts a stage's maps on their grids."""
    maps = [x] if isinstance(x, Tensor) else x
    levels = []
    for level, grid, mask in zip(maps, at.places.grids, at.masks, strict=True):
        levels.append(Tokens(level.movedim(1, -1), grid, mask))
    return Pyramid(levels, prefix, isinstance(x, Tensor))


def _with_output(pyramid: Pyramid, output: StageOutput) -> Pyramid:
    """Puts what was made of a pyramid's maps in their place."""
    maps = [output.maps] if pyramid.single else output.maps
    levels = [
        tokens._replace(x=fill(level.movedim(1, -1), tokens.mask))
        for tokens, level in zip(pyramid.levels, maps, strict=True)
    ]
    return Pyramid(levels, output.prefix, pyramid.single)


def _maps(pyramid: Pyramid) -> Maps:
    """Returns a pyramid's features channels first, and its masks."""
    maps, masks = [], []
    for tokens in pyramid.levels:
        maps.append(tokens.x.movedim(-1, 1))
        masks.append(tokens.mask)
    return Maps(maps[0] if pyramid.single else maps, masks)


def _features(pyramid: Pyramid) -> MapOrMaps:
    """Returns a pyramid's maps, each of which carries its mask."""
    return pyramid.unwrap([with_mask(tokens.x.movedim(-1, 1), tokens.mask) for tokens in pyramid.levels])


def _tied(run: Run, other: Run) -> Run:
    pairs = [(run.last, other.last), *zip(run.stages, other.stages, strict=True)]
    last, *stages = [_tied_pyramid(one, same) for one, same in pairs]
    return run._replace(last=last, stages=stages)


def _tied_pyramid(one: Pyramid, other: Pyramid) -> Pyramid:
    pairs = zip(one.levels, other.levels, strict=True)
    levels = [level._replace(x=tie(level.x, same.x)) for level, same in pairs]
    prefix = None if one.prefix is None or other.prefix is None else tie(one.prefix, other.prefix)
    return one._replace(levels=levels, prefix=prefix)


def _join(runs: Sequence[Run], parts: Sequence[Part]) -> Run:
    """Puts what was made of the parts of a batch side by side again."""
    rows = [part.rows or [] for part in parts]
    stages = [join_parts(pyramids, rows) for pyramids in zip(*(run.stages for run in runs), strict=True)]
    return Run(join_parts([run.last for run in runs], rows), stages, [])


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and not module.weight.is_meta:  # where there are no values, PyTorch is slow
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
