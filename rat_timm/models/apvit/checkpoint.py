"""Checkpoints of adaptive ViTs: timm's ViTs' and our own."""

from typing import Any

from timm.models import vision_transformer
from torch import Tensor

from ...timm_api.state_dict import check_names, fit, unwrap, warn_of_dropped_classifier
from .model import AdaptiveVit


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AdaptiveVit) -> dict[str, Tensor]:
    """Turns a checkpoint, of timm's `VisionTransformer` or our own, into a state dict of ``model``.

    What timm's has no notion of starts as in a new model: the network that places patches, and rotary frequencies. A
    learned embedding is dropped where positions are rotary.

    Raises:
        ValueError: If parameters are missing or left over, but for those around the classifier.
    """
    state_dict = vision_transformer.checkpoint_filter_fn(unwrap(state_dict), model)
    for first_conv in ("patch_embed.proj.weight", "patching.predictor.convs.0.weight"):
        state_dict = fit(state_dict, model, first_conv)
    for ours in (".rose.", "patching."):
        if not any(ours in name for name in state_dict):
            state_dict = {**state_dict, **{name: own for name, own in model.state_dict().items() if ours in name}}
    if model.pos_embed is None:
        state_dict.pop("pos_embed", None)
    check_names(state_dict, model, ("head.", "attn_pool.", "norm.", "fc_norm."))
    warn_of_dropped_classifier(state_dict, model, "head")
    return state_dict
