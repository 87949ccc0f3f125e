"""Checkpoints that are not quite a model's state dict: wrapped, upstream's, of other axes, channels or units."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

from ..grid import axis_values
from .config import RatConfig

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_UPSTREAM = (
    (r"^init_proj\.", r"stem.convs.0."),
    (r"^leading_tokens$", r"stages.0.reg_tokens"),
    (r"^sga_layers\.(\d+)\.", r"stages.\1.downsample.sga."),
    (r"^mr_attn_layers\.(\d+)\.(qkv|proj|rose)\.", r"stages.\1.blocks.0.attn.\2."),
    (r"^mr_attn_layers\.(\d+)\.", r"stages.\1.blocks.0."),
)
_ROSE = re.compile(r"^stages\.(\d+)\.(downsample|blocks)\..*rose\.(freqs|scale_a|scale_d)$")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict in a training checkpoint (the moving average first), without the prefixes of wrappers."""
    wrapped = [checkpoint[name] for name in _WRAPPERS if isinstance(checkpoint.get(name), dict)]
    return clean_state_dict(wrapped[0] if wrapped else checkpoint)


def is_upstream(state_dict: dict[str, Tensor]) -> bool:
    """Tells a state dict of the package ``resolution-aware-transformer``."""
    return "init_proj.weight" in state_dict


def rename_upstream(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames an upstream state dict; ``mask_embedding`` is dropped, since masked tokens take no part."""
    return {_rename(name): value for name, value in state_dict.items() if not name.endswith("mask_embedding")}


def _rename(name: str) -> str:
    for pattern, replacement in _UPSTREAM:
        name = re.sub(pattern, replacement, name)
    return name


def fit(state_dict: dict[str, Tensor], model: nn.Module, first_conv: str = "stem.convs.0.weight") -> dict[str, Tensor]:
    """Gives tensors the axes, and ``first_conv`` the input channels, that ``model`` has.

    Convolutions are spread evenly over a new first axis, so that an input constant along it gives what it gave without;
    frequencies are zero along it. Channels are summed or repeated as timm does.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    fitted = {name: _fit(name, value, shapes[name]) if name in shapes else value for name, value in state_dict.items()}
    if first_conv in fitted:
        fitted[first_conv] = _adapt_channels(fitted[first_conv], shapes[first_conv][1])
    return fitted


def _fit(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    kind = name.rsplit(".", 1)[-1]
    if kind == "freqs" and value.shape[-1] < shape[-1]:
        value = nn.functional.pad(value, (shape[-1] - value.shape[-1], 0))
    elif kind.startswith("scale_") and len(value) < shape[0]:
        value = torch.cat((value[:1].expand(shape[0] - len(value)), value))
    elif value.ndim > 2:
        value = inflate(value, shape)
    return value


def inflate(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Spreads a convolution's weight evenly over new first axes, up to the axes of ``shape``."""
    while weight.ndim < len(shape):
        weight = weight.float()  # an even share may not be exact in the checkpoint's type
        length = shape[1 - weight.ndim]
        weight = weight.unsqueeze(2).expand(-1, -1, length, *weight.shape[2:]) / length
    return weight


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    if weight.shape[1] == channels:
        return weight
    adapted = adapt_input_conv(channels, weight.flatten(2).unsqueeze(-1), base_chans=weight.shape[1])
    return adapted.unflatten(2, weight.shape[2:]).squeeze(-1)


def check_axes(first_conv: Tensor | None, cfg: RatConfig) -> None:
    """Raises ``ValueError`` if weights of other axes are to be loaded and frequencies, in no checkpoint, differ too."""
    known = first_conv is None or first_conv.ndim - 2 == cfg.spatial_dims
    if not known and not cfg.learnable_rose and cfg.rotary_ratio > 0:
        raise ValueError(
            f"spatial_dims={cfg.spatial_dims} needs other frequencies than the weights', which no "
            "checkpoint holds where they are not learnable (learnable_rose)"
        )


def spacing_ratio(cfg: RatConfig, source: float | Sequence[float]) -> tuple[float, ...]:
    """Returns the reference spacing of ``cfg`` over that of the weights' model; 1 along axes that this did not have."""
    axes = 1 if isinstance(source, (int, float)) else len(source)
    values = axis_values(source, "spacing", cfg.spatial_dims if axes == 1 else axes)
    pairs = zip(reversed(cfg.reference), reversed(values), strict=False)
    ratio = tuple(ours / theirs for ours, theirs in pairs)[::-1]
    return (1.0,) * (cfg.spatial_dims - len(ratio)) + ratio


def rescale(
    state_dict: dict[str, Tensor], lengths: Sequence[tuple[Sequence[float], Sequence[float]]], cfg: RatConfig
) -> dict[str, Tensor]:
    """Puts rotary parameters into units of length that are so many times as long: rotations stay what they were.

    The scaling ``a * s^b + c * log(s / d)`` keeps its value with ``a * u^b`` and ``d / u``; without it the frequencies
    are multiplied by u.

    Args:
        state_dict: With our names.
        lengths: Per stage, u of the grouping and of the blocks, one number per axis.
        cfg: Of the model that is to load it.

    Raises:
        ValueError: If a conversion is needed and what has to be converted is in no checkpoint.
    """
    if all(u == 1 for pair in lengths for axes in pair for u in axes):
        return state_dict
    if not cfg.learnable_rose_scaling and cfg.rose_initial_scaling == "log":
        raise ValueError("rose_initial_scaling 'log' converts only if it is learnable (learnable_rose_scaling)")
    if not cfg.learnable_rose:
        raise ValueError(
            f"spacing {cfg.reference} is not the one that these weights were trained with, and frequencies that are "
            "not learnable (learnable_rose) cannot be converted"
        )
    return {name: _rescale(name, value.float(), state_dict, lengths) for name, value in state_dict.items()}


def _rescale(
    name: str,
    value: Tensor,
    state_dict: dict[str, Tensor],
    lengths: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> Tensor:
    match = _ROSE.match(name)
    if match is None:
        return value
    stage, part, kind = match.groups()
    length = torch.tensor(lengths[int(stage)][part == "blocks"], dtype=value.dtype, device=value.device)
    prefix = name.removesuffix(kind)
    if kind == "scale_a":
        return value * length ** state_dict[f"{prefix}scale_b"]
    if kind == "scale_d":
        return value / length
    return value if f"{prefix}scale_a" in state_dict else value * length


def check_names(state_dict: dict[str, Tensor], model: nn.Module, but: tuple[str, ...] = ("head.fc.",)) -> None:
    """Raises ``ValueError`` if parameters are missing or left over, but for those whose names begin so.

    timm does not look when it drops a classifier with another number of classes.
    """
    expected, found = set(model.state_dict()), set(state_dict)
    missing, unknown = (
        sorted(name for name in names if not name.startswith(but)) for names in (expected - found, found - expected)
    )
    if missing or unknown:
        raise ValueError(f"checkpoint does not fit the model: it lacks {missing} and has {unknown} left over")


def warn_of_dropped_classifier(state_dict: dict[str, Tensor], model: nn.Module, classifier: str = "head.fc") -> None:
    """Warns where timm will drop a classifier that fits, since the entry tells another number of classes."""
    cfg = getattr(model, "pretrained_cfg", {})
    stated = cfg.get("num_classes") if cfg.get("classifier") else None
    head = state_dict.get(f"{classifier}.weight")
    if head is not None and stated is not None and len(head) == model.num_classes != stated:
        warnings.warn(
            f"the checkpoint's classifier has {len(head)} classes, as the model, but its pretrained_cfg says {stated}, "
            "so that timm drops it: give num_classes in pretrained_cfg_overlay to keep it",
            stacklevel=2,
        )
