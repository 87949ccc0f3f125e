"""Adaptive ViTs' registered names: ``ap`` and timm's name."""

from typing import Any

from torch import nn

from ...timm_api.build import entries_of
from ...timm_api.families import Variant
from ..vit.variants import create_vit
from .checkpoint import checkpoint_filter_fn
from .model import AdaptiveVit


def create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Makes a registered model; see `rat_timm.timm_api.build`.

    Raises:
        ValueError: If maps are asked for.
    """
    if kwargs.pop("features_only", False):
        raise ValueError(
            "features_only gives maps, which adaptive patches do not form: use forward_intermediates, whose sequences "
            "come with the patches' places"
        )
    return create_vit(
        AdaptiveVit,
        variant,
        pretrained,
        like=variant.removeprefix("ap"),
        filter_fn=checkpoint_filter_fn,
        defaults=VARIANTS[variant].defaults,
        **kwargs,
    )


def _variant(size: str, embed_dim: int, num_heads: int) -> Variant:
    arch = f"vit_{size}_patch16_224"
    defaults = {"patch_size": 16, "embed_dim": embed_dim, "num_heads": num_heads}
    return Variant(f"timm's ``{arch}`` with adaptive patches.", defaults, entries_of(arch))


VARIANTS = {
    "apvit_tiny_patch16_224": _variant("tiny", 192, 3),
    "apvit_small_patch16_224": _variant("small", 384, 6),
    "apvit_base_patch16_224": _variant("base", 768, 12),
}
