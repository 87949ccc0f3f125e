"""Resolution-aware vision backbones for timm; importing this package registers them.

Spacing is physical, in array-axis order (z, y, x). Masks are True where valid.
"""

from .context import geometry
from .grid import Grid
from .layers.backend import attention_backend, set_attention_backend
from .layers.resample import resample_limit, set_resample_limit
from .layers.tiling import set_plan_limit
from .models import AdaptiveVit, RatConfig, RatVit, ResolutionAwareTransformer

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
    "resample_limit",
    "set_attention_backend",
    "set_plan_limit",
    "set_resample_limit",
]
