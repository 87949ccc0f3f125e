"""Dense prediction: every pixel of images and volumes classified, with pixel sizes, masks and pyramids.

```python
import torch
from rat_timm.dense import Segmenter

model = Segmenter("test_rat", num_classes=3)
image = torch.randn(1, 3, 60, 80)
assert model(image, spacing=0.5).shape == (1, 3, 60, 80)  # on the image's own pixels
assert model(image, spacing=0.5, out=0.25).shape == (1, 3, 120, 160)  # on those of a quarter unit
loss = torch.nn.functional.cross_entropy(model(image, spacing=0.5), torch.zeros(1, 60, 80, dtype=torch.long))
```

Logits are sampled at physical coordinates, so that labels are never resampled: training compares logits with labels on
the grid that these came on, and predictions come out on the grid that a user asks for. A volume is the same:
``Segmenter("rat_tiny_3d", 2)``, with ``spacing=(1.0, 0.2, 0.2)`` in array-axis order (z, y, x).

What is not masked does not depend on what is, not by a bit; logits at masked pixels are zero. A list of images is a
pyramid: the first is classified, the others (an overview around it, say) are context.

`Segmenter.forward_features` returns what the classifier gets, for heads of one's own, and `at_grid` brings what they
make of it to pixels. `Segmenter.save` and `Segmenter.load` keep a model in a folder without pickles.

Instances are two channels of a segmenter, see `rat_timm.dense.instances`; `rat_timm.dense.detection` makes
torchvision's detectors around any model of images.
"""

from .detection import fcos, mask_rcnn
from .instances import instance_loss, instance_targets, instances
from .matching import THRESHOLDS, Matches, match_instances
from .segmenter import Segmenter, at_grid

__all__ = [
    "THRESHOLDS",
    "Matches",
    "Segmenter",
    "at_grid",
    "fcos",
    "instance_loss",
    "instance_targets",
    "instances",
    "mask_rcnn",
    "match_instances",
]
