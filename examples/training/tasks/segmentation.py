"""Classes of pixels."""

import math
import warnings
from collections.abc import Sequence

import torch
from monai.losses import DiceLoss
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from torch import Tensor
from torch.nn import functional as F

from rat_timm.data import Sample
from rat_timm.data.samples import IGNORED
from training.crops import Scenes
from training.frames import are_objects
from training.tasks.base import Call, Measured
from training.tasks.labelled import Labelled, mean_of, outlines

FIGURES = ("dice", "surface_dice", "hausdorff95")


class Segmentation(Labelled):
    """See `training.tasks.base.Task`.

    The loss is MONAI's Dice loss and the cross entropy over the annotated pixels of each crop. The Dice, the share of
    surfaces within a tolerance of each other, and the 95th percentile of the distances between surfaces are physical
    and means over the classes, without the background.
    """

    score = "dice"

    @property
    def out_channels(self) -> int:
        """See `Labelled`."""
        return 2 if are_objects(str(self.config.data)) else self.facts.classes

    def target(self, crop: Sample) -> Tensor:
        """See `Labelled`."""
        return self.objects(crop.target)

    def loss(self, outputs: Tensor, batch: Scenes) -> Tensor:
        """See `Task`."""
        return torch.stack([_loss(*each) for each in zip(outputs, batch.target, strict=True)]).mean()

    def predict(self, call: Call, batch: Scenes) -> list[Tensor]:
        """See `Task`: classes ``[*grid]``."""
        return [logits.argmax(0) for logits in super().predict(call, batch)]

    def measure(self, prediction: Tensor, batch: Scenes, index: int) -> Measured:
        """See `Task`."""
        true = self.objects(batch.target[index])
        classes = self.out_channels
        predicted = prediction.where(true != IGNORED, 0)
        both = [_one_hot(labels, classes) for labels in (predicted, true.clamp(min=0))]
        spacing = batch.spacing[index].tolist()
        dice = compute_dice(*both, include_background=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*always_return_as_numpy", FutureWarning)  # of MONAI to itself
            surface = compute_surface_dice(*both, [self.facts.tolerance] * (classes - 1), spacing=spacing)
            distance = compute_hausdorff_distance(*both, percentile=95, spacing=spacing)
        values = dict(zip(FIGURES, (_mean(each) for each in (dice, surface, distance)), strict=True))
        return Measured(values, None)

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        return {name: mean_of(measured, name) for name in FIGURES}

    def picture(self, prediction: Tensor, batch: Scenes, index: int) -> Tensor:
        """See `Task`."""
        return outlines(batch.levels[0], index, prediction, self.objects(batch.target[index]))


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the loss of a sample: means over samples are those of any number of processes."""
    valid = target != IGNORED
    if not bool(valid.any()):
        return (logits * 0).sum()
    logits, classes = logits[None, :, valid], target[None, None, valid]  # [1, classes or 1, valid pixels]
    dice = DiceLoss(to_onehot_y=True, softmax=True, include_background=False)
    return dice(logits, classes) + F.cross_entropy(logits, classes[0])


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels.long(), classes).movedim(-1, 0)[None].cpu()


def _mean(values: Tensor) -> float:
    """Returns the mean over classes that an image has; NaN if it has none."""
    finite = values[torch.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
