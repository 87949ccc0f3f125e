"""Registered names of rotary ViTs: ``rat_`` and timm's name, for every architecture of timm's with weights."""

import functools
import json
from pathlib import Path
from typing import Any

import timm
from timm.models import resolve_pretrained_cfg
from torch import nn

from ...timm_api.build import entries_of
from ...timm_api.families import Variant
from ..vit.variants import create_vit
from .checkpoint import checkpoint_filter_fn
from .model import RatVit

# timm's keywords of each architecture; tests/rotary_architectures.py writes it
_TABLE = Path(__file__).with_name("architectures.json")


def create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Makes a registered model; see `rat_timm.timm_api.build`."""
    entry = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    trained_at = {"reference_size": entry.input_size[-2:]} if pretrained else {}
    return create_vit(
        RatVit,
        variant,
        pretrained,
        like=variant.removeprefix("rat_"),
        filter_fn=checkpoint_filter_fn,
        defaults={**VARIANTS[variant].defaults, **trained_at},
        **kwargs,
    )


def _keywords(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the constructor's keywords of a row of the table."""
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    if "norm_layer" in kwargs:
        norm = dict(kwargs["norm_layer"])
        kwargs["norm_layer"] = functools.partial(getattr(timm.layers, norm.pop("name")), **norm)
    return kwargs


# an architecture that the installed timm does not have is not registered: its `Eva` need not know the keywords
VARIANTS = {
    f"rat_{arch}": Variant(f"timm's ``{arch}``, resolution-aware.", _keywords(row), entries_of(arch))
    for arch, row in json.loads(_TABLE.read_text()).items()
    if timm.is_model(arch)
}
