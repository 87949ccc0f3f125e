"""Trains the weights that the package ships: handwritten digits whose physical size is known, in 2D and 3D.

    python examples/pretrain_test_weights.py [--models NAME ...] [--folder FOLDER] [--quick] [--evaluate]

The data are scikit-learn's handwritten digits (real, 8 x 8 pixels, 1797 of them, a fifth held out). A digit fills a
field of view of 32 x 32 units; in 3D it is a plate 12 units thick in a cube of 32 units, turned by up to 15 degrees in
depth. In training it is drawn with so many pixels along each axis as chance has it, so that pixels are not square and
voxels no cubes. Accuracy on held-out digits is measured at such grids and at others, with the spacing given to the
model and without.
"""

import argparse
import functools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import hub
from rat_timm.data import Batch
from training.digits import FIELD, THICKNESS, Digits, Pose, digits, draw, poses, spacing_of
from training.engines import TorchEngine
from training.steps import Recipe, answers, fit, image_alone, with_geometry

SHIFT = 1.0  # units, at most, in training
BATCH = 32
WEIGHTS = Path(__file__).parents[1] / "rat_timm" / "models" / "rat" / "weights"


class Task(NamedTuple):
    """What to train on: pixels along each axis to choose from; further grids to test on; by how much digits move.

    Attributes:
        train: Choices of the number of pixels, per axis.
        test: Grids to test on.
        epochs: Number of epochs.
        degrees: Largest turn in training.
    """

    train: Sequence[Sequence[int]]
    test: Sequence[tuple[int, ...]]
    epochs: int
    degrees: float

    def seen(self, size: Sequence[int]) -> bool:
        """Tells whether a grid is one of those to train on."""
        return all(n in choices for n, choices in zip(size, self.train, strict=True))


TASKS = {
    "test_rat": Task(
        train=[(24, 32, 40)] * 2,
        test=[(32, 32), (24, 24), (40, 40), (28, 28), (36, 36), (28, 36), (20, 20), (48, 48), (56, 56), (32, 48)],
        epochs=60,
        degrees=10,
    ),
    "test_rat_3d": Task(
        train=[(12, 16), (24, 32), (24, 32)],
        test=[(16, 32, 32), (12, 24, 24), (14, 28, 28), (12, 32, 28), (18, 36, 36), (24, 24, 24), (16, 40, 40)],
        epochs=90,
        degrees=15,
    ),
}


def prepare(data: Digits, size: Sequence[int], pose: Pose, model: nn.Module) -> Batch:
    """Draws digits in so many pixels and normalises them as the model's cfg says."""
    drawn = draw(data.images, size, pose).expand(-1, model.in_chans, *size)
    shape = (-1, *[1] * len(size))
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(shape) for name in ("mean", "std"))
    spacing = torch.tensor([spacing_of(size)], dtype=torch.float64)  # one row for all, as exact as numbers
    return Batch((drawn - mean) / std, spacing, None, data.labels)


def train(model: nn.Module, task: Task, data: Digits, epochs: int) -> None:
    """Trains, on another grid in each step."""
    engine = TorchEngine(model, lambda model: create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05), Recipe())
    scheduler = CosineLRScheduler(engine.optimizer, t_initial=epochs, warmup_t=2, warmup_lr_init=1e-4)
    steps = -(-len(data.labels) // BATCH)  # per epoch
    batches = track(
        draw_batches(model, task, data, epochs), description=model.pretrained_cfg["architecture"], total=epochs * steps
    )
    fit(engine, batches, lambda step: scheduler.step(step // steps))


def draw_batches(model: nn.Module, task: Task, data: Digits, epochs: int) -> Iterator[Batch]:
    """Yields the batches to train on."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.labels), generator=generator).split(BATCH):
            size = [axis[int(torch.randint(len(axis), (), generator=generator))] for axis in task.train]
            pose = poses(len(chosen), len(size), task.degrees, SHIFT, generator)
            yield prepare(Digits(data.images[chosen], data.labels[chosen]), size, pose, model)


def accuracy(model: nn.Module, data: Digits, size: Sequence[int], given: bool = True) -> float:
    """Returns the share of digits that are recognised at a grid: in 2D as they are, in 3D turned in depth."""
    generator = torch.Generator().manual_seed(1)
    pose = poses(len(data.labels), len(size), 0 if len(size) == 2 else TASKS["test_rat_3d"].degrees, 0, generator)
    image, spacing, _, target = prepare(data, size, pose, model)
    parts = zip(image.split(64), target.split(64), strict=True)
    predict = functools.partial(with_geometry if given else image_alone, model.eval())
    return answers(predict, (Batch(x, spacing, None, y) for x, y in parts)).float().mean().item()


def evaluate(model: nn.Module, task: Task, data: Digits) -> dict[tuple[int, ...], tuple[float, float]]:
    """Returns the accuracy at every grid, with the spacing given and without."""
    return {size: (accuracy(model, data, size), accuracy(model, data, size, given=False)) for size in task.test}


def show(name: str, task: Task, results: dict[tuple[int, ...], tuple[float, float]]) -> None:
    """Prints the results as a table."""
    table = Table("grid", "spacing", "trained on", "accuracy", "spacing not given", title=f"{name}, held-out digits")
    for size, (given, not_given) in results.items():
        spacing = " x ".join(f"{s:.3g}" for s in spacing_of(size))
        seen = "yes" if task.seen(size) else "no"
        table.add_row(" x ".join(map(str, size)), spacing, seen, f"{given:.1%}", f"{not_given:.1%}")
    Console().print(table)


def describe(task: Task, epochs: int, results: dict[tuple[int, ...], tuple[float, float]]) -> str:
    """Writes what the model card says of data, recipe and results."""
    rows = "\n".join(
        f"| {' x '.join(map(str, size))} | {' x '.join(f'{s:.3g}' for s in spacing_of(size))} "
        f"| {'yes' if task.seen(size) else 'no'} | {given:.1%} | {not_given:.1%} |"
        for size, (given, not_given) in results.items()
    )
    plates = (
        ""
        if len(task.train) == 2
        else f", as plates {THICKNESS:g} units thick turned by up to {task.degrees:g} degrees"
    )
    return f"""For tests and first steps. Trained by `examples/pretrain_test_weights.py` on scikit-learn's handwritten
digits (UCI, 1797 real digits, a stratified fifth held out) in a field of view of {FIELD:g} units{plates}:
{epochs} epochs of AdamW (learning rate 1e-3, cosine, weight decay 0.05, label smoothing 0.1), batches of 32, each drawn
with {" x ".join("/".join(map(str, axis)) for axis in task.train)} pixels, digits turned and shifted a little.

Accuracy on held-out digits, with `spacing` given to the model and not given:

| grid | spacing | trained on | given | not given |
|---|---|---|---|---|
{rows}"""


def ship(model: nn.Module, name: str, text: str, results: dict[tuple[int, ...], tuple[float, float]]) -> None:
    """Saves weights and model card under ``name`` (a path without an ending)."""
    evaluated = [
        EvalResult(
            task_type="image-classification",
            dataset_type="digits",
            dataset_name="scikit-learn digits, held out",
            dataset_config=" x ".join(map(str, size)),
            metric_type="accuracy",
            metric_value=round(given, 4),
        )
        for size, (given, _) in results.items()
    ]
    card = ModelCardData(license="bsd-3-clause", model_name=Path(name).name, eval_results=evaluated)
    with TemporaryDirectory() as folder:
        hub.save(model, folder, card_data=card, description=text, model_name=Path(name).name)
        shutil.move(Path(folder) / hub.WEIGHTS, f"{name}.safetensors")
        shutil.move(Path(folder) / hub.README, f"{name}.md")


def main() -> None:
    """Trains and saves, or evaluates what is shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--folder", type=Path, default=WEIGHTS, help="where weights and model cards go")
    parser.add_argument("--quick", action="store_true", help="train one epoch on some of the digits")
    parser.add_argument("--evaluate", action="store_true", help="evaluate the shipped weights instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as many as every machine has, so that results agree as far as they can
    seen, held_out = digits()
    if arguments.quick:
        seen, held_out = (Digits(part.images[:160], part.labels[:160]) for part in (seen, held_out))
    for name in arguments.models:
        task = TASKS[name]
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=arguments.evaluate, num_classes=10)
        epochs = 1 if arguments.quick else task.epochs
        if not arguments.evaluate:
            train(model, task, seen, epochs)
        results = evaluate(model, task, held_out)
        show(name, task, results)
        if not arguments.evaluate:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            ship(model, str(arguments.folder / f"{name}.digits"), describe(task, epochs, results), results)


if __name__ == "__main__":
    main()
