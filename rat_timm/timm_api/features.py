"""``features_only=True`` for models that take more than an image."""

from timm.models._features import FeatureGetterNet

from ..geometry.types import ImageOrPyramid, MapOrMaps, MaskLike, OriginLike, SpacingLike


class RatFeatures(FeatureGetterNet):
    """A backbone that returns feature maps, channels first, and passes on spacing, mask and origin.

    timm's own `FeatureGetterNet` takes the image alone.
    """

    def forward(
        self,
        x: ImageOrPyramid,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> list[MapOrMaps]:
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
