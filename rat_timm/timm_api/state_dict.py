"""State dicts that are not quite a model's: wrapped, of other axes or channels, with parameters missing."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import adapt_input_conv, clean_state_dict
from torch import Tensor, nn

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def unwrap(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state dict in a training checkpoint (the moving average first), without the prefixes of wrappers."""
    wrapped = [checkpoint[name] for name in _WRAPPERS if isinstance(checkpoint.get(name), dict)]
    return clean_state_dict(wrapped[0] if wrapped else checkpoint)


def fit(state_dict: dict[str, Tensor], model: nn.Module, first_conv: str = "stem.convs.0.weight") -> dict[str, Tensor]:
    """Gives tensors the axes, and ``first_conv`` the input channels, that ``model`` has.

    Convolutions are spread evenly over a new first axis, so that an input constant along it gives what it gave without;
    frequencies are zero along it, and biases of relative positions the same. Where a neighbourhood has another size,
    its outermost biases are left out or repeated. Channels are summed or repeated as timm does.
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
    elif kind == "rpb":
        value = _fit_bias(value, shape)
    elif value.ndim > 2:
        value = inflate(value, shape)
    return value


def _fit_bias(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Gives biases ``[heads, *relative positions]`` the axes and the number of positions of ``shape``."""
    missing = len(shape) - value.ndim
    value = value.reshape(len(value), *[1] * missing, *value.shape[1:]).expand(
        -1, *shape[1 : 1 + missing], *value.shape[1:]
    )
    for axis, length in enumerate(shape[1:], start=1):
        middle = value.shape[axis] // 2
        steps = torch.arange(length, device=value.device) - length // 2 + middle
        value = value.index_select(axis, steps.clamp(0, value.shape[axis] - 1))
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


def different_shapes(one: nn.Module, other: nn.Module) -> list[str]:
    """Returns the names of what only one of two models has, or both in other shapes."""
    a, b = ({name: value.shape for name, value in model.state_dict().items()} for model in (one, other))
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


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
