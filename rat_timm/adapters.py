"""Other libraries' networks around a backbone of this package.

Every library that takes timm backbones takes these, but hands on the image alone. `WithGeometry` tells the backbone of
any of its networks the rest, takes images of any size, and gives maps of their own pixels, whatever size a physical
stem has brought them to:

    unet = WithGeometry(smp.Unet("tu-rat_tiny", encoder_weights=None, classes=2))
    masks = unet(image, spacing=0.5)

Networks that classify, or whose backbone is made with ``physical_stem=False``, need no more than

    with rat_timm.geometry(spacing=0.5):
        logits = network(image)

segmentation_models_pytorch finds the models under "tu-" and their name; MONAI's ``FlexibleUNet`` after
`register_monai_encoder`. torchvision's detectors, which resize and pad images, take `BackboneWithFpn` and are told by
`DetectorWithGeometry`:

    backbone = BackboneWithFpn(timm.create_model("rat_tiny", features_only=True))
    detector = DetectorWithGeometry(FasterRCNN(backbone, num_classes=2))
    boxes = detector.eval()([torch.rand(3, 300, 411)], spacing=0.5)

lightly's methods without masks (DINO, BYOL) take any model with ``num_classes=0``; its ``MaskedVisionTransformerTIMM``
takes timm's ``VisionTransformer`` alone, and so neither timm's rotary ViTs nor these models.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes, resize_keypoints
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

from .geometry.grid import Pyramid, Tokens, fill
from .geometry.parts import Part, join_parts, select_rows
from .geometry.read import Told, geometry, read_images, what_is_told
from .geometry.resample import check_size
from .geometry.sample import sample_at
from .geometry.types import OriginLike, SpacingLike
from .layers.sharded import run_parts, tie
from .models.rat import ResolutionAwareTransformer
from .models.rat.stage import Stem
from .ops.masking import check_mask
from .optional import import_optional


class WithGeometry(nn.Module):
    """Lets a network around a backbone of this package take spacing, mask and origin, and images of any size.

        unet = WithGeometry(smp.Unet("tu-rat_tiny", encoder_weights=None, classes=2))
        logits = unet(image, spacing=0.5, mask=mask)  # [B, 2, *size]

    Where the backbone's stem is physical, images are brought to its reference spacing in front of the network, and what
    it makes of them is sampled at the pixels of the images as they came, in physical coordinates
    (`rat_timm.geometry.sample_at`): the maps of such a backbone would not be those of the sizes that decoders expect.

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
        told = what_is_told(x, spacing, mask, origin)
        backbone = next((m for m in self.network.modules() if isinstance(m, ResolutionAwareTransformer)), None)
        if backbone is None or not backbone.cfg.physical_stem or told.spacing is None:
            return self._run(x, told)
        check_mask(told.mask, (len(x), *x.shape[2:]))
        images = read_images(x, told, backbone.reference_spacing, x.shape[1], (1,) * (x.ndim - 2))
        parts = backbone.parts_at_reference(images, told)

        def sampled(part: Part) -> Pyramid:
            return self._sampled(part.images, select_rows(images, part.rows))

        maps = run_parts(self, sampled, parts, _tied)
        return join_parts(maps, [part.rows or [] for part in parts]).levels[0].x.movedim(-1, 1)

    def _sampled(self, at_reference: Pyramid, images: Pyramid) -> Pyramid:
        """Runs the network on resampled images; returns its maps at the pixels of ``images``, zero where masked."""
        tokens, own = at_reference.levels[0], images.levels[0]
        told = Told(tokens.grid.spacing, tokens.mask, tokens.grid.origin)
        out = self._run(tokens.x.movedim(-1, 1), told).movedim(1, -1)
        # a resampled image may end up to half a pixel before the image does
        sampled = sample_at(Tokens(out, tokens.grid, tokens.mask), own.grid, reach=1.0)
        return Pyramid([sampled._replace(x=fill(sampled.x, own.mask))])

    def _run(self, x: Tensor, told: Told) -> Tensor:
        filled, told = fill_up(self.network, x, told, self.multiple)
        with geometry(**told._asdict()):
            out = self.network(filled)
        if out.shape[2:] != filled.shape[2:]:
            raise ValueError(
                f"network must give maps of the size it is given, {list(filled.shape[2:])}, got {list(out.shape)}"
            )
        return out[(..., *(slice(n) for n in x.shape[2:]))]


def _tied(maps: Pyramid, other: Pyramid) -> Pyramid:
    (tokens,) = maps.levels
    return maps._replace(levels=[tokens._replace(x=tie(tokens.x, other.levels[0].x))])


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


_FACTORS = (0.25, 0.5, 1, 2)  # strides of the maps of a plain ViT, in its own


class BackboneWithFpn(nn.Module):
    """The maps of a RAT and a pyramid network on them, which torchvision's detectors take as their backbone.

        backbone = BackboneWithFpn(timm.create_model("rat_tiny", features_only=True))
        detector = DetectorWithGeometry(FasterRCNN(backbone, num_classes=2, image_mean=mean, image_std=std))

    It stands in for torchvision's own ``BackboneWithFPN``, which runs a model's children one after the other. Detectors
    find places of boxes on a map by its stride: where a physical stem has brought the image to another spacing, maps
    are interpolated back to the strides of ``feature_info``.

    A plain ViT's maps have one stride: the last one is brought to a quarter and half of it by interpolation, and to
    twice of it by averaging, which stand in for the levels of a hierarchical model (after arXiv 2203.16527).

    Args:
        body: From ``timm.create_model(features_only=True)``, whose strides are powers of two.
        out_channels: Channels of all its maps.
        extra_blocks: What adds maps. Default: torchvision's ``LastLevelMaxPool``, which adds "pool".
        norm_layer: See torchvision's ``FeaturePyramidNetwork``.
    """

    def __init__(
        self,
        body: nn.Module,
        out_channels: int = 256,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        info: Any = body.feature_info
        self.body = body
        self.strides, channels = info.reduction(), info.channels()
        wrong = [stride for stride in self.strides if stride & (stride - 1)]
        if wrong:
            raise ValueError(f"body must have strides that are powers of two, got {self.strides}")
        self.is_plain = len(set(self.strides)) == 1
        if self.is_plain:
            self.strides = [max(1, round(self.strides[-1] * factor)) for factor in _FACTORS]
            channels = channels[-1:] * len(_FACTORS)
        self.out_channels = out_channels
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks or LastLevelMaxPool(), norm_layer)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns maps ``[B, out_channels, *grid]``, the finest first, named "0", "1" and so on, then extra ones.

        Args:
            x: Images ``[B, C, H, W]``. Their geometry is told by `rat_timm.geometry`.
        """
        told = what_is_told(x)
        parts = [self._maps(x[rows], _select(told, rows)) for rows in _rows_of_one_spacing(told, len(x))]
        maps = OrderedDict((str(i), torch.cat(m)) for i, m in enumerate(zip(*parts, strict=True)))
        return self.fpn(maps)

    def _maps(self, x: Tensor, told: Told) -> list[Tensor]:
        maps = self.body(x, **told._asdict())
        maps = maps[-1:] * len(_FACTORS) if self.is_plain else maps
        sizes = [[-(-n // stride) for n in x.shape[2:]] for stride in self.strides]
        return [
            m if list(m.shape[2:]) == size else F.interpolate(m, size, mode="bilinear", antialias=self.is_plain)
            for m, size in zip(maps, sizes, strict=True)
        ]


def _rows_of_one_spacing(told: Told, batch: int) -> list[slice]:
    """Returns the batch, or its samples one by one if their spacings differ: maps of a batch have one size."""
    spacing = torch.as_tensor(1.0 if told.spacing is None else told.spacing)
    if spacing.ndim < 2 or bool((spacing == spacing[:1]).all()):
        return [slice(None)]
    return [slice(i, i + 1) for i in range(batch)]


def _select(told: Told, rows: slice) -> Told:
    """Returns what is told of some samples: values have a row for each, or go for all of them."""

    def select(value: Any) -> Any:
        value = None if value is None else torch.as_tensor(value)
        return value if value is None or value.ndim < 2 or len(value) == 1 else value[rows]

    return Told(*(select(value) for value in told))


class ToReference(GeneralizedRCNNTransform):
    """torchvision's transform of a detector, which brings images to the sizes that it is told rather than to its own.

    Args:
        transform: Whose settings it has.
    """

    def __init__(self, transform: GeneralizedRCNNTransform) -> None:
        super().__init__(
            transform.min_size,
            transform.max_size,
            transform.image_mean,
            transform.image_std,
            transform.size_divisible,
            transform.fixed_size,
        )
        self.sizes: list[tuple[int, int]] = []
        """Of the images to come, in their order; none: torchvision's resizing."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resizes an image ``[C, H, W]`` and its target."""
        if not self.sizes:
            return super().resize(image, target)
        before, size = image.shape[-2:], self.sizes.pop(0)
        if size != tuple(before):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        if target is None or size == tuple(before):
            return image, target
        target = {**target, "boxes": resize_boxes(target["boxes"], before, size)}
        if "masks" in target:
            target["masks"] = F.interpolate(target["masks"][:, None].float(), size, mode="nearest-exact")[:, 0].byte()
        if "keypoints" in target:
            target["keypoints"] = resize_keypoints(target["keypoints"], before, size)
        return image, target


class DetectorWithGeometry(nn.Module):
    """A detector of torchvision's around a `BackboneWithFpn`, told of pixel sizes.

    Detectors resize images and put them side by side, filled up. Here their backbone is told the spacing of what it is
    given, after the resizing, and which of it is fill.

    Heads of detectors measure in places of maps, so that what they learned holds at one pixel size. Images whose pixel
    size is told are therefore brought to the backbone's reference spacing, where its stem is physical, in place of
    torchvision's resizing; boxes and masks come out in the images' own pixels.

    Args:
        detector: Such as torchvision's ``FasterRCNN``.
        to_reference: Whether images are brought to the reference spacing; those of which nothing is told, have it.
            False: torchvision resizes all. Default: those that are told where the stem is physical.
    """

    def __init__(self, detector: nn.Module, to_reference: bool | None = None) -> None:
        super().__init__()
        self.detector = detector
        stems = [m for m in detector.modules() if isinstance(m, ResolutionAwareTransformer) and m.cfg.physical_stem]
        self.to_reference = bool(stems) if to_reference is None else to_reference
        self.assume_reference = to_reference is True
        if self.to_reference:
            models: list[Any] = [m for m in detector.modules() if hasattr(m, "reference_spacing")]
            self.reference: tuple[float, ...] = models[0].reference_spacing
            detector.transform = ToReference(detector.transform)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        spacing: SpacingLike = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Detects.

        Args:
            images: Each ``[C, H, W]``.
            targets: Boxes and so on of each image, in its own pixels; see torchvision.
            spacing: Physical pixel size of the images as they are, in array-axis order (y, x): a number, one per axis,
                or ``[B, axes]``. None: nothing is said but which places are fill.

        Returns:
            What the detector gives: losses in training, else boxes, in the images' own pixels.

        Raises:
            ValueError: If the spacing does not fit, or an image would become too large.
        """
        before = torch.tensor([image.shape[-2:] for image in images])
        if spacing is None and self.assume_reference:
            spacing = self.reference
        rows = None if spacing is None else _rows(spacing, len(images))
        sizes = self._sizes(images, rows)

        def tell(module: nn.Module, args: tuple, output: tuple) -> None:
            batch = output[0]
            after = torch.tensor(batch.image_sizes)
            mask = torch.stack([_valid(size, batch.tensors.shape[-2:]) for size in batch.image_sizes])
            spacing = None if rows is None else rows * before / after
            stack.enter_context(
                geometry(
                    # whole numbers of pixels: off the reference by less than half a pixel in all
                    spacing=self.reference if sizes else spacing,
                    mask=None if mask.all() else mask.to(batch.tensors.device),
                )
            )

        transform: Any = self.detector.transform
        with ExitStack() as stack:
            stack.callback(transform.register_forward_hook(tell).remove)
            if sizes:
                transform.sizes = list(sizes)
                stack.callback(transform.sizes.clear)
            return self.detector(list(images), None if targets is None else list(targets))

    def _sizes(self, images: Sequence[Tensor], rows: Tensor | None) -> list[tuple[int, int]]:
        """Returns the sizes of images at the reference spacing; none if they are not brought to it."""
        if rows is None or not self.to_reference:
            return []
        sizes = []
        for image, row in zip(images, rows.tolist(), strict=True):
            pairs = zip(image.shape[-2:], row, self.reference, strict=True)
            height, width = (max(1, round(n * step / reference)) for n, step, reference in pairs)
            check_size(image.shape[-2:], (height, width))
            sizes.append((height, width))
        return sizes


def _rows(spacing: Any, batch: int) -> Tensor:
    rows = torch.as_tensor(spacing, dtype=torch.float32).cpu()
    if rows.shape not in ((), (2,), (1, 2), (batch, 2)):
        raise ValueError(f"spacing must be a number, 2 or [{batch}, 2], got {list(rows.shape)}")
    return rows.expand(batch, 2)


def _valid(size: Sequence[int], whole: Sequence[int]) -> Tensor:
    mask = torch.zeros(*whole, dtype=torch.bool)
    mask[tuple(slice(n) for n in size)] = True
    return mask


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
