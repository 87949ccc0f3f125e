"""RAT's registered names, each a few lines of data, and what makes their models.

Budgets are those of NAT (arXiv 2204.07143): 27.9 / 50.7 / 89.7 / 200.9 M parameters.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ...timm_api.build import build
from ...timm_api.families import Variant
from .checkpoint import checkpoint_filter_fn, upgrade_keywords
from .config import RatConfig
from .model import ResolutionAwareTransformer
from .nat import LICENSE


def create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Makes a registered model; see `rat_timm.timm_api.build`."""
    cfg: RatConfig = VARIANTS[variant].defaults["cfg"]
    return build(
        ResolutionAwareTransformer,
        variant,
        pretrained,
        model_cfg=cfg,
        filter_fn=checkpoint_filter_fn,
        upgrade=upgrade_keywords,
        entry_args={"spacing": cfg.spacing},
        feature_indices=(0, 1, 2, 3),
        **kwargs,
    )


def _cfg(input_size: tuple[int, ...] = (3, 224, 224), stride: int = 32, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": input_size,
        "pool_size": tuple(math.ceil(n / stride) for n in input_size[1:]),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.convs.0",
        "classifier": "head.fc",
        "license": "bsd-3-clause",
        **kwargs,
    }


def _cfg_3d(input_size: tuple[int, ...] = (1, 96, 96, 96), **kwargs: Any) -> dict[str, Any]:
    return _cfg(input_size, num_classes=0, crop_pct=1.0, mean=(0.0,), std=(1.0,), **kwargs)


def _imagenet(arch: str, accuracy: float) -> dict[str, Any]:
    """Returns what is known of the weights that NAT's authors published, which have to be converted."""
    return {
        "origin_url": f"https://shi-labs.com/projects/nat/checkpoints/CLS/nat_{arch}.pth",
        "description": f"NAT's weights, trained on ImageNet-1k by its authors: {accuracy}% right by their account.",
        "notes": (LICENSE,),
        "paper_name": "Neighborhood Attention Transformer",
        "paper_ids": "arXiv:2204.07143",
        "license": "mit",
    }


def _digits(input_size: tuple[int, ...], **kwargs: Any) -> dict[str, Any]:
    name = f"test_rat{'_3d' if len(input_size) == 4 else ''}.digits"
    return _cfg(
        input_size,
        num_classes=10,
        crop_pct=1.0,
        file=str(Path(__file__).parent / "weights" / f"{name}.safetensors"),
        description=f"Handwritten digits in a field of view of 32 units; data, recipe and accuracy: weights/{name}.md",
        **kwargs,
    )


_LAYOUT = RatConfig(
    mlp_ratio=(4.0, 4.0, 3.0, 3.0),
    block_types=("conv", "conv", "attention", "attention"),
    attn_kernel_size=(7, 7, 15, 7),
    group_attn_width="fine",
    stem_kernel_size=(7,),
    stem_pool=True,
)
"""Of images: convolutions where there are many tokens; then attention, in stage 3 to all of an image of 224 pixels."""

_CLASSIC = RatConfig(
    embed_dim=(128,) * 4,
    depths=(1,) * 4,
    num_heads=16,
    mlp_ratio=4.0,
    attn_kernel_size=0,
    stem_kernel_size=(7,),
    stem_stride=1,
    physical_stem=False,
    kernel_size=7,
    stride=3,
    sga_attention_type="dense",
    group_width="fine",
    sga_mlp_ratio=4.0,
    iters=3,
    group_first=True,
    rotary_ratio=0.5,
    base_theta=1e4,
    frequency_scaling="sqrt",
    learnable_rose_scaling=True,
    rose_initial_scaling="identity",
    final_norm=False,
)
"""The network of the package ``resolution-aware-transformer``, with its defaults."""

_NAT = RatConfig(
    depths=(3, 4, 18, 5),
    attn_kernel_size=7,
    linear_stem=True,
    norm_eps=1e-5,
    relative_bias=True,
    pad_windows=True,
    initial_frequency=0.0,
    group_share=0.0,
)
"""The layout of NAT, at first without positions and groups."""

_NAT_ARCHITECTURES = {
    "mini": replace(_NAT, embed_dim=64, depths=(3, 4, 6, 5), mlp_ratio=3.0),
    "tiny": replace(_NAT, embed_dim=64, mlp_ratio=3.0),
    "small": replace(_NAT, embed_dim=96, layer_scale=1e-5),
    "base": replace(_NAT, embed_dim=128, layer_scale=1e-5),
}
_NAT_ACCURACIES = {"mini": 81.8, "tiny": 83.2, "small": 83.7, "base": 84.3}

# dense grouping of single pixels costs the square of their number: its input is small
_CLASSIC_CFG = {"untrained": _cfg((3, 64, 64), stride=81)}
_CLASSIC_3D_CFG = {"untrained": _cfg_3d((1, 16, 16, 16), stride=81)}


def _images(description: str, cfg: RatConfig, entries: dict[str, Any] | None = None) -> Variant:
    return Variant(description, {"cfg": cfg}, entries or {"untrained": _cfg()})


def _volumes(description: str, cfg: RatConfig, entries: dict[str, Any] | None = None) -> Variant:
    # a convolution d -> 2d with 27 taps would be an eighth of all parameters
    cfg = replace(cfg, spatial_dims=3, group_width="fine", sga_mlp_ratio=max(1.0, cfg.sga_mlp_ratio))
    return Variant(description, {"cfg": cfg}, entries or {"untrained": _cfg_3d()})


def _nats(arch: str, images: str, volumes: str) -> dict[str, Variant]:
    """Returns the variants of NAT's layout, for images and for volumes, of so many parameters."""
    cfg, origin = _NAT_ARCHITECTURES[arch], _imagenet(arch, _NAT_ACCURACIES[arch])
    # windows of 5 as in other volumes; around thin ones no tokens are made up. What groups start from is the
    # convolution d -> 2d, inflated
    deep = replace(cfg, spatial_dims=3, attn_kernel_size=5, pad_windows=False)
    flat_cfg, deep_cfg = _cfg(**origin | {"crop_pct": 0.875}), _cfg_3d(**origin)
    return {
        f"rat_nat_{arch}": Variant(f"NAT's layout, {images} parameters.", {"cfg": cfg}, {"in1k": flat_cfg}),
        f"rat_nat_{arch}_3d": Variant(
            f"NAT's layout for volumes, {volumes} parameters.", {"cfg": deep}, {"in1k": deep_cfg}
        ),
    }


VARIANTS = {
    "rat_tiny": _images("Tiny, 26.9 M parameters.", replace(_LAYOUT, embed_dim=96, depths=(1, 1, 6, 2))),
    "rat_small": _images("Small, 51.7 M parameters.", replace(_LAYOUT, embed_dim=96, depths=(3, 4, 18, 3))),
    "rat_base": _images("Base, 91.4 M parameters.", replace(_LAYOUT, embed_dim=128, depths=(3, 4, 18, 3))),
    "rat_large": _images("Large, 205 M parameters.", replace(_LAYOUT, embed_dim=192, depths=(3, 4, 18, 3))),
    "rat_huge": _images("Huge, 632 M parameters.", replace(_LAYOUT, embed_dim=320, depths=(3, 4, 22, 3))),
    "rat_tiny_3d": _volumes(
        "Tiny for volumes, 5.2 M parameters.", RatConfig(embed_dim=32, depths=(3, 4, 6, 5), mlp_ratio=3.0)
    ),
    "rat_small_3d": _volumes(
        "Small for volumes, 20.9 M parameters.", RatConfig(embed_dim=64, depths=(3, 4, 6, 5), mlp_ratio=3.0)
    ),
    "rat_base_3d": _volumes("Base for volumes, 53.1 M parameters.", RatConfig(embed_dim=96)),
    "rat_large_3d": _volumes("Large for volumes, 94.3 M parameters.", RatConfig(embed_dim=128)),
    "rat_huge_3d": _volumes("Huge for volumes, 377 M parameters.", RatConfig(embed_dim=256)),
    "rat_classic": _images(
        "The seed package's network, 4.75 M parameters; loads its state dicts.", _CLASSIC, _CLASSIC_CFG
    ),
    "rat_classic_3d": _volumes("The seed package's network for volumes.", _CLASSIC, _CLASSIC_3D_CFG),
    **_nats("mini", "20.9 M", "23.6 M"),
    **_nats("tiny", "28.8 M", "31.5 M"),
    **_nats("small", "52.7 M", "59.2 M"),
    **_nats("base", "93.2 M", "105 M"),
    "test_rat": _images(
        "For tests.",
        RatConfig(embed_dim=(32, 64, 64, 128), depths=(1, 1, 1, 1)),
        {"digits": _digits((3, 32, 32), mean=(0.3,) * 3, std=(0.4,) * 3)},
    ),
    "test_rat_3d": _volumes(
        "For tests, volumes.",
        RatConfig(embed_dim=(32, 32, 64, 96), depths=(1, 1, 1, 1)),
        {"digits": _digits((1, 16, 32, 32), mean=(0.1,), std=(0.25,))},
    ),
}
