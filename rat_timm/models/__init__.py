"""Models; importing this package registers them with timm."""

from .config import RatConfig
from .rat import ResolutionAwareTransformer
from .vit import RatVit

__all__ = ["RatConfig", "RatVit", "ResolutionAwareTransformer"]
