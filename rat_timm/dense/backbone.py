"""Backbones under heads for places: made without a classifier, and asked for their maps, images read once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import timm
from torch import nn

from ..geometry.grid import Pyramid, Tokens
from ..geometry.parts import Part, join_parts
from ..geometry.read import Told, read_images
from ..geometry.types import ImageOrPyramid
from ..layers.sharded import run_parts, tie
from ..models import RatVit, ResolutionAwareTransformer

P = TypeVar("P")

Backbone: TypeAlias = ResolutionAwareTransformer | RatVit
"""What gives maps on their grids."""


def make_backbone(backbone: str | nn.Module, in_chans: int | None, kwargs: Mapping[str, Any]) -> Backbone:
    """Makes a backbone if a name is given, checks what is given, and removes what pools and classifies.

    Args:
        backbone: A registered name, or a model.
        in_chans: Number of image channels. Default: the backbone's.
        kwargs: Of ``timm.create_model``, for a name.

    Raises:
        ValueError: If it is no RAT, or what is given does not go together.
    """
    model: Any = backbone
    if isinstance(backbone, str):
        kwargs = kwargs if in_chans is None else {**kwargs, "in_chans": in_chans}
        model = timm.create_model(backbone, **{**kwargs, "num_classes": 0})
    elif kwargs:
        raise ValueError(f"backbone_kwargs go with a name as backbone, got {sorted(kwargs)} with a model")
    if not isinstance(model, (ResolutionAwareTransformer, RatVit)):
        raise ValueError(
            "backbone must be a ResolutionAwareTransformer or a RatVit (rat_timm.models), or the registered name of "
            f"one, got {type(model).__name__}"
        )
    if in_chans not in (None, model.in_chans):
        raise ValueError(f"in_chans must be the backbone's {model.in_chans}, got {in_chans}")
    return _without_head(model)


def _without_head(backbone: Any) -> Any:
    """Removes what pools and classifies, whose parameters would get no gradient."""
    if backbone.num_classes:
        backbone.reset_classifier(0)
    if getattr(backbone, "attn_pool", None) is not None:
        backbone.attn_pool = None
    return backbone


def read_for(backbone: Backbone, x: ImageOrPyramid, told: Told) -> Pyramid:
    """Reads images, and what is said of them, for a backbone."""
    least = (1,) * backbone.spatial_dims
    if isinstance(backbone, ResolutionAwareTransformer) and not backbone.cfg.physical_stem:
        least = backbone.cfg.stem_strides
    images = read_images(x, told, backbone.reference_spacing, backbone.in_chans, least)
    backbone._check_range(told, images)
    return images


def parts_for(backbone: Backbone, images: Pyramid, told: Told) -> list[Part]:
    """Brings images to the reference spacing where the backbone's stem is physical; see `Part`."""
    if isinstance(backbone, ResolutionAwareTransformer):
        return backbone.parts_at_reference(images, told)
    return [Part(None, images)]


def plain_maps(backbone: RatVit, images: Pyramid, told: Told, drop_masked: bool = False) -> list[Tokens]:
    """Returns a plain transformer's last map, ``[B, *grid, C]``, of every level.

    Args:
        backbone: The transformer.
        images: As `read_for` read them.
        told: What a user said of them.
        drop_masked: See `RatVit.forward_intermediates`.
    """
    out: Any = backbone.forward_intermediates(
        images.unwrap([level.x.movedim(-1, 1) for level in images.levels]),
        1,
        norm=True,
        output_dict=True,
        intermediates_only=True,
        drop_masked=drop_masked,
        spacing=told.spacing,
        mask=None if told.mask is None else images.unwrap(images.masks),
        origin=told.origin,
    )
    found = [out[name][0] for name in ("image_intermediates", "grids", "masks")]
    made = zip(*([[each] for each in found] if images.single else found), strict=True)
    # where there is a norm before the head, maps have not passed it yet
    return [Tokens(backbone.fc_norm(x.movedim(1, -1)), grid, mask) for x, grid, mask in made]


def last_maps(
    backbone: Backbone, images: Pyramid, told: Told, stages: int, drop_masked: bool = False
) -> list[list[Tokens]]:
    """Returns the maps of the last stages, finest first, of every level; of a plain transformer the last map.

    Args:
        backbone: The model.
        images: As `read_for` read them, or of one part of `parts_for`.
        told: What a user said of them.
        stages: How many.
        drop_masked: Whether a plain transformer drops masked tokens; see `RatVit.forward_intermediates`.
    """
    if isinstance(backbone, RatVit):
        return [[tokens] for tokens in plain_maps(backbone, images, told, drop_masked)]
    made = backbone.run_on_grids(images).stages[-stages:]
    return [[stage.levels[level] for stage in made] for level in range(len(images.levels))]


def last_infos(backbone: Backbone, stages: int) -> list[dict[str, Any]]:
    """Returns what ``feature_info`` says of the maps of `last_maps`.

    Raises:
        ValueError: If the backbone does not have so many.
    """
    most = 1 if isinstance(backbone, RatVit) else len(backbone.feature_info)
    if not isinstance(backbone, RatVit) and not 1 <= stages <= most:
        raise ValueError(f"stages must be from 1 to {most}, got {stages}")
    return list(backbone.feature_info)[-min(stages, most) :]


def in_parts(
    module: nn.Module, run: Callable[[P], Pyramid], parts: Sequence[P], rows: Sequence[list[int] | None]
) -> Pyramid:
    """Returns what is made of the parts of a batch, side by side again, in the batch's order.

    Args:
        module: Whose parameters are used, which may be sharded over processes.
        run: Makes something of a part.
        parts: What ``run`` is given.
        rows: Of each part, the samples that it has; see `Part`.
    """
    made = run_parts(module, run, parts, _tied)
    return join_parts(made, [part or [] for part in rows])


def _tied(one: Pyramid, other: Pyramid) -> Pyramid:
    pairs = zip(one.levels, other.levels, strict=True)
    return one._replace(levels=[tokens._replace(x=tie(tokens.x, same.x)) for tokens, same in pairs])
