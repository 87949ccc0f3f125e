"""Classes for transformers: a classifier whose ``Trainer`` keeps the geometry, a backbone whose config keeps keywords.

transformers' own ``AutoModelForImageClassification`` opens models of this package too, and hands ``spacing``, ``mask``
and ``origin`` on when it is called with them. Its ``Trainer``, however, drops columns of a data set that the model's
``forward`` does not name (unless ``remove_unused_columns=False``), and its timm backbone forgets keywords when it is
saved.
"""

from typing import Any

from torch import Tensor

from .optional import import_optional

_timm_wrapper = import_optional("transformers.models.timm_wrapper.modeling_timm_wrapper", "transformers")
_timm_backbone = import_optional("transformers.models.timm_backbone", "transformers")
_auto: Any = import_optional("transformers", "transformers")
_Classifier: Any = _timm_wrapper.TimmWrapperForImageClassification
_Backbone: Any = _timm_backbone.TimmBackbone
_BackboneConfig: Any = _timm_backbone.TimmBackboneConfig


class RatForImageClassification(_Classifier):
    """transformers' wrapper of a timm model, with arguments for the geometry of images."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        spacing: Any = None,
        mask: Any = None,
        origin: Any = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
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


class RatBackboneConfig(_BackboneConfig):
    """transformers' config of a timm backbone, and the model's keywords in ``model_args``."""

    model_type = "rat_timm_backbone"
    model_args: dict[str, Any] | None = None


class RatBackbone(_Backbone):
    """transformers' timm backbone, which is made with ``config.model_args``; its call takes the geometry of images.

    What it saves is opened by ``RatBackbone.from_pretrained``: transformers' ``AutoBackbone`` looks on the Hub alone.
    """

    config_class = RatBackboneConfig

    def __init__(self, config: RatBackboneConfig, **kwargs: Any) -> None:
        super().__init__(config, **{**(config.model_args or {}), **kwargs})

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Opens a folder or repository that ``save_pretrained`` wrote; transformers' own takes names of timm here."""
        return super(_Backbone, cls).from_pretrained(*args, **kwargs)


_auto.AutoConfig.register(RatBackboneConfig.model_type, RatBackboneConfig, exist_ok=True)
_auto.AutoBackbone.register(RatBackboneConfig, RatBackbone, exist_ok=True)
