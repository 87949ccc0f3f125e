"""How well predicted objects agree with true ones: average precision and panoptic quality.

```python
import torch

from rat_timm.dense.matching import match_instances

true = torch.tensor([[1, 1, 0, 2, 2, 2]])
predicted = torch.tensor([[7, 0, 0, 3, 3, 3]])
matches = match_instances(predicted, true, thresholds=(0.4, 0.5, 0.75))
assert matches.true_positives.tolist() == [2, 2, 1]  # an IoU of exactly 0.5 is enough
assert matches.average_precision.tolist() == [1.0, 1.0, 1 / 3]
```

Counts of several images are added, ``matches + others``, for the figures of all their objects; figures of single images
can be averaged instead, as cellpose does.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.masking import check_mask
from ..optional import import_optional

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""The IoU of COCO: 0.5, 0.55 and so on to 0.95."""


class Matches(NamedTuple):
    """Counts of pairs of objects, for each threshold ``[T]``.

    Attributes:
        thresholds: Least IoU of a pair.
        true_positives: Pairs.
        false_positives: Predicted objects without one.
        false_negatives: True objects without one.
        iou: Sum of the pairs' IoU.
    """

    thresholds: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor
    iou: Tensor

    def __add__(self, other: object) -> "Matches":
        """Returns the counts of both."""
        if not isinstance(other, Matches) or not torch.equal(self.thresholds, other.thresholds):
            raise ValueError("matches must be of the same thresholds to be added")
        return Matches(self.thresholds, *(a + b for a, b in zip(self[1:], other[1:], strict=True)))

    @property
    def average_precision(self) -> Tensor:
        """TP / (TP + FP + FN), as cellpose and StarDist define it; 1 where there is no object at all."""
        objects = self.true_positives + self.false_positives + self.false_negatives
        return _ratio(self.true_positives, objects)

    @property
    def panoptic_quality(self) -> Tensor:
        """The sum of IoU / (TP + FP / 2 + FN / 2) (arXiv 1801.00868); 1 where there is no object at all."""
        return _ratio(self.iou, self.true_positives + (self.false_positives + self.false_negatives) / 2)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=0.5), 1.0)


def match_instances(
    predicted: Tensor, true: Tensor, thresholds: Sequence[float] = THRESHOLDS, mask: Tensor | None = None
) -> Matches:
    """Pairs predicted objects with true ones: as many as have an IoU of the threshold, and the best of such pairings.

    Args:
        predicted: Labels of any shape, whole numbers, 0 = background. Of one image: numbers stand for objects.
        true: Labels of the same shape. Negative: not annotated; predictions there are not looked at.
        thresholds: Least IoU of a pair, above 0.
        mask: Bool, of the same shape, True = valid; labels elsewhere are not looked at.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If scikit-image is not installed; with the extra that installs it.
    """
    for labels, name in ((predicted, "predicted"), (true, "true")):
        if labels.is_floating_point() or labels.shape != true.shape:
            raise ValueError(
                f"{name} must be whole numbers {list(true.shape)}, got {labels.dtype} {list(labels.shape)}"
            )
    if predicted.numel() and int(predicted.min()) < 0:
        raise ValueError(f"predicted must not be negative, got {int(predicted.min())}")
    if not thresholds or not all(0 < t <= 1 for t in thresholds):
        raise ValueError(f"thresholds must be above 0 and at most 1, got {list(thresholds)}")
    check_mask(mask, true.shape)
    chosen = true >= 0 if mask is None else (true >= 0) & mask
    arrays = [x[chosen].cpu().numpy() for x in (true, predicted)]
    iou = _iou(*arrays)
    rows = [_pairs(iou, threshold) for threshold in thresholds]
    count, total = (torch.tensor(column) for column in zip(*rows, strict=True))
    limits = torch.tensor(thresholds, dtype=torch.float64)
    return Matches(limits, count, iou.shape[1] - count, iou.shape[0] - count, total.double())


def _iou(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns the IoU of each true object with each predicted one, ``[true, predicted]``."""
    true, predicted = (np.unique(np.append(x, 0), return_inverse=True)[1] for x in (true, predicted))
    metrics = import_optional("skimage.metrics", "dense")
    overlap = metrics.contingency_table(true, predicted).toarray()  # one pixel more of 0 and 0
    whole = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    return (overlap / whole)[1:, 1:]


def _pairs(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    """Returns the number of pairs and the sum of their IoU."""
    assign = import_optional("scipy.optimize", "dense").linear_sum_assignment
    # one pair more is worth more than any IoU
    worth = np.where(iou >= threshold, 1.0 + iou / (2 * max(*iou.shape, 1)), 0.0)
    rows, columns = assign(worth, maximize=True)
    paired = iou[rows, columns][iou[rows, columns] >= threshold]
    return len(paired), float(paired.sum())
