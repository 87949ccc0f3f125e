"""Maps of a teacher, learned at physical coordinates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.pretrain import Distiller, Lesson, Teacher, lessons
from training.config import Config
from training.crops import Level, Scenes
from training.engines import TYPES
from training.networks import backbone_args, level_args
from training.tasks.base import Call, Measured
from training.tasks.unlabelled import Unlabelled, images_told, row, sample_of

Named = dict[str, Tensor]


class Evidence(NamedTuple):
    """What the explained variance of many samples is made of: sums over places.

    Attributes:
        error: Of squared errors, over channels too.
        count: Of places.
        total: Of the teacher's features, ``[C]``.
        square: Of their squares, over channels too.
    """

    error: float
    count: int
    total: Tensor
    square: float


class Distillation(Unlabelled):
    """See `training.tasks.base.Task`.

    "explained" is the share of the variance of the teacher's normalised features that the student's explain.
    """

    score = "explained"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.teacher: Teacher | None = None

    @property
    def description(self) -> str:  # type: ignore[override]
        """See `Unlabelled`."""
        return f"Distilled from {self.config.teacher} (examples/pretrain.py of rat_timm), without labels."

    def network(self) -> Distiller:
        """See `Unlabelled`."""
        config = self.config
        if self.teacher is None:
            self.teacher = Teacher.create(
                config.teacher,
                config.teacher_index,
                spacing=None if config.teacher_spacing is None else tuple(config.teacher_spacing),
                in_chans=self.channels,
                **config.teacher_args,
            ).to(config.device)
        student = Distiller(
            config.model,
            self.teacher.num_features,
            self.channels,
            config.stages,
            **level_args(config),
            **backbone_args(config, self.spacing),
        )
        if config.intensity == "model":
            self.teacher.rescale(student.backbone)
        return student

    def targets(self, levels: Sequence[Level], with_labels: bool) -> list[Any]:
        """See `Unlabelled`: where slices are, ``[planes]``."""
        start = torch.rand(len(self.config.planes))
        return [start, *([None] * (len(levels) - 1))]

    def outputs(self, model: nn.Module, batch: Scenes) -> Named:
        """See `Task`: features, and where they are."""
        x, grid, mask = model(**images_told(batch))
        rows = [values.expand(len(x), -1) for values in (grid.spacing, grid.origin)]
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if mask is None else mask
        return {"x": x, "spacing": rows[0], "origin": rows[1], "mask": valid}

    def loss(self, outputs: Named, batch: Scenes) -> Tensor:
        """See `Task`."""
        student = _tokens(outputs)
        losses = [lesson.loss(student) for lesson in self._taught(batch)]
        return torch.stack(losses).mean()

    def _taught(self, batch: Scenes) -> list[Lesson]:
        assert self.teacher is not None
        dtype = TYPES.get(self.config.precision)
        with torch.autocast(self.config.device, dtype, enabled=dtype is not None):
            return lessons(
                self.teacher,
                **images_told(batch),
                planes=self.config.planes,
                slices=self.config.slices,
                start=batch.target,
            )

    def predict(self, call: Call, batch: Scenes) -> list[Named]:
        """See `Task`."""
        outputs = call(batch)
        return [{name: part[index] for name, part in outputs.items()} for index in range(len(batch.spacing))]

    def measure(self, prediction: Named, batch: Scenes, index: int) -> Measured:
        """See `Task`."""
        student = _tokens({name: part[None] for name, part in prediction.items()})
        sums = []
        for lesson in self._taught(sample_of(batch, index)):
            own, taught, valid = lesson.compare(student)
            own, taught = own[valid].double(), taught[valid].double()  # [N, C]
            error, square = (own - taught).square().sum(), taught.square().sum()
            sums.append(Evidence(float(error), len(taught), taught.sum(dim=0).cpu(), float(square)))
        evidence = add_up(sums)
        return Measured({"explained": explained(evidence)}, evidence)

    def summarize(self, measured: Sequence[Measured]) -> dict[str, float]:
        """See `Task`."""
        return {"explained": explained(add_up([one.evidence for one in measured]))}

    def picture(self, prediction: Named, batch: Scenes, index: int) -> Tensor | None:
        """See `Task`: three principal components of the teacher's features, and the student's seen by them."""
        student = _tokens({name: part[None] for name, part in prediction.items()})
        lesson = self._taught(sample_of(batch, index))[0]
        own, taught, valid = (part[0].cpu() for part in lesson.compare(student))
        if lesson.axis is not None:
            middle = taught.shape[lesson.axis] // 2
            own, taught, valid = (part.select(lesson.axis, middle) for part in (own, taught, valid))
        if int(valid.sum()) < 3 or taught.ndim > 3:
            return None
        mean = taught[valid].mean(dim=0)
        components = torch.linalg.svd(taught[valid] - mean, full_matrices=False).Vh[:3].T  # [C, 3 or fewer]
        painted = [((x - mean) @ components).movedim(-1, 0) for x in (taught, own)]
        low, high = (painted[0][:, valid].quantile(q, dim=1).view(-1, 1, 1) for q in (0.02, 0.98))
        return row([torch.where(valid, (x - low) / (high - low).clamp(min=1e-6), 0.0) for x in painted])


def add_up(sums: Sequence[Evidence]) -> Evidence:
    """Adds up what several samples or lessons have."""
    return Evidence(
        sum(each.error for each in sums),
        sum(each.count for each in sums),
        torch.stack([each.total for each in sums]).sum(dim=0),
        sum(each.square for each in sums),
    )


def explained(sums: Evidence) -> float:
    """Returns the share of the variance about the channels' means that is explained."""
    variance = sums.square - float(sums.total.square().sum()) / max(1, sums.count)
    return 1 - sums.error / max(variance, 1e-9)


def _tokens(outputs: Named) -> Tokens:
    x = outputs["x"]
    return Tokens(x, Grid(tuple(x.shape[1:-1]), outputs["spacing"], outputs["origin"]), outputs["mask"])
