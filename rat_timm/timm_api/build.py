"""Making a model for timm: weights that are what they should be, and images with any number of axes."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from timm.models import PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, resolve_pretrained_cfg
from timm.models._builder import pretrained_cfg_for_features
from torch import nn

from . import hub
from .checkpoints import CONFIG, Checkpoint
from .features import RatFeatures
from .state_dict import unwrap

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Architecture: TypeAlias = "DataclassInstance | None"
"""A dataclass, a model's keyword ``cfg``; None for models that have none."""

_SOURCES = ("url", "file", "state_dict", "hf_hub_id")
_WHERE = (*_SOURCES, "hf_hub_filename", "source")
# of timm's `PretrainedCfg`, what says where weights are, of what, or how to alter them
_NOT_OF_CONFIGS = (*_WHERE, "architecture", "custom_load", "label_offset")
_RUNTIME = ("self", "cfg", "device", "dtype")


def build(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool = False,
    *,
    model_cfg: Architecture,
    filter_fn: Callable[..., Any],
    entry_args: dict[str, Any],
    feature_indices: int | tuple[int, ...],
    like: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Does what timm's ``build_model_with_cfg`` does, and three things more.

    Weights from folders and the Hub are checked (`checkpoints`), and of their config.json only the model's keywords and
    timm's preprocessing are taken; what was saved with them stands in for what is not given, also where an overlay
    names the repository; and an input size may have any number of axes.

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
        upgrade: Turns the keywords that an earlier version saved into today's.
        **kwargs: Of ``timm.create_model``.

    Raises:
        ValueError: If weights are damaged, or another model's, or their config.json asks for anything else than a model
            of their size.
        RuntimeError: If a registered entry's weights have to be converted (`rat_timm.timm_api.convert`).
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None) or {}
    described = kwargs.pop("pretrained_cfg", None)
    cfg = _resolve(variant, described, overlay)
    if pretrained and cfg.origin_url and not any(getattr(cfg, name) for name in _SOURCES):
        raise RuntimeError(
            f"the weights of {variant} have to be converted: download {cfg.origin_url}, run python -m rat_timm convert "
            f"FILE --like {variant} --output FOLDER, and give local-dir:FOLDER to timm.create_model"
        )
    handed = _handed_by_timm(variant, described, kwargs)
    if handed:
        _check_config(handed, variant, model_cls, model_cfg)
    found = hub.find(cfg, kwargs.get("cache_dir")) if pretrained else None
    source = cfg
    if found:
        found = _accept(found, handed, variant, like, model_cls, model_cfg, defaults or {}, upgrade)
        if cfg.source is None:  # else timm has read what was saved
            cfg = _as_saved(cfg, found.pretrained_cfg, overlay)
        # timm hands on what it has read of the same file, None included, which an upgrade may have changed
        given = {name: value for name, value in kwargs.items() if value is not None}
        kwargs = {"pretrained_model_args": found.model_args, **found.model_args, **given}
        source, filter_fn = _loaded(cfg, found, filter_fn)
    elif _is_entry(variant, cfg):
        kwargs.setdefault("pretrained_model_args", entry_args)
    model = _make(
        model_cls,
        variant,
        pretrained,
        dataclasses.replace(source, input_size=cfg.input_size),
        model_cfg,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": feature_indices, "feature_cls": RatFeatures},
        **{**(defaults or {}), **kwargs},
    )
    model._model_args = dict(found.model_args) if found else {}  # timm adds what is given, and saves both
    _describe(model, cfg)
    return model


def _make(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    cfg: PretrainedCfg,
    model_cfg: Architecture,
    **kwargs: Any,
) -> Any:
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        # timm asserts that an input size has three numbers; a volume has four
        pretrained_cfg=dataclasses.replace(cfg, input_size=cfg.input_size[:3]),
        model_cfg=model_cfg,
        **kwargs,
    )


def _handed_by_timm(variant: str, given: Any, kwargs: dict[str, Any]) -> Checkpoint | None:
    """Returns what timm has read of a config.json before it called the entry point, None if it has not."""
    args = kwargs.get("pretrained_model_args")
    source = given.get("source") if isinstance(given, dict) else None
    if args is None or source not in ("local-dir", "hf-hub"):
        return None
    where = "file" if source == "local-dir" else "hf_hub_id"
    read = {name: value for name, value in given.items() if name not in (where, "source")}
    return Checkpoint(given[where], {}, variant, read, args)


def _without_sources(described: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described.items() if name not in _WHERE}


def _check_config(found: Checkpoint, variant: str, model_cls: type[nn.Module], model_cfg: Architecture) -> None:
    """Raises ``ValueError`` unless a config.json holds the model's keywords and timm's preprocessing alone."""
    where, described, args = f"{found.where}/{CONFIG}", found.pretrained_cfg, found.model_args
    allowed = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(_NOT_OF_CONFIGS)
    refused = sorted(name for name, value in described.items() if value and name not in allowed)
    if refused:
        raise ValueError(f"pretrained_cfg in {where} must tell preprocessing alone, got {refused}")
    unknown = sorted(args.keys() - keywords_of(model_cls, model_cfg))
    if unknown:
        raise ValueError(f"model_args in {where} must be keywords of {model_cls.__name__}, got {unknown}")
    classes = described.get("num_classes")
    if args.get("num_classes", classes) != classes:
        raise ValueError(f"num_classes in {where} must be one number, got {args['num_classes']} and {classes}")
    classifiers = (None, _resolve(variant, None, {}).classifier)
    if described.get("classifier") not in classifiers:
        raise ValueError(f"classifier in {where} must be one of {classifiers}, got {described['classifier']!r}")


def keywords_of(model_cls: type[nn.Module], model_cfg: Architecture) -> set[str]:
    """Returns the names of a constructor's keywords, with its bases' and those of the fields of its config."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signatures = [inspect.signature(cls.__init__) for cls in model_cls.__mro__]  # type: ignore[misc]
    names = {name for signature in signatures for name, p in signature.parameters.items() if p.kind in kinds}
    fields = dataclasses.fields(model_cfg) if dataclasses.is_dataclass(model_cfg) else ()
    return names.union(field.name for field in fields).difference(_RUNTIME)


def _accept(
    found: Checkpoint,
    handed: Checkpoint | None,
    variant: str,
    like: str | None,
    model_cls: type[nn.Module],
    model_cfg: Architecture,
    defaults: Mapping[str, Any],
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> Checkpoint:
    """Returns a checkpoint with what may be taken of its config: nothing if it is of timm's own architecture.

    Raises:
        ValueError: If it is another model's, its config holds what it must not, or its weights do not go with it.
    """
    if found.architecture not in (None, variant, like):
        raise ValueError(f"{found.where} holds weights of {found.architecture}, not of {variant}")
    if found.architecture != variant:
        return found._replace(pretrained_cfg={}, model_args={})
    _check_config(found, variant, model_cls, model_cfg)
    described = _without_sources(found.pretrained_cfg)
    if handed and (_without_sources(handed.pretrained_cfg), handed.model_args) != (described, found.model_args):
        raise ValueError(f"{found.where}/{CONFIG} changed while it was read: load again")
    args = {name: value for name, value in found.model_args.items() if name != "num_classes"}
    args = upgrade(args) if upgrade else args
    found = found._replace(pretrained_cfg={"label_names": None, **described}, model_args=args)
    _check_bounds(found, {**(vars(model_cfg) if model_cfg else {}), **defaults})
    saved = _as_saved(PretrainedCfg(architecture=variant), found.pretrained_cfg, {})
    _check_size(found, _make(model_cls, variant, False, saved, model_cfg, **{**defaults, **args, "device": "meta"}))
    return found


def _check_bounds(found: Checkpoint, defaults: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` if a config asks for more layers or wider ones than weights of that size can hold.

    Making those would take long, even on the meta device.
    """
    args = {**defaults, **found.model_args}
    depths, widths = (_integers(args.get(name)) for name in ("depths", "embed_dim"))
    lists = [len(value) for value in args.values() if isinstance(value, list)]
    layers = max([sum(depths), *_integers(args.get("depth")), *lists])
    width = max(widths, default=0) << (len(depths) - 1 if len(widths) == 1 < len(depths) else 0)  # see `RatConfig`
    held = sum(value.numel() for value in found.state_dict.values())
    for asked, what, most in ((layers, "layers", len(found.state_dict)), (width, "channels", math.isqrt(held))):
        if asked > most:
            raise ValueError(
                f"{found.where} is damaged: its {CONFIG} asks for {asked} {what}, but its weights, {held} numbers in "
                f"{len(found.state_dict)} tensors, make {most} at most"
            )


def _integers(value: Any) -> list[int]:
    return [n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, int)]


def _check_size(found: Checkpoint, expected: nn.Module) -> None:
    """Raises ``ValueError`` unless weights have the shapes that their config makes, on the meta device."""
    shapes = {name: value.shape for name, value in unwrap(found.state_dict).items()}
    wanted = {name: value.shape for name, value in expected.state_dict().items()}
    different = sorted(name for name in shapes.keys() & wanted.keys() if shapes[name] != wanted[name])
    if different:
        raise ValueError(f"{found.where} is damaged: its {CONFIG} and its weights differ in the shapes of {different}")
    held, made = (sum(math.prod(shape) for shape in sizes.values()) for sizes in (shapes, wanted))
    if made > 2 * held:  # less may be missing, or under another name, which the filter tells
        raise ValueError(f"{found.where} is damaged: its {CONFIG} makes {made} numbers, its weights hold {held}")


def _loaded(
    cfg: PretrainedCfg, found: Checkpoint, filter_fn: Callable[..., Any]
) -> tuple[PretrainedCfg, Callable[..., Any]]:
    """Returns a cfg and a filter by which timm takes what was read; in the cfg itself it would copy every tensor."""
    held: dict[str, Any] = {**dict.fromkeys(_WHERE), "state_dict": dict.fromkeys(found.state_dict)}
    # timm reads a file with custom_load as the original format, which is not what its Hub holds
    return dataclasses.replace(cfg, **held, custom_load=False), lambda _, model: filter_fn(found.state_dict, model)


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


def entries_of(arch: str) -> dict[str, dict[str, Any]]:
    """Returns timm's pretrained entries of an architecture by tag, with the Hub's names in full."""
    entries = {}
    for name, cfg in get_arch_pretrained_cfgs(arch).items():
        entry = dataclasses.asdict(dataclasses.replace(cfg, architecture=None, tag=None))
        entries[name.partition(".")[2]] = {key: value for key, value in entry.items() if value is not None}
    return entries


def _resolve(variant: str, pretrained_cfg: Any, overlay: dict[str, Any]) -> PretrainedCfg:
    if any(overlay.get(name) for name in _SOURCES):
        # what the entry names must not come before what the overlay names
        overlay = dict.fromkeys(_WHERE) | overlay
    return resolve_pretrained_cfg(variant, pretrained_cfg, overlay)


def _describe(model: nn.Module, cfg: PretrainedCfg) -> None:
    described = cfg.to_dict()
    if isinstance(model, RatFeatures):
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(described)
        model = model.model
    model.pretrained_cfg = model.default_cfg = described
