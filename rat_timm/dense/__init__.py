"""Dense prediction: instances in images and volumes, and detection in images."""

from .detection import fcos, mask_rcnn
from .instances import instance_loss, instance_targets, instances
from .matching import THRESHOLDS, Matches, match_instances

__all__ = [
    "THRESHOLDS",
    "Matches",
    "fcos",
    "instance_loss",
    "instance_targets",
    "instances",
    "mask_rcnn",
    "match_instances",
]
