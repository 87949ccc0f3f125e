"""Pixels of hidden blocks, predicted from what is left (masked-image modelling)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from rat_timm.geometry.grid import Grid
from rat_timm.pretrain import MaskedImageModel, hide_pyramid, masked_loss, normalize_blocks
from rat_timm.pretrain.blocks import check_block
from training.crops import Level, Scenes
from training.frames import are_objects
from training.networks import backbone_args, level_args
from training.tasks.base import Call, Measured
from training.tasks.unlabelled import Unlabelled, images_told, labels_of, row, sample_of

NEIGHBOURS = 10
PROBED = 256  # places of a crop
Named = dict[str, Tensor]


class Evidence(NamedTuple):
    """What figures are made of.

    Attributes:
        error: The loss of a sample.
        scale: What it would be if every normalised pixel were predicted to be zero.
        features: Of some places whose class is known, ``[N, C]``.
        classes: Of these places, ``[N]``.
    """

    error: float
    scale: float
    features: np.ndarray
    classes: np.ndarray


class Masked(Unlabelled):
    """See `training.tasks.base.Task`.

    "explained" is the share of the variance of hidden normalised pixels that predictions explain. Where validation
    images have labels, "knn" is the balanced accuracy of the classes of places, told by their nearest neighbours among
    the features of the other validation images.
    """

    score = "explained"
    description = "Pretrained by masked-image modelling (examples/pretrain.py of rat_timm), without labels."

    def network(self) -> MaskedImageModel:
        """See `Unlabelled`."""
        config = self.config
        backbone = {**level_args(config), **backbone_args(config, self.spacing)}
        return MaskedImageModel(config.model, self.channels, config.width, config.depth, config.stages, **backbone)

    def create_model(self) -> nn.Module:
        """See `Task`."""
        model = self.network()
        self.cell = model.hidden_cell
        self.block = self._block(model)
        self.window = self.block if self.config.window is None else [self.config.window] * self.axes
        check_block(self.block, [n * step for n, step in zip(self.size, self.spacing, strict=True)])
        return model

    def _block(self, model: MaskedImageModel) -> list[float]:
        if self.config.block is not None:
            return [self.config.block] * self.axes
        pixel = model.backbone.reference_spacing if self.cell is None else self.spacing
        lengths = zip(model.backbone.feature_info[-1]["stride"], pixel, self.size, self.spacing, strict=True)
        return [min(n * step, size * own / 2) for n, step, size, own in lengths]

    def targets(self, levels: Sequence[Level], with_labels: bool) -> list[Tensor]:
        """See `Unlabelled`: what is hidden, and labels, ``[1 or 2, *grid]``."""
        samples = [level.sample for level in levels]
        hidden = hide_pyramid(
            [Grid.create(sample.image.shape[1:], sample.spacing.tolist()) for sample in samples],
            self.block,
            self.config.share,
            level=self.config.hide_level,
            valid=[None if sample.mask is None else sample.mask[None] for sample in samples],
            cell=self.cell,
        )
        if not with_labels:
            return hidden
        return [torch.stack([one[0].long(), labels_of(sample)]) for one, sample in zip(hidden, samples, strict=True)]

    def outputs(self, model: nn.Module, batch: Scenes) -> Named:
        """See `Task`: pixels of each level; in evaluation also features of the whole image, where labels are known."""
        told = images_told(batch)
        hidden = _hidden(batch)
        made = model(**told, hidden=hidden if len(hidden) > 1 else hidden[0])
        named = {str(level): pixels for level, pixels in enumerate([made] if isinstance(made, Tensor) else made)}
        if model.training or not bool((_labels(batch) >= 0).any()):
            return named
        features: Any = model.features(**told)
        return {**named, "features": features.x, "classes": self._classes(features, batch)}

    def _classes(self, features: Any, batch: Scenes) -> Tensor:
        """Returns the class of each place, ``[B, *grid]``; -1 where it is not known."""
        labels = _labels(batch)
        size = labels.new_tensor(labels.shape[1:])
        spacing, origin = (x.view(len(x), *[1] * self.axes, -1) for x in (batch.spacing, batch.origins[0]))
        index = ((features.grid.coordinates() - origin) / spacing).round().long()
        inside = ((index >= 0) & (index < size)).all(dim=-1)
        index = index.clamp(labels.new_zeros(()), size - 1)
        samples = torch.arange(len(labels), device=labels.device).view(-1, *[1] * self.axes)
        classes = labels[(samples, *index.unbind(-1))].where(inside, -1)
        if features.mask is not None:
            classes = classes.where(features.mask, -1)
        return classes.clamp(max=1) if are_objects(str(self.config.data)) else classes

    def loss(self, outputs: Named, batch: Scenes) -> Tensor:
        """See `Task`."""
        return self._losses(outputs, batch).mean()

    def _losses(self, outputs: Named, batch: Scenes) -> Tensor:
        told = images_told(batch)
        images = told["x"] if isinstance(told["x"], list) else [told["x"]]
        predicted, hidden = [outputs[str(level)] for level in range(len(images))], _hidden(batch)
        spacing = told["spacing"] if isinstance(told["x"], list) else [told["spacing"]]
        mask = told["mask"] if isinstance(told["mask"], list) else None if told["mask"] is None else [told["mask"]]
        return masked_loss(predicted, images, hidden, self.window, spacing=spacing, mask=mask)

    def predict(self, call: Call, batch: Scenes) -> list[Named]:
        """See `Task`."""
        outputs = call(batch)
        return [{name: part[index] for name, part in outputs.items()} for index in range(len(batch.spacing))]

    def measure(self, prediction: Named, batch: Scenes, index: int) -> Measured:
        """See `Task`."""
        one = sample_of(batch, index)
        outputs = {name: part[None] for name, part in prediction.items()}
        error = float(self._losses(outputs, one))
        scale = float(self._losses({name: torch.zeros_like(part) for name, part in outputs.items()}, one))
        features, classes = torch.zeros(0, 0), torch.zeros(0, dtype=torch.long)
        if "classes" in prediction:
            flat = prediction["classes"].flatten().cpu()
            known = (flat >= 0).nonzero()[:, 0]
            known = known[:: max(1, -(-len(known) // PROBED))]
            features, classes = prediction["features"].flatten(0, -2).cpu()[known], flat[known]
        return Measured(
            {"explained": 1 - error / max(scale, 1e-9)}, Evidence(error, scale, features.numpy(), classes.numpy())
        )

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        evidence = [one.evidence for one in measured]
        error, scale = (sum(getattr(each, name) for each in evidence) for name in ("error", "scale"))
        figures = {"explained": 1 - error / max(scale, 1e-9)}
        frames = np.repeat(np.arange(len(evidence)) // self.config.crops, [len(each.classes) for each in evidence])
        if len(np.unique(frames)) > 1:
            features, classes = (
                np.concatenate([getattr(each, name) for each in evidence if len(each.classes)])
                for name in ("features", "classes")
            )
            figures["knn"] = neighbours_accuracy(features, classes, frames)
        return figures

    def picture(self, prediction: Named, batch: Scenes, index: int) -> Tensor:
        """See `Task`: level 0's image, what is seen of it, and that with what is predicted; of volumes the middle."""
        one = sample_of(batch, index)
        first, hidden = one.levels[0], _hidden(one)[0]
        grid = Grid.create(first.image.shape[2:], first.spacing.tolist(), device=first.image.device)
        norm = normalize_blocks(first.image, grid, self.window, first.mask)
        made = torch.where(hidden[:, None], norm.undo(prediction["0"][None]), first.image)[0, 0]
        image = first.image[0, 0]
        low, high = torch.quantile(
            image.flatten()[:: max(1, image.numel() // 100_000)], image.new_tensor([0.01, 0.998])
        )
        planes = [((x - low) / (high - low).clamp(min=1e-6)).cpu() for x in (image, made)]
        seen = torch.where(hidden[0].cpu(), 0.5, planes[0])
        middle = [plane[len(plane) // 2] if plane.ndim == 3 else plane for plane in (planes[0], seen, planes[1])]
        return row(middle)


def neighbours_accuracy(features: np.ndarray, classes: np.ndarray, frames: np.ndarray) -> float:
    """Returns the balanced accuracy of classes that are told by the nearest places (by angle) in other frames."""
    told = np.full_like(classes, -1)
    for frame in np.unique(frames):
        here = frames == frame
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, int((~here).sum())), metric="cosine")
        told[here] = neighbours.fit(features[~here], classes[~here]).predict(features[here])
    return float(balanced_accuracy_score(classes, told))


def _hidden(batch: Scenes) -> list[Tensor]:
    return [level.target[:, 0] == 1 for level in batch.levels]  # type: ignore[call-overload, index]


def _labels(batch: Scenes) -> Tensor:
    """Returns level 0's labels ``[B, *size]``; -1 where there are none."""
    target = batch.target
    return target[:, 1] if target.shape[1] > 1 else torch.full_like(target[:, 0], -1, dtype=torch.long)
