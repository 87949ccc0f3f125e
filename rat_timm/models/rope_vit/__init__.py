"""Plain RAT: timm's rotary ViTs with their weights, the names ``rat_vit_*``, ``rat_eva02_*`` and the like.

Every vision transformer of timm's with rotary positions and pretrained weights (DINOv3, RoPE-ViT, EVA-02, Perception
Encoder, SBB) is registered under ``rat_`` and timm's name, and loads timm's weights unchanged. Without a spacing it
gives timm's result; with it, positions are physical. A DINOv3 script becomes spacing-aware by three lines:

```diff
+import rat_timm
-model = timm.create_model("vit_base_patch16_dinov3.lvd1689m", pretrained=True, num_classes=5)
+model = timm.create_model("rat_vit_base_patch16_dinov3.lvd1689m", pretrained=True, num_classes=5, spacing=0.5)
-logits = model(images)
+logits = model(images, spacing=spacing)  # [batch, 2] micrometres; pretrained as if at 0.5
```

Masks, origins, pyramids and ``features_only`` work as in every model of this package. ``physical_patches=True``
resamples the patch kernel, so that a patch covers the same physical size at any pixel size; ``spatial_dims=3,
patch_depth=4`` makes a network for volumes (inflated kernel, a third axis in the frequencies).
``examples/pretrained_features.py`` shows DINOv3's features of an MR volume. The licences are those of timm's entries
(DINOv3 has one of its own); ``timm.list_models(module="rope_vit", pretrained=True)`` lists the entries.
"""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn
from .model import RatVit
from .variants import VARIANTS, create

__all__ = ["RatVit", "checkpoint_filter_fn"]

register(Family("rope_vit", create, VARIANTS), __name__)
