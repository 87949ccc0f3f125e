"""Checkpoints of rotary ViTs: timm's and our own, of images or volumes."""

from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import eva
from timm.models._input import get_pretrained_grid_size
from torch import Tensor

from ...geometry.grid import axis_values
from ...timm_api.state_dict import fit, unwrap
from ..vit.checkpoint import check_whole
from .model import RatVit
from .patches import resample_kernel
from .rotary import extend_along_z

_KERNEL = "patch_embed.proj.weight"
_KERNELS = (_KERNEL, "patch_embed.projection.weight")  # as timm and other libraries name it, behind any prefix


def checkpoint_filter_fn(state_dict: dict[str, Any], model: RatVit) -> dict[str, Tensor]:
    """Turns a checkpoint into a state dict of ``model``: unwrapped, by timm's filter, with other axes and channels.

    Raises:
        ValueError: If parameters are missing or left over, but for those around the classifier; if the weights are of
            volumes and the model is not, or were trained at another spacing.
    """
    _check_spacing(model)
    weights = unwrap(state_dict)
    # timm's filter knows kernels and embeddings of images only: it is given the rest
    own = [name for name in weights if name.endswith(_KERNELS) or name == "pos_embed"]
    filtered = eva.checkpoint_filter_fn({name: weight for name, weight in weights.items() if name not in own}, model)
    filtered |= {_KERNEL if name.endswith(_KERNELS) else name: weights[name] for name in own}
    kernel = filtered.get(_KERNEL)
    if kernel is not None and kernel.ndim > model.patch_embed.proj.weight.ndim:
        raise ValueError("spatial_dims must be 3 for these weights, whose patches have a depth, got 2")
    if "pos_embed" in own:
        filtered["pos_embed"] = _fit_embedding(filtered["pos_embed"], kernel, model)
    freqs = filtered.get("rope.freqs")
    if freqs is not None and len(freqs) < model.spatial_dims:
        filtered["rope.freqs"] = extend_along_z(freqs)
    filtered = fit(filtered, model, _KERNEL)
    if kernel is not None:
        filtered[_KERNEL] = resample_kernel(filtered[_KERNEL], model.patch_embed.proj.kernel_size)
    check_whole(filtered, model)
    return filtered


def _fit_embedding(embedding: Tensor, kernel: Tensor | None, model: RatVit) -> Tensor:
    """Resamples a learned embedding ``[1, P + N, C]`` to the model's grid of patches, as timm's filter does."""
    if model.pos_embed is None:
        return embedding
    prefix = model._embedded_prefix
    plane = kernel if kernel is None or kernel.ndim == 4 else kernel[:, :, 0]
    old = get_pretrained_grid_size(model, plane, embedding.shape[1] - prefix)
    new = model.patch_embed.grid_size
    if embedding.shape[1] == model.pos_embed.shape[1] and old in (None, new):
        return embedding
    return resample_abs_pos_embed(embedding, list(new), old, num_prefix_tokens=prefix)


def _check_spacing(model: RatVit) -> None:
    stored = getattr(model, "pretrained_model_args", {}).get("spacing")
    if stored is not None:
        trained = axis_values(stored, "spacing", 2 if isinstance(stored, (int, float)) else len(stored))
        if trained[-2:] != model.reference_spacing[-2:]:
            raise ValueError(
                f"spacing {model.reference_spacing} is not that of the weights, {stored}, and these positions are in "
                "fixed units: load the weights with their own, and tell forward the images' spacing"
            )
