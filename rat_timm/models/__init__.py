"""The families of models; importing this package registers them with timm."""

from .apvit import AdaptiveVit
from .rat import RatConfig, ResolutionAwareTransformer
from .rope_vit import RatVit

__all__ = ["AdaptiveVit", "RatConfig", "RatVit", "ResolutionAwareTransformer"]
