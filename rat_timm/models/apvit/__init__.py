"""Adaptive ViTs: timm's ViTs whose patches go where the image is interesting, the names ``apvit_*``.

A small network predicts from the image where each patch is cut out: it is moved and, if asked, enlarged (``scaling``,
``max_scale``) and turned (``rotate``), but never out of the image. Before training, patches are the regular grid, so
that the network is the plain ViT; with fewer patches (``num_patches``) they cover the image evenly.

```python
import timm
import torch

import rat_timm

model = timm.create_model("apvit_tiny_patch16_224", num_patches=16, scaling="isotropic", max_scale=4.0)
image = torch.randn(1, 3, 256, 320)
logits = model(image)
where = model.patches(image, spacing=0.5).position  # [1, 16, 2], physical
```

``positions="rose"`` rotates queries and keys by the patches' physical positions instead of interpolating the learned
embedding. A set of patches has no order and forms no map: ``forward_intermediates`` gives sequences
(``output_fmt="NLC"``), with the patches' places in ``output_dict=True``; ``features_only`` is an error. The layers,
`rat_timm.layers.AdaptivePatching` and `rat_timm.layers.interpolate_pos_embed`, take volumes too.

``examples/adaptive_patches.py`` compares with regular patches; ``examples/benchmarks.md`` has the result. The predictor
wants a lower learning rate than the rest (0.3 of it there): at the same rate one network in six did not learn.
"""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn
from .model import AdaptiveVit
from .variants import VARIANTS, create

__all__ = ["AdaptiveVit", "checkpoint_filter_fn"]

register(Family("apvit", create, VARIANTS), __name__)
