"""Making a model for timm: weights that are what they should be, and images with any number of axes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, resolve_pretrained_cfg
from timm.models._builder import pretrained_cfg_for_features
from torch import nn

from .. import hub
from .features import RatFeatures

_SOURCES = ("url", "file", "state_dict", "hf_hub_id")


def build(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool = False,
    *,
    model_cfg: Any,
    filter_fn: Callable[..., Any],
    entry_args: dict[str, Any],
    feature_indices: int | tuple[int, ...],
    like: str | None = None,
    defaults: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Does what timm's ``build_model_with_cfg`` does, and three things more.

    Weights from folders and the Hub are checked (`rat_timm.hub`); what was saved with them stands in for what is not
    given, also where an overlay names the repository; and an input size may have any number of axes.

    Args:
        model_cls: The class.
        variant: The registered name.
        pretrained: Whether to load weights.
        model_cfg: The architecture, the class's keyword ``cfg``.
        filter_fn: timm's ``checkpoint_filter_fn``. It finds the keywords of the saved model, as far as they are known,
            in ``model.pretrained_model_args``.
        entry_args: Keywords of the models that the weights of registered entries come from.
        feature_indices: The maps that ``features_only`` gives by default.
        like: timm's name of the architecture whose weights this one takes.
        defaults: Keywords of the architecture, which what was saved and what is given come before.
        **kwargs: Of ``timm.create_model``.

    Raises:
        ValueError: If weights are damaged, or another model's.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    cfg = _resolve(variant, kwargs.pop("pretrained_cfg", None), overlay)
    found = hub.find(cfg, kwargs.get("cache_dir")) if pretrained else None
    source = cfg
    if found:
        if found.architecture not in (None, variant, like):
            raise ValueError(f"{cfg.hf_hub_id or cfg.file} holds weights of {found.architecture}, not of {variant}")
        if cfg.source is None:  # else timm has read what was saved
            cfg = _as_saved(cfg, found.pretrained_cfg, overlay)
        kwargs = {"pretrained_model_args": found.model_args, **found.model_args, **kwargs}
        # timm reads a file with custom_load as the original format, which is not what its Hub holds
        source = dataclasses.replace(cfg, file=str(found.file), source=None, custom_load=False)
    elif _is_entry(variant, cfg):
        kwargs.setdefault("pretrained_model_args", entry_args)
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        # timm asserts that an input size has three numbers; a volume has four
        pretrained_cfg=dataclasses.replace(source, input_size=cfg.input_size[:3]),
        model_cfg=model_cfg,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": feature_indices, "feature_cls": RatFeatures},
        **{**(defaults or {}), **kwargs},
    )
    model._model_args = dict(found.model_args) if found else {}  # timm adds what is given, and saves both
    _describe(model, cfg)
    return model


def _as_saved(cfg: PretrainedCfg, saved: dict[str, Any], overlay: dict[str, Any]) -> PretrainedCfg:
    """Returns ``cfg`` with what was saved instead of what a registered entry says of other weights."""
    if not saved:
        return cfg
    fields = {"tag": None, "description": None, "notes": None, **saved}
    fields = {name: value for name, value in fields.items() if name not in overlay}
    return dataclasses.replace(cfg, **{**fields, "input_size": tuple(fields.get("input_size", cfg.input_size))})


def _is_entry(variant: str, cfg: PretrainedCfg) -> bool:
    """Tells whether weights come from where a registered entry says."""
    sources = [(c.file, c.url, c.hf_hub_id) for c in get_arch_pretrained_cfgs(variant).values()]
    return not cfg.state_dict and (cfg.file, cfg.url, cfg.hf_hub_id) in sources


def entries_of(arch: str, variant: str) -> dict[str, dict[str, Any]]:
    """Returns timm's pretrained entries of an architecture for one of ours, with the Hub's names in full."""
    entries = {}
    for name, cfg in get_arch_pretrained_cfgs(arch).items():
        entry = dataclasses.asdict(dataclasses.replace(cfg, architecture=None, tag=None))
        entries[name.replace(arch, variant, 1)] = {key: value for key, value in entry.items() if value is not None}
    return entries


def _resolve(variant: str, pretrained_cfg: Any, overlay: dict[str, Any]) -> PretrainedCfg:
    if any(overlay.get(name) for name in _SOURCES):
        # what the entry names must not come before what the overlay names
        overlay = dict.fromkeys((*_SOURCES, "hf_hub_filename", "source")) | overlay
    return resolve_pretrained_cfg(variant, pretrained_cfg, overlay)


def _describe(model: nn.Module, cfg: PretrainedCfg) -> None:
    described = cfg.to_dict()
    if isinstance(model, RatFeatures):
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(described)
        model = model.model
    model.pretrained_cfg = model.default_cfg = described
