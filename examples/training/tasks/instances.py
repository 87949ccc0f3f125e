"""Objects that are told apart."""

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from rat_timm.data import Sample
from rat_timm.dense import THRESHOLDS, Matches, instance_loss, instance_targets, instances, match_instances
from training.crops import Scenes
from training.tasks.base import Call, Measured
from training.tasks.labelled import Labelled, outlines


class Instances(Labelled):
    """See `training.tasks.base.Task`; the network's maps are those of `rat_timm.dense.instances`.

    The average precision (AP, at an IoU of 0.5, 0.75, and the mean over 0.5 to 0.95) and the panoptic quality of many
    images are those of all their objects.
    """

    score = "ap50"
    out_channels = 2

    def target(self, crop: Sample) -> Tensor:
        """See `Labelled`."""
        return instance_targets(crop.target[None], crop.spacing[None], self.facts.length)[0]

    def loss(self, outputs: Tensor, batch: Scenes) -> Tensor:
        """See `Task`."""
        return instance_loss(outputs, batch.target, batch.levels[0].mask)

    def predict(self, call: Call, batch: Scenes) -> list[Tensor]:
        """See `Task`: labels ``[*grid]``."""
        spacing = batch.spacing if batch.out is None else batch.out.spacing
        maps = super().predict(call, batch)
        length = self.facts.length
        least = length**self.axes / 4 if self.config.min_size is None else self.config.min_size
        return list(instances(torch.stack(maps), spacing, scale=length, min_size=least))

    def measure(self, prediction: Tensor, batch: Scenes, index: int) -> Measured:
        """See `Task`."""
        found = match_instances(prediction, batch.target[index])
        return Measured(figures(found), found)

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        return figures(functools.reduce(operator.add, (one.evidence for one in measured)))

    def picture(self, prediction: Tensor, batch: Scenes, index: int) -> Tensor:
        """See `Task`."""
        return outlines(batch.levels[0], index, prediction, batch.target[index])


def figures(found: Matches) -> dict[str, float]:
    """Returns the figures of pairs of objects."""
    precision, quality = found.average_precision.tolist(), found.panoptic_quality.tolist()
    at = THRESHOLDS.index
    return {
        "ap50": precision[at(0.5)],
        "ap75": precision[at(0.75)],
        "ap": sum(precision) / len(precision),
        "pq": quality[at(0.5)],
    }
