"""The layers of the models, for 2D and 3D alike; tokens are channels-last, ``[B, *grid, C]``.

`neighborhood_attention` has NATTEN's definition and layout, and masks; `grouping_attention` (all pairs) and
`local_grouping_attention` (windows) assign fine tokens to coarse ones; `RotarySpatialEmbedding` rotates queries and
keys by physical positions. `compose` and `to_pixels` follow assignments from pixels to final tokens:

```python
import timm
import torch

import rat_timm
from rat_timm.layers import compose, to_pixels

model = timm.create_model("test_rat")
image = torch.randn(1, 3, 64, 64)
out = model.forward_intermediates(image, output_dict=True, return_assignments=True)
shares = compose(out["assignments"])  # [1, 16, 16, 4]: of each stage-1 token in each of 2 x 2 final tokens
labels = to_pixels(shares.argmax(-1), (4, 4), (64, 64))  # [1, 64, 64]
```

In a RAT an image passes through `rat_timm.geometry.read` (checks) and what `rat_timm.models.rat.stage` has: the stem,
the stages and the head; `rat_timm.geometry.Grid` carries where its tokens are.
"""

from ..ops.assignment import Assignment, carry_up, compose, to_pixels
from ..ops.grouping import grouping_attention, local_grouping_attention
from ..ops.neighborhood import neighborhood_attention
from .adaptive_patching import AdaptivePatching, Patches, interpolate_pos_embed
from .attention import Attention, Block
from .convolution import ConvBlock
from .grouping import (
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    SpatialGroupingAttention,
)
from .rose import RotarySpatialEmbedding, Rotation

__all__ = [
    "AdaptivePatching",
    "Assignment",
    "Attention",
    "Block",
    "ConvBlock",
    "DenseSpatialGroupingAttention",
    "Patches",
    "RotarySpatialEmbedding",
    "Rotation",
    "SparseSpatialGroupingAttention",
    "SpatialGroupingAttention",
    "carry_up",
    "compose",
    "grouping_attention",
    "interpolate_pos_embed",
    "local_grouping_attention",
    "neighborhood_attention",
    "to_pixels",
]
