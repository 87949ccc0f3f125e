"""Making registered plain ViTs, each named after one of timm's, whose weights it takes."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...timm_api.build import build


def create_vit(
    model_cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    like: str,
    filter_fn: Callable[..., dict[str, Tensor]],
    defaults: Mapping[str, Any],
    **kwargs: Any,
) -> nn.Module:
    """Makes a registered model; see `rat_timm.timm_api.build`.

    Args:
        model_cls: The class.
        variant: The registered name.
        pretrained: Whether to load weights.
        like: timm's name.
        filter_fn: The family's ``checkpoint_filter_fn``.
        defaults: Keywords of the architecture.
        **kwargs: Of ``timm.create_model``.
    """
    return build(
        model_cls,
        variant,
        pretrained,
        model_cfg=None,
        like=like,
        filter_fn=filter_fn,
        entry_args={},
        defaults=defaults,
        feature_indices=kwargs.pop("out_indices", 3),
        **kwargs,
    )
