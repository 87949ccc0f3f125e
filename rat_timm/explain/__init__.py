"""What a model looks at, each in one call, with a picture (extra ``explain``).

```python
import timm
import torch

import rat_timm
from rat_timm import explain

model, image = timm.create_model("test_rat").eval(), torch.rand(1, 3, 96, 128)
groups = explain.group_tokens(model, image, spacing=1.0)  # which pixel's token went to which group
assert groups.labels.shape == (1, 96, 128)
levels = explain.attend_levels(model, [image, image], spacing=[(4.0, 4.0), (1.0, 1.0)])  # how much attention each gets
assert levels.shares[0].shape == (1, 96, 128, 2)
```

`plot_groups`, `plot_levels`, `plot_class` and `plot_sensitivity` draw what `group_tokens`, `attend_levels`, `map_class`
(class activation maps of pytorch-grad-cam) and `spacing_sensitivity` return; `examples/explain.py` does all four. What
a call returns is sampled at the images' own pixels, at physical coordinates; of volumes, pictures show a slice.
"""

from ..evaluation import plot_sensitivity, spacing_sensitivity
from .classes import map_class
from .groups import Groups, group_tokens
from .levels import LevelAttention, attend_levels
from .plots import plot_class, plot_groups, plot_levels

__all__ = [
    "Groups",
    "LevelAttention",
    "attend_levels",
    "group_tokens",
    "map_class",
    "plot_class",
    "plot_groups",
    "plot_levels",
    "plot_sensitivity",
    "spacing_sensitivity",
]
