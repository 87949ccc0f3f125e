"""Models; importing this package registers them with timm."""

from .config import RatConfig
from .rat import ResolutionAwareTransformer

__all__ = ["RatConfig", "ResolutionAwareTransformer"]
