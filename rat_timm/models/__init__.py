"""Models; importing this package registers them with timm."""

from .apvit import AdaptiveVit
from .config import RatConfig
from .rat import ResolutionAwareTransformer
from .vit import RatVit

__all__ = ["AdaptiveVit", "RatConfig", "RatVit", "ResolutionAwareTransformer"]
