"""Dense prediction: instances in images and volumes."""

from .instances import instance_loss, instance_targets, instances
from .matching import THRESHOLDS, Matches, match

__all__ = ["THRESHOLDS", "Matches", "instance_loss", "instance_targets", "instances", "match"]
