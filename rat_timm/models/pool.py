"""Pooling of a plain transformer's tokens where some patches are not valid."""

import math
from typing import Any

import torch
from torch import Tensor

from ..geometry.grid import fill
from ..layers.sequence import POOLS, attention_mask, pool_valid


def pool_tokens(model: Any, x: Tensor, valid: Tensor | None) -> Tensor:
    """Pools over valid patches, and as timm does where all are.

    Args:
        model: A plain transformer of timm's.
        x: Prefix tokens and patches, ``[B, P + N, C]``.
        valid: ``[B, N]``, bool, True = valid; None if all are.
    """
    if valid is None:
        return model.pool(x)
    prefix, patches = x[:, : model.num_prefix_tokens], fill(x[:, model.num_prefix_tokens :], valid)
    if model.attn_pool is not None:
        if not getattr(model, "pool_include_prefix", True):  # which timm's Eva always does
            prefix = prefix[:, :0]
        allowed = attention_mask(valid, prefix.shape[1])
        # added to the logits: that is what timm's pooling does with any mask where attention is not fused
        bias = torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, -math.inf)
        return model.attn_pool(torch.cat((prefix, patches), dim=1), attn_mask=bias)
    if model.global_pool in POOLS:
        return pool_valid(patches, valid, model.global_pool)
    return model.pool(torch.cat((prefix, patches), dim=1))
