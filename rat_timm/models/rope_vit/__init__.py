"""Plain RAT: timm's rotary ViTs with their weights, the names ``rat_vit_*``, ``rat_eva02_*`` and the like."""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn
from .model import RatVit
from .variants import VARIANTS, create

__all__ = ["RatVit", "checkpoint_filter_fn"]

register(Family("rope_vit", create, VARIANTS), __name__)
