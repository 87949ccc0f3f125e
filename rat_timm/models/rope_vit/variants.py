"""Registered names of rotary ViTs: ``rat_`` and timm's name, for every architecture of timm's with weights."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import timm
from timm.models import resolve_pretrained_cfg
from torch import nn

from ...timm_api.build import build, entries_of
from ...timm_api.families import Variant
from .checkpoint import checkpoint_filter_fn
from .model import RatVit

_MAX_PARAMETERS = 2e9


def create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Makes a registered model; see `rat_timm.timm_api.build`."""
    entry = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    trained_at = {"reference_size": entry.input_size[-2:]} if pretrained else {}
    return build(
        RatVit,
        variant,
        pretrained,
        model_cfg=None,
        like=variant.removeprefix("rat_"),
        filter_fn=checkpoint_filter_fn,
        entry_args={},
        defaults={**VARIANTS[variant].defaults, **trained_at},
        feature_indices=kwargs.pop("out_indices", 3),
        **kwargs,
    )


def _architectures() -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the rotary architectures of timm's `Eva` that have weights out of its entry points."""
    for name in timm.list_models(module="eva", pretrained=True):
        arch = name.split(".")[0]
        kwargs = _model_args(timm.model_entrypoint(arch))
        rotary = kwargs.get("use_rot_pos_emb") and kwargs.get("rope_type", "cat") in ("cat", "mixed", "dinov3")
        if rotary and _estimated_parameters(kwargs) < _MAX_PARAMETERS:
            yield arch, kwargs


def _model_args(entry: Callable[..., Any]) -> dict[str, Any]:
    """Calls an entry point whose factory is replaced by one that returns its arguments."""
    namespace = {**entry.__globals__, "_create_eva": lambda variant, pretrained=False, **kwargs: kwargs}
    return types.FunctionType(entry.__code__, namespace, entry.__name__, entry.__defaults__)()


def _estimated_parameters(kwargs: dict[str, Any]) -> float:
    matrices = 3 if kwargs.get("swiglu_mlp") else 2
    per_block = (4 + matrices * kwargs.get("mlp_ratio", 4.0)) * kwargs.get("embed_dim", 768) ** 2
    return per_block * kwargs.get("depth", 12)


VARIANTS = {
    f"rat_{arch}": Variant(f"timm's ``{arch}``, resolution-aware.", kwargs, entries_of(arch))
    for arch, kwargs in _architectures()
}
