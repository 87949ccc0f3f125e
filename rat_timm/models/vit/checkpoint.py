"""Checkpoints of plain ViTs: what is asked of all of them in the end."""

from torch import Tensor, nn

from ...timm_api.state_dict import check_names, warn_of_dropped_classifier

_HEAD = ("head.", "attn_pool.", "norm.", "fc_norm.")  # what another number of classes or another pooling changes


def check_whole(state_dict: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ``ValueError`` if parameters are missing or left over, but for those around the classifier."""
    check_names(state_dict, model, _HEAD)
    warn_of_dropped_classifier(state_dict, model, "head")
