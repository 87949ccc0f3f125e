"""``features_only=True`` for models that take more than an image."""

from typing import Any

from timm.models._features import FeatureGetterNet
from torch import Tensor


class RatFeatures(FeatureGetterNet):
    """A backbone that returns feature maps, channels first, and passes on spacing, mask and origin.

    timm's own `FeatureGetterNet` takes the image alone.
    """

    def forward(self, x: Any, spacing: Any = None, mask: Any = None, origin: Any = None) -> list[Tensor]:
        """Returns one map per index in ``out_indices``; for a pyramid, each is a list with one map per level."""
        return self.model.forward_intermediates(
            x,
            indices=self.out_indices,
            norm=self.norm,
            output_fmt=self.output_fmt,
            intermediates_only=True,
            spacing=spacing,
            mask=mask,
            origin=origin,
        )
