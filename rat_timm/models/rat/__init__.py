"""The Resolution Aware Transformer, hierarchical: the names ``rat_*``, for images and volumes."""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn
from .config import RatConfig
from .model import ResolutionAwareTransformer
from .variants import VARIANTS, create

__all__ = ["RatConfig", "ResolutionAwareTransformer", "checkpoint_filter_fn"]

register(Family("rat", create, VARIANTS), __name__)
