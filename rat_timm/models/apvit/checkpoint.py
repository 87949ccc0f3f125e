"""Checkpoints of adaptive ViTs: timm's ViTs' and our own."""

from typing import Any

from timm.models import vision_transformer
from torch import Tensor

from ...timm_api.state_dict import fit, unwrap
from ..vit.checkpoint import check_whole
from .model import AdaptiveVit


def checkpoint_filter_fn(state_dict: dict[str, Any], model: AdaptiveVit) -> dict[str, Tensor]:
    """Turns a checkpoint, of timm's `VisionTransformer` or our own, into a state dict of ``model``.

    What timm's has no notion of starts as in a new model: the network that places patches, and rotary frequencies. A
    learned embedding is dropped where positions are rotary.

    Raises:
        ValueError: If parameters are missing or left over, but for those around the classifier.
    """
    weights = vision_transformer.checkpoint_filter_fn(unwrap(state_dict), model)
    for first_conv in ("patch_embed.proj.weight", "patching.predictor.convs.0.weight"):
        weights = fit(weights, model, first_conv)
    for part in (".rose.", "patching."):
        if not any(part in name for name in weights):
            weights.update({name: new for name, new in model.state_dict().items() if part in name})
    if model.pos_embed is None:
        weights.pop("pos_embed", None)
    check_whole(weights, model)
    return weights
