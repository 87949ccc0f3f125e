"""An experiment: a network is trained at the pixel sizes of a regime and tested at all of them."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from resolution_study.networks import NETWORKS, TOLD, Classifier, at_spacing
from resolution_study.tasks import FACTORS, TASKS, Images, test_images, training_images
from training.engines import TorchEngine
from training.steps import Recipe, answers, fit, one_cycle

WRONG = 1.6  # by what the spacing is wrong where it is so on purpose


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training.

    Attributes:
        task: Name of a task.
        network: Name of a network.
        regime: Name of a regime.
        seed: Of the weights and of the order.
    """

    task: str
    network: str
    regime: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is trained and tested.

    Attributes:
        epochs: Passes over the images.
        trained: Share of a task's training images that is used.
        tested: Share of its test images.
        factors: Pixel sizes to test at.
        share: The least share of an image's length that is trained on, so that no field of view is learned.
        batch: Images in a step.
    """

    epochs: int = 20
    trained: float = 1.0
    tested: float = 1.0
    factors: tuple[float, ...] = FACTORS
    share: float = 0.5
    batch: int = 32


def run(experiment: Experiment, budget: Budget, cache: Path) -> pd.DataFrame:
    """Trains and tests; returns one row per factor, setting and control.

    ``answers`` are the bits of which images are right, in hexadecimal digits; ``seconds`` are those of all of it.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = list(evaluate(train(experiment, budget, cache), experiment, budget, cache))
    return pd.DataFrame(rows).assign(**dataclasses.asdict(experiment), seconds=round(time.perf_counter() - began))


def train(experiment: Experiment, budget: Budget, cache: Path) -> Classifier:
    """Trains a network."""
    task = TASKS[experiment.task]
    groups = training_images(experiment.task, experiment.regime, round(task.training * budget.trained), cache)
    torch.manual_seed(experiment.seed)
    network = NETWORKS[experiment.network]
    classifier = network.create(task.spacing, task.classes)
    steps = [step for _ in range(budget.epochs * network.longer) for step in draw_steps(groups, budget.batch)]
    engine = TorchEngine(
        classifier, lambda model: AdamW(model.parameters(), lr=network.lr, weight_decay=0.05, fused=True), Recipe(told)
    )
    batches = (
        Images(augment(images.pixels[chosen], budget.share), images.ratio, images.target[chosen])
        for images, chosen in steps
    )
    fit(engine, batches, one_cycle(engine.optimizer, network.lr, len(steps), warmup=0.15))
    return classifier.eval()


def told(classifier: nn.Module, images: Images) -> Tensor:
    """Returns the logits of images whose spacing is told."""
    return classifier(images.pixels, images.ratio)


def draw_steps(groups: list[Images], batch: int) -> list[tuple[Images, Tensor]]:
    """Returns the steps of one pass in random order: whole batches, each of one group's images."""
    steps = [
        (group, chosen)
        for group in groups
        for chosen in torch.randperm(len(group.target)).split(batch)
        if len(chosen) == batch
    ]
    return [steps[index] for index in torch.randperm(len(steps))]


def augment(pixels: Tensor, least: float) -> Tensor:
    """Cuts a part of a random size, ``least`` of the length or more, out of a batch and flips it along each axis."""
    share = least + (1 - least) * float(torch.rand(()))
    for axis, n in enumerate(pixels.shape[2:], start=2):
        size = max(min(4, n), round(n * share))  # a token has four pixels
        pixels = pixels.narrow(axis, int(torch.randint(n - size + 1, ())), size)
    return pixels.flip([axis for axis in range(2, pixels.ndim) if torch.rand(()) < 0.5])


@torch.inference_mode()
def evaluate(classifier: Classifier, experiment: Experiment, budget: Budget, cache: Path) -> Iterator[dict]:
    """Yields which images are right in each setting, at each factor and with each control."""
    task = TASKS[experiment.task]
    count = round(task.test * budget.tested)
    for setting, factor in itertools.product(task.settings, budget.factors):
        images = test_images(experiment.task, factor, setting, count, cache)
        for control in controls(experiment, setting, factor):
            shown = images
            if control == "cropped":
                shown = crop(test_images(experiment.task, 1.0, setting, count, cache), factor)
            right = are_right(classifier, shown, control)
            bits = np.packbits(right).tobytes().hex()
            result = {"right": int(right.sum()), "count": count, "answers": bits}
            yield {"setting": setting, "factor": factor, "control": control, **result}


def controls(experiment: Experiment, setting: str, factor: float) -> list[str]:
    """Returns how a network is tested.

    As it is; with images resized to the training spacing, unless the network does so itself; with a wrong spacing; with
    images of the training spacing cropped to what the smaller field of view shows; with its spacing hidden, where it
    would have been trained alike without it.
    """
    network = NETWORKS[experiment.network]
    applicable = {
        "": True,
        "resized": network.spacing != "resized" and not network.options.get("physical_stem"),
        "wrong spacing": network.spacing != "hidden" and setting == "field",
        "cropped": setting == "size" and factor < 1,
        "spacing hidden": experiment.network == TOLD and experiment.regime == "one",
    }
    return [control for control, applies in applicable.items() if applies]


def crop(images: Images, factor: float) -> Images:
    """Returns the middle of images, with the field of view that as many pixels have at a factor below 1."""
    pixels = images.pixels
    for axis, n in enumerate(pixels.shape[2:], start=2):
        size = round(n * factor)
        pixels = pixels.narrow(axis, (n - size) // 2, size)
    return images._replace(pixels=pixels)


def are_right(classifier: Classifier, images: Images, control: str, pixels_at_once: int = 1 << 18) -> np.ndarray:
    """Returns which images are told right."""
    pixels, ratio, ones = images.pixels, images.ratio, (1.0,) * len(images.ratio)
    if control == "resized":
        pixels = at_spacing(pixels, ratio, ones)
    if control == "wrong spacing":
        ratio = tuple(WRONG * by for by in ratio)
    if control in ("resized", "spacing hidden"):
        ratio = ones
    batch = max(1, pixels_at_once // pixels[0].numel())
    parts = zip(pixels.split(batch), images.target.split(batch), strict=True)
    return answers(functools.partial(told, classifier), (Images(x, ratio, y) for x, y in parts)).numpy()
