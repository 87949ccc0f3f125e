"""Checkpoints of rotary ViTs: timm's and our own, of images or volumes."""

import types
from typing import Any

from timm.models import eva
from torch import Tensor

from ...geometry.grid import axis_values
from ...timm_api.state_dict import check_names, fit, unwrap, warn_of_dropped_classifier
from .model import RatVit
from .patches import resample_kernel
from .rotary import extend_along_z

_HEAD = ("head.", "attn_pool.", "norm.", "fc_norm.")  # what another number of classes or another pooling changes


class _Flat:
    """A model of volumes as timm's filter expects it: its patch kernel has two axes."""

    def __init__(self, model: RatVit) -> None:
        self._model = model
        weight = model.patch_embed.proj.weight[:, :, 0]
        self.patch_embed = types.SimpleNamespace(
            proj=types.SimpleNamespace(weight=weight), grid_size=model.patch_embed.grid_size
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RatVit) -> dict[str, Tensor]:
    """Turns a checkpoint into a state dict of ``model``: unwrapped, by timm's filter, with other axes and channels.

    Raises:
        ValueError: If parameters are missing or left over, but for those around the classifier.
    """
    state_dict = unwrap(state_dict)
    _check_spacing(model)
    kernel, own = "patch_embed.proj.weight", state_dict.get("patch_embed.proj.weight")
    if own is not None and own.ndim == 5:
        state_dict = {**state_dict, kernel: own.sum(dim=2)}
    state_dict = eva.checkpoint_filter_fn(state_dict, _Flat(model) if model.spatial_dims == 3 else model)
    if own is not None and own.ndim == 5:
        state_dict = {**state_dict, kernel: resample_kernel(own, model.patch_embed.proj.kernel_size)}
    freqs = state_dict.get("rope.freqs")
    if freqs is not None and len(freqs) < model.spatial_dims:
        state_dict = {**state_dict, "rope.freqs": extend_along_z(freqs)}
    state_dict = fit(state_dict, model, kernel)
    check_names(state_dict, model, _HEAD)
    warn_of_dropped_classifier(state_dict, model, "head")
    return state_dict


def _check_spacing(model: RatVit) -> None:
    known = getattr(model, "pretrained_model_args", {}).get("spacing")
    if known is not None:
        trained = axis_values(known, "spacing", 2 if isinstance(known, (int, float)) else len(known))
        if trained[-2:] != model.reference_spacing[-2:]:
            raise ValueError(
                f"spacing {model.reference_spacing} is not that of the weights, {known}, and these positions are in "
                "fixed units: load the weights with their own, and tell forward the images' spacing"
            )
