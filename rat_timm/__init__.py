"""Vision backbones for timm that take the pixel size as an input; importing this package registers them.

`python -m rat_timm list` prints the models, and `timm.create_model` makes them. Their ``forward``, ``forward_features``
and ``forward_intermediates``, and backbones made with ``features_only=True``, take

- **x**: images ``[B, C, *size]`` of any size, or a list of them, a pyramid: level 0 first, the others at any resolution
  and anywhere in the scene. A list of images gives a list of maps.
- **spacing**: the physical size of a pixel in array-axis order (z, y, x): a number, one value per axis, or
  ``[B, axes]`` with one row per sample; of a pyramid, one of these per level. The unit is that of the *reference
  spacing*, the ``spacing`` of ``create_model``, which an image has whose spacing is not given, and at which
  neighbouring tokens are one rotary unit apart.
- **mask**: ``[B, *size]``, bool, True = valid. What stands in masked pixels, NaN included, does not change what comes
  out at valid places, nor pooled features and logits.
- **origin**: the physical position of the first pixel's centre. Default: half the spacing, so that levels of a pyramid
  share their outer corner.

Networks that take the image alone (segmentation_models_pytorch, detectors, timm's ``feature_cls="getter"``) are told by
the context manager `geometry`. The subpackage of the same name is imported by ``from rat_timm.geometry import Grid``.

The hierarchical models (but ``rat_classic``) resample images whose spacing is given to the reference spacing in front
of the stem, without aliasing and with masks. Then

- samples of different spacings are computed apart, so that a batch gives what its items give;
- sizes of maps follow from the physical extent. ``forward_intermediates(output_dict=True)`` returns their ``grids`` and
  ``masks``; where maps come without grids, samples must have one spacing;
- a spacing in a wrong unit, at which an image would become millions of pixels, is an error (`set_resample_limit`).

With ``physical_stem=False`` kernels of the stem see pixels whatever the spacing: a network that is trained at one pixel
size has to learn what another looks like. Programs that take the spacing as an input (``torch.export``, ONNX) need it.
"""

from .geometry.grid import Grid
from .geometry.plans import set_plan_limit
from .geometry.read import geometry
from .geometry.resample import resample_limit, set_resample_limit
from .models import AdaptiveVit, RatConfig, RatVit, ResolutionAwareTransformer
from .ops.neighborhood import attention_backend, set_attention_backend
from .timm_api import hub

__version__ = "0.1.0"

__all__ = [
    "AdaptiveVit",
    "Grid",
    "RatConfig",
    "RatVit",
    "ResolutionAwareTransformer",
    "__version__",
    "attention_backend",
    "geometry",
    "hub",
    "resample_limit",
    "set_attention_backend",
    "set_plan_limit",
    "set_resample_limit",
]
