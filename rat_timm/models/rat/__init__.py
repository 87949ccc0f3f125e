"""The Resolution Aware Transformer, hierarchical: the names ``rat_*``, for images and volumes.

Four stages at strides 4, 8, 16 and 32; between them, spatial grouping attention assigns tokens to fewer tokens. For
volumes all stages are neighbourhood attention (windows of 5 x 5 x 5) with rotary embeddings of physical positions. For
images stages 1 and 2 are convolution blocks, stage 3 has windows of 15 x 15, the whole of an image of 224 pixels, and
stage 4 of 7 x 7; their stem takes the largest of neighbouring values, which lets them learn from few images
(`examples/benchmarks.md`). The cost is linear in the number of pixels. In the last stage the levels of a pyramid meet:
all their tokens, and prefix tokens, attend to all.

Every field of `RatConfig` is a keyword of ``timm.create_model``; any variant takes ``spatial_dims=2 | 3``, for volumes
with thick slices ``stem_stride=(1, 4, 4)``, for denser maps of the same weights ``output_stride=8 | 16``, and for
masked image modelling ``mask_token=True``.

```python
import timm

import rat_timm

model = timm.create_model("test_rat", pretrained=True)  # ships with the package: ten handwritten digits
volumes = timm.create_model("test_rat", pretrained=True, spatial_dims=3, in_chans=1)  # its weights, inflated
```

Weights are converted where that has one meaning (`checkpoint_filter_fn`): images to volumes (a volume that is constant
along z gives what the image gave, away from the border and with the same ``attn_kernel_size``), another number of
channels or classes, another reference spacing (with ``physical_stem=False`` what an image of a given spacing gives
stays the same; else the stem then sees pixels of another size, and a warning says so). Missing or superfluous
parameters are an error.

``rat_nat_mini``, ``_tiny``, ``_small`` and ``_base`` (``*_3d`` for volumes) have the layout of NAT (arXiv 2204.07143):
two convolutions without a norm between, windows of 7 with a bias for every relative position, layer scale in the last
two. Their rotary frequencies and the gates of their groupings start at zero: with NAT's weights, which
``python -m rat_timm convert nat_tiny.pth --like rat_nat_tiny --output FOLDER`` brings into this package's form, the
network is NAT until training has learned geometry. What the weights know, they know of pixels of the reference spacing,
to which the physical stem brings every image. For volumes they are inflated, in windows of 5 (a volume that is constant
along z gives what the image gave with ``attn_kernel_size=7``).

``rat_classic`` is the network of the package ``resolution-aware-transformer`` and loads its state dicts. Its names, and
those here:

| there | here |
|---|---|
| ``input_features`` | ``in_chans`` |
| ``feature_dims`` | ``embed_dim`` |
| ``num_blocks`` | ``depths``, one block per stage: ``(1,) * num_blocks`` |
| ``sga_kernel_size``, ``kernel_size`` | ``kernel_size`` |
| ``stride``, ``iters``, ``num_heads``, ``mlp_ratio``, ``qkv_bias``, ``neighborhood_kernel`` | the same |
| ``sga_attention_type`` | the same; a sequence has one per grouping |
| ``proj_kernel_size`` | ``stem_kernel_size=(7,)`` |
| ``mlp_dropout`` | ``proj_drop_rate`` |
| ``learnable_rose``, ``rotary_ratio``, ``base_theta``, ``frequency_scaling``, ``init_jitter_std`` | the same |
| ``learnable_rose_scaling``, ``rose_initial_scaling`` | the same; on in ``rat_classic`` alone |
| ``leading_tokens`` | the same, or timm's ``reg_tokens`` |
| ``spacing`` of the constructor | ``spacing``, the reference spacing |
| ``input_spacing`` of ``forward`` | ``spacing`` |
| ``mask``, 1 = replaced | ``mask``, True = valid |
| ``x_out``, ``out_spacing``, ``out_grid_shape`` | ``forward_intermediates(output_dict=True)``: maps and ``grids`` |
| ``attn_q``, ``attn_k`` | ``return_assignments=True``: ``Assignment.attn_q`` and ``attn_k`` |
"""

from ...timm_api.families import Family, register
from .checkpoint import checkpoint_filter_fn, explicit_keywords
from .config import RatConfig
from .model import ResolutionAwareTransformer
from .variants import VARIANTS, create

__all__ = ["RatConfig", "ResolutionAwareTransformer", "checkpoint_filter_fn"]

register(Family("rat", create, VARIANTS, explicit_keywords), __name__)
