"""Classes for transformers: a classifier, a processor and a pipeline that know the geometry of images, a backbone.

What is saved with `rat_timm.hub` is opened by transformers' own classes too:
``AutoModelForImageClassification``, which hands ``spacing``, ``mask`` and ``origin`` on when it is called with them,
and ``TimmBackbone.from_pretrained("local-dir:FOLDER")``. Three things they do not do:

- ``Trainer`` drops the columns of a data set that the model's ``forward`` does not name, before a callback could
  see them. `RatForImageClassification` names them. With transformers' own classes,
  `rat_timm.huggingface_training.RatTrainer` keeps them, as does ``TrainingArguments(remove_unused_columns=False)``.
- Their image processor knows images alone, and resizes them. `RatImageProcessor` takes volumes, and keeps pixels. Their
  pipeline hands no spacing on; `RatPipeline` does.
- Their config of a backbone has no room for the model's keywords, and ``AutoBackbone.from_pretrained`` takes no
  folders. `RatBackboneConfig` keeps them, and ``RatBackbone.from_pretrained`` opens folders.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from .data.samples import Sample, collate
from .geometry.types import MaskLike, OriginLike, SpacingLike
from .optional import import_optional
from .timm_api.families import upgrade

if TYPE_CHECKING:
    from transformers import BatchFeature
    from transformers.modeling_outputs import ImageClassifierOutput

_timm_wrapper = import_optional("transformers.models.timm_wrapper", "transformers")
_timm_backbone = import_optional("transformers.models.timm_backbone", "transformers")
_transformers: Any = import_optional("transformers", "transformers")
_Classifier: Any = _timm_wrapper.TimmWrapperForImageClassification
_Processor: Any = _timm_wrapper.TimmWrapperImageProcessor
_Pipeline: Any = _transformers.ImageClassificationPipeline
_Backbone: Any = _timm_backbone.TimmBackbone
_BackboneConfig: Any = _timm_backbone.TimmBackboneConfig

CONFIG = "config.json"
Picture: TypeAlias = Tensor | np.ndarray | Image.Image


class RatForImageClassification(_Classifier):
    """transformers' wrapper of a timm model, with arguments for the geometry of images."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> "ImageClassifierOutput | tuple[Tensor, ...]":
        """Classifies.

        Args:
            pixel_values: ``[B, C, *size]``.
            labels: ``[B]``; with them a loss is returned.
            spacing: Physical pixel size in array-axis order (z, y, x), in any form that the models take.
            mask: ``[B, *size]``, True = valid.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``.
            output_hidden_states: See transformers.
            return_dict: See transformers.
            **kwargs: Of the model's ``forward``.
        """
        return super().forward(
            pixel_values,
            labels=labels,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            spacing=spacing,
            mask=mask,
            origin=origin,
            **kwargs,
        )


class RatImageProcessor(_Processor):
    """Normalises images or volumes, puts them side by side and says what is known of their geometry.

        processor = RatImageProcessor.from_pretrained(folder)
        logits = model(**processor(volume, spacing=(2.0, 0.5, 0.5))).logits

    No pixel is resized: images of different sizes and spacings go together. Smaller images are filled up at the far
    ends, and a mask says so. Where all images have one spacing, say it once, and transformers' own pipelines take it:
    ``RatImageProcessor(processor.pretrained_cfg, spacing=0.5)``. (They cast it to the model's dtype.)

    Args:
        pretrained_cfg: Of a model: ``mean``, ``std`` and ``input_size``, whose length tells how many axes there are.
        spacing: Physical pixel size in array-axis order (z, y, x) of images whose spacing is not said.
        **kwargs: Other entries of a config.json, which are not used.

    Raises:
        ValueError: If ``pretrained_cfg`` is missing.
    """

    model_input_names = ("pixel_values", "spacing", "mask")

    def __init__(
        self, pretrained_cfg: Mapping[str, Any] | None = None, spacing: SpacingLike = None, **kwargs: Any
    ) -> None:
        if not pretrained_cfg:
            raise ValueError(
                "pretrained_cfg must have mean, std and input_size, got none: give "
                "timm.get_pretrained_cfg(name).to_dict(), or a folder of rat_timm.hub.save"
            )
        super(_Processor, self).__init__()
        self.pretrained_cfg = dict(pretrained_cfg)
        self.spacing = spacing

    def preprocess(
        self,
        images: Picture | Sequence[Picture],
        spacing: SpacingLike = None,
        return_tensors: str = "pt",
    ) -> "BatchFeature":
        """Makes a batch.

        Args:
            images: One ``[C, *size]``, or many: a list, or ``[B, C, *size]``. The axis of a single channel may be left
                out. uint8 is divided by 255, as timm does; other numbers are taken as they are.
            spacing: Physical pixel size in array-axis order (z, y, x): a number, one per axis, or ``[B, axes]``.
            return_tensors: "pt".

        Returns:
            transformers' ``BatchFeature`` with pixel_values ``[B, C, *size]``; spacing ``[B, axes]``, if it is known;
            mask ``[B, *size]``, True = valid, if images have different sizes.

        Raises:
            ValueError: If images have other axes or channels than the model, or the spacing does not fit.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        axes = len(self.pretrained_cfg["input_size"]) - 1
        many = not isinstance(images, Image.Image) and (isinstance(images, Sequence) or images.ndim == axes + 2)
        pictures = [self._normalize(image) for image in cast(Sequence[Picture], images if many else [images])]
        known = self.spacing if spacing is None else spacing
        rows = _rows(1.0 if known is None else known, len(pictures), axes)
        batch = collate([Sample(*pair) for pair in zip(pictures, rows, strict=True)])
        features = {"pixel_values": batch.image}
        if known is not None:
            features["spacing"] = batch.spacing
        if batch.mask is not None:
            features["mask"] = batch.mask
        return _transformers.BatchFeature(features)

    def _normalize(self, image: Picture) -> Tensor:
        channels, *size = self.pretrained_cfg["input_size"]
        x = pil_to_tensor(image) if isinstance(image, Image.Image) else torch.as_tensor(image)
        x = x[None] if x.ndim == len(size) else x
        if x.ndim != len(size) + 1 or len(x) != channels:
            raise ValueError(f"images must be [{channels}, *size] with {len(size)} axes, got {list(x.shape)}")
        mean, std = (
            x.new_tensor(self.pretrained_cfg[name], dtype=torch.float32).reshape(-1, *[1] * len(size))
            for name in ("mean", "std")
        )
        return ((x / 255 if x.dtype == torch.uint8 else x.float()) - mean) / std


def _rows(spacing: Any, batch: int, axes: int) -> Tensor:
    rows = torch.as_tensor(spacing, dtype=torch.float32)
    if rows.shape not in ((), (axes,), (1, axes), (batch, axes)):
        raise ValueError(f"spacing must be a number, {axes} or [{batch}, {axes}], got {list(rows.shape)}")
    return rows.expand(batch, axes)


class RatPipeline(_Pipeline):
    """transformers' pipeline of image classification, whose call takes the spacing.

    classify = pipeline("image-classification", model=model, image_processor=processor, pipeline_class=RatPipeline)
    classify(image, spacing=0.5)
    """

    def check_model_type(self, supported_models: "list[str] | Mapping[Any, Any]") -> None:
        """See transformers, which does not know `RatForImageClassification` by its name and would list all it knows."""
        if not isinstance(self.model, RatForImageClassification):
            super().check_model_type(supported_models)

    def _sanitize_parameters(self, spacing: SpacingLike = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        before, call, after = super()._sanitize_parameters(**kwargs)
        return (before if spacing is None else {**before, "spacing": spacing}), call, after

    def preprocess(
        self, image: str | Picture, timeout: float | None = None, spacing: SpacingLike = None
    ) -> "BatchFeature":
        """Makes a batch of an image.

        Args:
            image: As `RatImageProcessor` takes it, or the address of a picture.
            timeout: Seconds, for addresses.
            spacing: Physical pixel size in array-axis order (z, y, x).
        """
        if isinstance(image, str):
            image = import_optional("transformers.image_utils", "transformers").load_image(image, timeout=timeout)
        features = self.image_processor(images=image, spacing=spacing, return_tensors="pt")
        features["pixel_values"] = features["pixel_values"].to(self.dtype)
        return features


class RatBackboneConfig(_BackboneConfig):
    """transformers' config of a timm backbone, and the model's keywords in ``model_args``."""

    model_type = "rat_timm_backbone"
    model_args: dict[str, Any] | None = None


class RatBackbone(_Backbone):
    """transformers' timm backbone, which is made with ``config.model_args``; its call takes the geometry of images.

    ``AutoBackbone.from_pretrained`` looks on the Hub alone; ``RatBackbone.from_pretrained`` opens folders.
    """

    config_class = RatBackboneConfig

    def __init__(self, config: RatBackboneConfig, **kwargs: Any) -> None:
        super().__init__(config, **{**upgrade(str(config.backbone), config.model_args or {}), **kwargs})

    @classmethod
    def from_pretrained(cls, name: str | PathLike, *args: Any, **kwargs: Any) -> "RatBackbone":
        """Opens what ``save_pretrained`` or `rat_timm.hub.save` wrote; transformers' own takes names of timm here.

        Args:
            name: A folder, or of what ``save_pretrained`` wrote also a repository.
            *args: Of transformers' ``from_pretrained``.
            **kwargs: Likewise; of what `rat_timm.hub.save` wrote, keywords of `RatBackboneConfig` (``out_indices``).

        Raises:
            ValueError: If weights or config are damaged.
        """
        folder = Path(str(name).removeprefix("local-dir:"))
        described = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        if "architecture" not in described:
            return super(_Backbone, cls).from_pretrained(str(name), *args, **kwargs)
        own = {key: value for key, value in described.get("model_args", {}).items() if key != "num_classes"}
        stated = {
            "num_channels": own.pop("in_chans", described["pretrained_cfg"]["input_size"][0]),
            "output_stride": own.pop("output_stride", None),
            "model_args": own,
        }
        config = RatBackboneConfig(backbone=described["architecture"], **{**stated, **kwargs})
        weights = {"source": "local-dir", "file": str(folder)}
        return cls(config, pretrained=True, pretrained_cfg_overlay=weights).eval()


_transformers.AutoConfig.register(RatBackboneConfig.model_type, RatBackboneConfig, exist_ok=True)
_transformers.AutoBackbone.register(RatBackboneConfig, RatBackbone, exist_ok=True)
# AutoImageProcessor finds by name what is registered for any config: configs of volumes name it (see `hub.save`)
_transformers.AutoImageProcessor.register(
    RatBackboneConfig, image_processor_classes={"torchvision": RatImageProcessor}, exist_ok=True
)
