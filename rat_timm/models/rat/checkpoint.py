"""Checkpoints of RAT: our own, upstream's, NAT's; of other axes, channels or reference spacings."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...geometry.grid import axis_values
from ...timm_api.state_dict import check_names, fit, unwrap, warn_of_dropped_classifier
from .config import RatConfig, default_window
from .model import ResolutionAwareTransformer
from .nat import from_nat, is_nat

_UPSTREAM = (
    (r"^init_proj\.", r"stem.convs.0."),
    (r"^leading_tokens$", r"stages.0.reg_tokens"),
    (r"^sga_layers\.(\d+)\.", r"stages.\1.downsample.sga."),
    (r"^mr_attn_layers\.(\d+)\.(qkv|proj|rose)\.", r"stages.\1.blocks.0.attn.\2."),
    (r"^mr_attn_layers\.(\d+)\.", r"stages.\1.blocks.0."),
)
_ROSE = re.compile(r"^stages\.(\d+)\.(downsample|blocks)\..*rose\.(freqs|scale_a|scale_d)$")


def checkpoint_filter_fn(checkpoint: dict[str, Any], model: ResolutionAwareTransformer) -> dict[str, Tensor]:
    """Turns a checkpoint into a state dict of ``model``.

    Takes our own state dicts, those of `resolution_aware_transformer.ResolutionAwareTransformer` and those of NAT (its
    authors', or transformers'); timm's training checkpoints, of which the moving average if there is one; names with
    the prefixes of DistributedDataParallel and ``torch.compile``; images' weights for a model of volumes; any number of
    channels; another reference spacing, if ``model.pretrained_model_args`` tells the one that the weights were trained
    with (positions keep their meaning, but a physical stem then sees pixels of another size, and a warning says so);
    with or without a mask token.

    Raises:
        ValueError: If parameters are missing or left over, but for the classifier, or cannot be converted.
    """
    state_dict, cfg = unwrap(checkpoint), model.cfg
    known = getattr(model, "pretrained_model_args", {}).get("spacing")
    if is_nat(state_dict):
        state_dict = from_nat(state_dict, model)
    if is_upstream(state_dict):
        check_axes(state_dict["init_proj.weight"], cfg)
        state_dict = rename_upstream(state_dict)
        lengths = [(stage.sga_unit, stage.unit) for stage in cfg.stages()]  # upstream's unit is 1
    else:
        check_axes(state_dict.get("stem.convs.0.weight"), cfg)
        ratio = (1.0,) * cfg.spatial_dims if known is None else spacing_ratio(cfg, known)
        if cfg.physical_stem and any(r != 1 for r in ratio):
            warnings.warn(
                f"weights were trained with pixels of {known} in front of the stem, and spacing={cfg.spacing} brings "
                "images to others: leave spacing out and tell images' own, or fine-tune",
                stacklevel=2,
            )
        lengths = [(ratio, ratio)] * len(cfg.depths)
    state_dict = rescale(fit(_with_mask_token(state_dict, model), model), lengths, cfg)
    check_names(state_dict, model)
    warn_of_dropped_classifier(state_dict, model)
    return state_dict


def upgrade_keywords(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns saved keywords with those that mean something else since version 0.1.0.

    Groups had the finer stage's width then, ``sga_attention_type`` None meant that the last grouping was dense, and
    ``attn_kernel_size`` None that attention in the last stage was global. All blocks were attention, groupings attended
    at their groups' width, and no stem pooled.
    """
    if not {"iters", "spatial_dims", "depths", "group_first"} <= saved.keys():  # by hand: models were saved with all
        return saved
    former = {"group_width": "fine", "group_attn_width": "coarse", "block_types": "attention", "stem_pool": False}
    saved = {**former, **saved}
    if saved.get("sga_attention_type") is None:
        groupings = len(saved["depths"]) - 1 + saved["group_first"]
        saved["sga_attention_type"] = ("sparse",) * (groupings - 1) + ("dense",) * min(groupings, 1)
    if "joint_attention" not in saved:
        saved["joint_attention"] = False
        if saved.get("attn_kernel_size") is None:
            saved["attn_kernel_size"] = (default_window(saved["spatial_dims"]),) * (len(saved["depths"]) - 1) + (0,)
    return saved


def explicit_keywords(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns saved keywords as ``timm.create_model`` takes them: it drops None, and names have their own windows."""
    saved = upgrade_keywords(saved)
    if "spatial_dims" in saved and saved.get("attn_kernel_size", 0) is None:
        saved = {**saved, "attn_kernel_size": default_window(saved["spatial_dims"])}
    return saved


def _with_mask_token(state_dict: dict[str, Tensor], model: ResolutionAwareTransformer) -> dict[str, Tensor]:
    """Drops a mask token that the model does not have, and lets one start anew that the checkpoint does not have."""
    name, own = "stem.mask_token", model.stem.mask_token
    if own is None:
        return {key: value for key, value in state_dict.items() if key != name}
    return {name: own.detach(), **state_dict}


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
