"""Boxes around objects."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.utils import draw_bounding_boxes

from rat_timm.data import Batch, Sample
from rat_timm.data.samples import IGNORED, Objects
from rat_timm.dense import fcos, mask_rcnn
from training.cells import boxes
from training.config import Config
from training.crops import Scenes
from training.networks import backbone_args
from training.steps import Output
from training.tasks.base import Call, Measured
from training.tasks.labelled import Facts, Labelled, middle

MOST = 300  # boxes in an image
SURE = 0.5  # score of boxes that are drawn
WEIGHTS = "model.safetensors"
Boxes = dict[str, Tensor]


class Detection(Labelled):
    """See `training.tasks.base.Task`; detectors and their losses are torchvision's, and the figures COCO's."""

    score = "map50"

    def __init__(self, config: Config, facts: Facts | None = None) -> None:
        super().__init__(config, facts)
        if self.axes != 2 or config.levels != [1] or config.tile is not None:
            raise ValueError(
                "task must not be detection with volumes, levels or tile, got "
                f"{self.axes} axes, {config.levels}, {config.tile}"
            )

    def network(self) -> nn.Module:
        """See `Labelled`."""
        config, facts = self.config, self.facts
        backbone = {"in_chans": facts.channels, **backbone_args(config, facts.spacing)}
        shared: dict[str, Any] = {"out_channels": config.width, "backbone_args": backbone}
        if config.detector == "fcos":
            return fcos(config.model, 2, detections_per_img=MOST, **shared)
        return mask_rcnn(config.model, 2, box_detections_per_img=MOST, **shared)

    def load_model(self, folder: Path) -> nn.Module:
        """See `Labelled`."""
        task = Detection(dataclasses.replace(self.config, pretrained=False), self.facts)
        model = task.network()
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()

    def save_model(self, model: nn.Module, folder: Path) -> None:
        """See `Labelled`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)

    def target(self, crop: Sample) -> Objects:
        """See `Labelled`."""
        return boxes(crop.target)

    def outputs(self, model: nn.Module, batch: Scenes) -> Output:
        """See `Task`: losses of crops with their boxes, else boxes."""
        images = _images(batch.levels[0])
        if isinstance(batch.target, list):
            return model(images, batch.target, spacing=batch.spacing)
        return model(images, spacing=batch.spacing)

    def loss(self, outputs: dict[str, Tensor], batch: Scenes) -> Tensor:
        """See `Task`."""
        return torch.stack(list(outputs.values())).sum()

    def predict(self, call: Call, batch: Scenes) -> list[Boxes]:
        """See `Task`: boxes are those of pixels of the image, or of the grid that is asked for."""
        found = call(batch)
        if batch.out is None:
            return found
        pixels = (batch.spacing / batch.out.spacing).flip(-1).repeat(1, 2)  # [B, 4]: x, y, x, y
        return [{**each, "boxes": each["boxes"] * row} for each, row in zip(found, pixels, strict=True)]

    def measure(self, prediction: Boxes, batch: Scenes, index: int) -> Measured:
        """See `Task`."""
        labels = batch.target[index]
        found = {name: prediction[name].cpu() for name in ("boxes", "scores", "labels")}
        annotated = _at_centers(labels.cpu(), found["boxes"]) != IGNORED
        found = {name: values[annotated] for name, values in found.items()}
        pair = found, {name: value.cpu() for name, value in boxes(labels).items() if name != "masks"}
        return Measured(figures([pair]), pair)

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        return figures([one.evidence for one in measured])

    def picture(self, prediction: Boxes, batch: Scenes, index: int) -> Tensor:
        """See `Task`."""
        (image,) = middle(batch.levels[0], index)
        drawn = torch.from_numpy(image).expand(3, *image.shape)
        drawn = draw_bounding_boxes(drawn, boxes(batch.target[index].cpu())["boxes"], colors="lime")
        sure = prediction["scores"].cpu() >= SURE
        return draw_bounding_boxes(drawn, prediction["boxes"].cpu()[sure], colors="red")


def _images(batch: Batch) -> list[Tensor]:
    """Returns the images without what they were filled up with."""
    if batch.mask is None:
        return list(batch.image)
    sizes = [(int(mask.any(1).sum()), int(mask.any(0).sum())) for mask in batch.mask]
    return [image[:, :height, :width] for image, (height, width) in zip(batch.image, sizes, strict=True)]


def _at_centers(labels: Tensor, corners: Tensor) -> Tensor:
    """Returns the labels at the centres of boxes."""
    x, y = (corners[:, :2] + corners[:, 2:]).div(2).long().T
    height, width = labels.shape
    return labels[y.clamp(0, height - 1), x.clamp(0, width - 1)]


def figures(pairs: Sequence[tuple[Boxes, Boxes]]) -> dict[str, float]:
    """Returns COCO's figures of pairs of predicted and true boxes."""
    limits = [1, 100, MOST]
    metric = MeanAveragePrecision(max_detection_thresholds=limits, extended_summary=True, sync_on_compute=False)
    metric.update([found for found, _ in pairs], [true for _, true in pairs])
    computed = metric.compute()
    # the metric's own mean is of the first 100 boxes of an image, whatever the limit
    precision = computed["precision"][..., 0, -1]  # [IoU, recall, class]
    known = precision[precision >= 0]
    mean = float(known.mean()) if len(known) else -1.0
    return {"map": mean, "map50": float(computed["map_50"]), "map75": float(computed["map_75"])}
