"""The layers of RAT, for 2D and 3D alike; tokens are channels-last, ``[B, *grid, C]``."""

from ..ops.assignment import Assignment, carry_up, compose, to_pixels
from ..ops.grouping_dense import grouping_attention
from ..ops.grouping_local import local_grouping_attention
from ..ops.neighborhood import neighborhood_attention
from .adaptive_patching import AdaptivePatching, Patches, interpolate_pos_embed
from .attention import Attention, Block
from .grouping import (
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    SpatialGroupingAttention,
)
from .rose import RotarySpatialEmbedding, Rotation
from .stem import Stem

__all__ = [
    "AdaptivePatching",
    "Assignment",
    "Attention",
    "Block",
    "DenseSpatialGroupingAttention",
    "Patches",
    "RotarySpatialEmbedding",
    "Rotation",
    "SparseSpatialGroupingAttention",
    "SpatialGroupingAttention",
    "Stem",
    "carry_up",
    "compose",
    "grouping_attention",
    "interpolate_pos_embed",
    "local_grouping_attention",
    "neighborhood_attention",
    "to_pixels",
]
