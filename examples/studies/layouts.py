"""Layouts of networks that measurements were made with."""

from typing import Any

# of rat_tiny and the other names for images, until their stems pooled and their first stages were convolutions
FORMER: dict[str, Any] = {
    "mlp_ratio": 3.0,
    "block_types": "attention",
    "attn_kernel_size": 7,
    "group_attn_width": "coarse",
    "stem_kernel_size": [3, 3],
    "stem_pool": False,
}
