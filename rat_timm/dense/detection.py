"""Detection in images: torchvision's FCOS and Mask R-CNN on any model of this package.

```python
import torch
from rat_timm.dense import fcos

detector = fcos("test_rat", num_classes=2, out_channels=32)
images = [torch.randn(3, 60, 80), torch.randn(3, 120, 160)]
target = {"boxes": torch.tensor([[8.0, 8.0, 24.0, 24.0]]), "labels": torch.tensor([1])}
larger = {"boxes": 2 * target["boxes"], "labels": target["labels"]}
losses = detector(images, [target, larger], spacing=[[1.0, 1.0], [0.5, 0.5]])
sum(losses.values()).backward()
found = detector.eval()(images, spacing=[[1.0, 1.0], [0.5, 0.5]])  # boxes in the pixels of each image
```

Images are brought to the model's reference spacing, so that an object of a physical size has the same size for the
detector in all of them; what is said in pixels below is said of those. torchvision resizes nothing, and expects targets
as ever: boxes in pixels of the images as they came, as x, y, x, y.
"""

from collections.abc import Mapping
from typing import Any

import timm
from torchvision.models.detection import FCOS, MaskRCNN
from torchvision.models.detection.rpn import AnchorGenerator

from ..adapters import BackboneWithFpn, DetectorWithGeometry


def fcos(
    backbone: str,
    num_classes: int,
    out_channels: int = 256,
    backbone_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> DetectorWithGeometry:
    """Makes an FCOS (arXiv 1904.01355), whose levels have the strides of the model's maps.

    Args:
        backbone: A registered name.
        num_classes: Classes and the background, which is 0.
        out_channels: Channels of all maps, a multiple of 32.
        backbone_args: Further keywords of timm's ``create_model``, such as ``spacing``, the reference's.
        **options: Further keywords of torchvision's ``FCOS``, such as ``detections_per_img`` (100). Images are as
            timm's models take them: ``image_mean`` and ``image_std`` are 0 and 1.

    Raises:
        ValueError: If the model is not one of images, or its strides are no powers of two.
    """
    if out_channels % 32:
        raise ValueError(f"out_channels must be a multiple of 32, the groups of FCOS's norms, got {out_channels}")
    body = _backbone(backbone, out_channels, backbone_args)
    strides = [*body.strides, 2 * body.strides[-1]]  # of the map that is pooled, too
    anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
    return _told(FCOS(body, num_classes, **{**_as_they_are(body), "anchor_generator": anchors, **options}))


def mask_rcnn(
    backbone: str,
    num_classes: int,
    out_channels: int = 256,
    anchor_sizes: tuple[float, ...] | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> DetectorWithGeometry:
    """Makes a Mask R-CNN (arXiv 1703.06870).

    Args:
        backbone: A registered name.
        num_classes: Classes and the background, which is 0.
        out_channels: Channels of all maps.
        anchor_sizes: Sides of anchors in pixels at the reference spacing, one for each map and the one that is pooled;
            they have three shapes. Default: eight times the strides, as in torchvision.
        backbone_args: Further keywords of timm's ``create_model``, such as ``spacing``, the reference's.
        **options: Further keywords of torchvision's ``MaskRCNN``, such as ``box_detections_per_img`` (100). Images are
            as timm's models take them: ``image_mean`` and ``image_std`` are 0 and 1.

    Raises:
        ValueError: If the model is not one of images, or its strides are no powers of two.
    """
    body = _backbone(backbone, out_channels, backbone_args)
    sizes = anchor_sizes or [8 * stride for stride in (*body.strides, 2 * body.strides[-1])]
    if len(sizes) != len(body.strides) + 1:
        raise ValueError(f"anchor_sizes must be {len(body.strides) + 1} numbers, got {anchor_sizes}")
    anchors = AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    return _told(MaskRCNN(body, num_classes, **{**_as_they_are(body), "rpn_anchor_generator": anchors, **options}))


def _backbone(name: str, out_channels: int, backbone_args: Mapping[str, Any] | None) -> BackboneWithFpn:
    body: Any = timm.create_model(name, features_only=True, **(backbone_args or {}))
    axes = len(body.model.reference_spacing)
    if axes != 2:
        raise ValueError(f"backbone must be a model of images: torchvision detects in 2D, got {name} of {axes} axes")
    return BackboneWithFpn(body, out_channels)


def _as_they_are(backbone: BackboneWithFpn) -> dict[str, list[float]]:
    model: Any = backbone.body.model
    return {"image_mean": [0.0] * model.in_chans, "image_std": [1.0] * model.in_chans}


def _told(detector: Any) -> DetectorWithGeometry:
    return DetectorWithGeometry(detector, to_reference=True)
