"""Resolution-aware vision backbones for timm; importing this package registers them.

Spacing is physical, in array-axis order (z, y, x). Masks are True where valid.
"""

from .geometry.grid import Grid
from .geometry.plans import set_plan_limit
from .geometry.read import geometry
from .geometry.resample import resample_limit, set_resample_limit
from .models import AdaptiveVit, RatConfig, RatVit, ResolutionAwareTransformer
from .ops.neighborhood import attention_backend, set_attention_backend
from .timm_api import hub

__version__ = "0.1.0"

__all__ = [
    "AdaptiveVit",
    "Grid",
    "RatConfig",
    "RatVit",
    "ResolutionAwareTransformer",
    "__version__",
    "attention_backend",
    "geometry",
    "hub",
    "resample_limit",
    "set_attention_backend",
    "set_plan_limit",
    "set_resample_limit",
]
