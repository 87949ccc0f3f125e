"""Other libraries' networks around a backbone of this package.

Every library that takes timm backbones takes these, but hands on the image alone. Around any of its networks,

    with rat_timm.geometry(spacing=0.5):
        masks = unet(image)

tells the backbone the rest; `WithGeometry` does so and also takes images whose sizes are no multiples of 32.
segmentation_models_pytorch finds the models under "tu-" and their name; MONAI's ``FlexibleUNet`` after
`register_monai_encoder`.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .geometry.read import Told, geometry, what_is_told
from .geometry.types import OriginLike, SpacingLike
from .layers.stem import Stem
from .ops.masking import check_mask
from .optional import import_optional


class WithGeometry(nn.Module):
    """Lets a network around a backbone of this package take spacing, mask and origin, and images of any size.

        unet = WithGeometry(smp.Unet("tu-rat_tiny", encoder_weights=None, classes=2))
        logits = unet(image, spacing=0.5, mask=mask)  # [B, 2, *size]

    Images are padded at the far ends to sizes that are multiples of ``multiple``, the padding is masked, and the result
    is cropped to the image's size. (Near the padding, neighbourhood attention keeps to windows inside the padded image,
    so that results there differ a little from those of an image that needs no padding.)

    Args:
        network: Returns ``[B, classes, *size]`` for an image ``[B, C, *size]``, such as one of
            segmentation_models_pytorch or MONAI's ``FlexibleUNet``.
        multiple: ``network`` takes images whose sizes are multiples of this number.
    """

    def __init__(self, network: nn.Module, multiple: int = 32) -> None:
        super().__init__()
        self.network = network
        self.multiple = multiple

    def forward(
        self, x: Tensor, *, spacing: SpacingLike = None, mask: Tensor | None = None, origin: OriginLike = None
    ) -> Tensor:
        """Runs the network.

        Args:
            x: ``[B, C, *size]``.
            spacing: Physical pixel size in array-axis order (z, y, x), in any form that the models take.
            mask: ``[B, *size]``, bool, True = valid.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``.

        Raises:
            ValueError: If an argument does not fit the image, or the network returns a map of another size.
        """
        filled, told = fill_up(self.network, x, what_is_told(x, spacing, mask, origin), self.multiple)
        with geometry(**told._asdict()):
            out = self.network(filled)
        if out.shape[2:] != filled.shape[2:]:
            raise ValueError(
                f"network must give maps of the size it is given, {list(filled.shape[2:])}, got {list(out.shape)}"
            )
        return out[(..., *(slice(n) for n in x.shape[2:]))]


def fill_up(network: nn.Module, x: Tensor, told: Told, multiple: int) -> tuple[Tensor, Told]:
    """Pads images ``[B, C, *size]`` with masked zeros at the far ends, to multiples of ``multiple`` along each axis."""
    fill = [part for n in reversed(x.shape[2:]) for part in (0, -n % multiple)]
    check_mask(told.mask, (len(x), *x.shape[2:]))
    if not any(fill):
        return x, told
    if any(isinstance(module, Stem) and module.mask_token is not None for module in network.modules()):
        raise ValueError(
            f"x must have sizes that are multiples of {multiple} where masked places have a token (mask_token), which "
            f"the fill would have too, got {list(x.shape[2:])}"
        )
    valid = told.mask if isinstance(told.mask, Tensor) else x.new_ones(len(x), *x.shape[2:], dtype=torch.bool)
    return F.pad(x, fill), told._replace(mask=F.pad(valid, fill))


def register_monai_encoder(name: str, **kwargs: Any) -> None:
    """Registers a hierarchical RAT as a backbone of MONAI's ``FlexibleUNet``, under its own name.

        register_monai_encoder("rat_tiny_3d")
        unet = WithGeometry(FlexibleUNet(1, 2, "rat_tiny_3d", spatial_dims=3))

    Without `WithGeometry`, ``FlexibleUNet`` returns maps of the image padded to multiples of 32.

    Args:
        name: A registered name.
        **kwargs: Keywords of ``timm.create_model``.

    Raises:
        ValueError: If the model's maps have other strides than 4, 8, 16 and 32.
    """
    base: Any = import_optional("monai.networks.blocks", "data").BaseEncoder
    nets = import_optional("monai.networks.nets.flexible_unet", "data")
    info = timm.create_model(name, features_only=True, **{**kwargs, "device": "meta"}).feature_info
    if info.reduction() != [4, 8, 16, 32]:
        raise ValueError(f"{name} must have maps at strides 4, 8, 16 and 32, got {info.reduction()}")

    class Encoder(nn.Module, base):
        """Maps at strides 2 (which has no channels), 4, 8, 16 and 32."""

        def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool) -> None:
            super().__init__()
            self.backbone = timm.create_model(
                name,
                pretrained,
                features_only=True,
                **{"spatial_dims": spatial_dims, "in_chans": in_channels, **kwargs},
            )

        def forward(self, x: Tensor) -> list[Tensor]:
            filled, told = fill_up(self.backbone, x, what_is_told(x), 32)
            maps = self.backbone(filled, **told._asdict())
            return [maps[0].new_empty(*maps[0].shape[:1], 0, *(2 * n for n in maps[0].shape[2:])), *maps]

        @classmethod
        def get_encoder_parameters(cls) -> list[dict[str, Any]]:
            return [{"spatial_dims": None, "in_channels": None, "pretrained": False}]

        @classmethod
        def num_channels_per_output(cls) -> list[tuple[int, ...]]:
            return [(0, *info.channels())]

        @classmethod
        def num_outputs(cls) -> list[int]:
            return [1 + len(info.channels())]

        @classmethod
        def get_encoder_names(cls) -> list[str]:
            return [name]

    nets.FLEXUNET_BACKBONE.register_class(Encoder)
