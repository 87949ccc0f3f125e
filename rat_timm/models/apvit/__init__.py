"""Adaptive ViTs: timm's ViTs whose patches go where the image is interesting, the names ``apvit_*``."""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn
from .model import AdaptiveVit
from .variants import VARIANTS, create

__all__ = ["AdaptiveVit", "checkpoint_filter_fn"]

register(Family("apvit", create, VARIANTS), __name__)
