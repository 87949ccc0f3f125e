"""Pretraining without labels: pixels of hidden blocks, and the maps of a teacher, both at physical coordinates.

**Masked-image modelling.** Blocks of a physical size are hidden, and predicted from what is left:

```python
import torch
from rat_timm.geometry.grid import Grid
from rat_timm.pretrain import MaskedImageModel, hide_blocks, masked_loss

model = MaskedImageModel("test_rat", in_chans=1)
image = torch.randn(2, 1, 64, 96)
hidden = hide_blocks(Grid.create((64, 96), 0.5), block=8.0, share=0.75, count=2)  # [2, 64, 96], True = hidden
predicted = model(image, hidden, spacing=0.5)
loss = masked_loss(predicted, image, hidden, block=8.0, spacing=0.5).mean()
```

A hierarchical backbone takes what is hidden as masked, and its masks are exact: what stands in hidden pixels influences
nothing. A plain one (``rat_vit_*``) drops hidden tokens, so that a step takes less time. A decoder of a few blocks with
rotary spatial embeddings (RoSE) has a learned token at every hidden place, and predicts pixels that are normalised in
each block. Lists of images are pyramids, of which each level has hidden blocks of its own, or is hidden as a whole
(`hide_pyramid`). Volumes are the same.

**Distillation.** A student learns what a teacher's map has at the student's places:

```python
from rat_timm.pretrain import Distiller, Teacher, lessons

teacher = Teacher.create("test_rat", pretrained=False, in_chans=1)  # any timm model with maps
student = Distiller("test_rat_3d", teacher.num_features, in_chans=1)
volume, spacing = torch.randn(1, 1, 16, 32, 32), (2.0, 0.5, 0.5)
taught = lessons(teacher, volume, spacing=spacing, planes=(0, 1, 2), slices=2)  # slices of three planes
said = student(volume, spacing=spacing)
loss = torch.stack([lesson.loss(said) for lesson in taught]).mean()
```

`examples/pretrain.py` trains with both on folders of images; the backbone that it saves starts other trainings.
"""

from .blocks import BlockNorm, hide_blocks, hide_pyramid, normalize_blocks
from .distillation import Distiller, Lesson, Teacher, lessons
from .masked import MaskedImageModel, masked_loss

__all__ = [
    "BlockNorm",
    "Distiller",
    "Lesson",
    "MaskedImageModel",
    "Teacher",
    "hide_blocks",
    "hide_pyramid",
    "lessons",
    "masked_loss",
    "normalize_blocks",
]
