"""Checkpoints of the package ``resolution-aware-transformer``, read into `rat_classic`."""

import re

import torch
from torch import Tensor

from .config import RatConfig

_RENAMES = (
    (r"^init_proj\.", r"stem.convs.0."),
    (r"^leading_tokens$", r"stages.0.reg_tokens"),
    (r"^sga_layers\.(\d+)\.", r"stages.\1.downsample.sga."),
    (r"^mr_attn_layers\.(\d+)\.(qkv|proj|rose)\.", r"stages.\1.blocks.0.attn.\2."),
    (r"^mr_attn_layers\.(\d+)\.", r"stages.\1.blocks.0."),
)


def convert_upstream(state_dict: dict[str, Tensor], cfg: RatConfig) -> dict[str, Tensor]:
    """Renames an upstream state dict and puts its rotary parameters into our units of length.

    Upstream's ``mask_embedding`` is dropped: masked tokens take no part. Upstream's coordinates are physical, ours are
    divided by the layer's unit u, so that ``a * s^b + c * log(s / d)`` keeps its value with ``a * u^b`` and ``d / u``;
    without these parameters the frequencies are multiplied by u.

    Args:
        state_dict: Of `resolution_aware_transformer.ResolutionAwareTransformer`.
        cfg: Of the model that is to load it.

    Raises:
        ValueError: If the scaling is a logarithm that no checkpoint holds: it has no equal in other units.
    """
    if not cfg.learnable_rose_scaling and cfg.rose_initial_scaling == "log":
        raise ValueError("rose_initial_scaling 'log' converts only if it is learnable (learnable_rose_scaling)")
    renamed = {_rename(key): value for key, value in state_dict.items() if not key.endswith("mask_embedding")}
    for i, stage in enumerate(cfg.stages()):
        _rescale(renamed, f"stages.{i}.downsample.sga.rose.", stage.sga_unit)
        _rescale(renamed, f"stages.{i}.blocks.0.attn.rose.", stage.unit)
    return renamed


def _rename(key: str) -> str:
    for pattern, name in _RENAMES:
        key = re.sub(pattern, name, key)
    return key


def _rescale(state_dict: dict[str, Tensor], prefix: str, unit: tuple[float, ...]) -> None:
    if f"{prefix}scale_a" in state_dict:
        a, b, d = (state_dict[f"{prefix}scale_{name}"] for name in "abd")
        length = torch.tensor(unit, dtype=a.dtype, device=a.device)
        state_dict[f"{prefix}scale_a"] = a * length**b
        state_dict[f"{prefix}scale_d"] = d / length
    elif f"{prefix}freqs" in state_dict:
        freqs = state_dict[f"{prefix}freqs"]
        state_dict[f"{prefix}freqs"] = freqs * torch.tensor(unit, dtype=freqs.dtype, device=freqs.device)
