"""An experiment: a network is trained at the pixel sizes of a regime and tested at all of them."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from networks import NETWORKS, Classifier, at_spacing
from tasks import FACTORS, TASKS, Images, test_images, training_images
from torch import Tensor, nn
from torch.nn import functional as F

PHYSICAL = "rat, physical stem"
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
        shares: Shares of an image's length that are trained on, so that no field of view is learned.
        batch: Images in a step.
    """

    epochs: int = 20
    trained: float = 1.0
    tested: float = 1.0
    factors: tuple[float, ...] = FACTORS
    shares: tuple[float, ...] = (0.5, 0.67, 0.83, 1.0)
    batch: int = 32


def train(experiment: Experiment, budget: Budget, cache: Path) -> Classifier:
    """Trains a network."""
    task = TASKS[experiment.task]
    images = training_images(experiment.task, experiment.regime, round(task.training * budget.trained), cache)
    torch.manual_seed(experiment.seed)
    network = NETWORKS[experiment.network]
    classifier = network.create(len(task.size), task.classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=network.lr, weight_decay=0.05, fused=True)
    order = draw_order(images.factor, budget)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.lr, len(order), pct_start=0.15)
    classifier.train()
    for chosen in order:
        pixels, factor, label = (part[chosen] for part in images)
        loss = F.cross_entropy(classifier(augment(pixels, budget.shares), float(factor[0])), label, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return classifier.eval()


def draw_order(factor: Tensor, budget: Budget) -> list[Tensor]:
    """Returns the images of each step, in another order in each epoch; those of a step have one pixel size."""
    order = []
    for _ in range(budget.epochs):
        steps = [step for value in factor.unique() for step in _steps(factor == value, budget.batch)]
        order += [steps[index] for index in torch.randperm(len(steps))]
    return order


def _steps(taken: Tensor, batch: int) -> list[Tensor]:
    """Splits the indices of some images at random into whole batches."""
    index = taken.nonzero()[:, 0]
    parts = index[torch.randperm(len(index))].split(batch)
    return [part for part in parts if len(part) == batch]


def augment(pixels: Tensor, shares: Sequence[float]) -> Tensor:
    """Cuts a part of a random size out of a batch and flips it along each axis, or not."""
    share = shares[int(torch.randint(len(shares), ()))]
    for axis, n in enumerate(pixels.shape[2:], start=2):
        size = 4 * round(n * share / 4)
        pixels = pixels.narrow(axis, int(torch.randint(n - size + 1, ())), size)
    return pixels.flip([axis for axis in range(2, pixels.ndim) if torch.rand(()) < 0.5])


@torch.inference_mode()
def evaluate(classifier: Classifier, experiment: Experiment, budget: Budget, cache: Path) -> Iterator[dict]:
    """Yields how many images are right at each factor, setting and control."""
    task = TASKS[experiment.task]
    count = round(task.test * budget.tested)
    for factor, fixed in itertools.product(budget.factors, ("size", "field")):
        images = test_images(experiment.task, factor, fixed, count, cache)
        for control in controls(experiment, factor, fixed):
            shown = images
            if control == "cropped":
                shown = crop(test_images(experiment.task, 1.0, fixed, count, cache), factor)
            right = count_right(classifier, shown, control)
            yield {"factor": factor, "fixed": fixed, "control": control, "right": right, "count": count}


def controls(experiment: Experiment, factor: float, fixed: str) -> list[str]:
    """Returns how a network is tested.

    As it is; with images resized to the training spacing, unless the network does so itself; with a wrong spacing; with
    images of the training spacing cropped to what the smaller field of view shows; with its spacing hidden, where it
    would have been trained alike without it.
    """
    network = NETWORKS[experiment.network]
    applicable = {
        "": True,
        "resized": network.spacing != "resized" and not network.options.get("physical_stem"),
        "wrong spacing": network.spacing != "hidden" and fixed == "size",
        "cropped": fixed == "size" and factor < 1,
        "spacing hidden": experiment.network == PHYSICAL and experiment.regime == "one",
    }
    return [control for control, applies in applicable.items() if applies]


def crop(images: Images, factor: float) -> Images:
    """Returns the middle of images, with the field of view that as many pixels have at a factor below 1."""
    pixels = images.pixels
    for axis, n in enumerate(pixels.shape[2:], start=2):
        size = round(n * factor)
        pixels = pixels.narrow(axis, (n - size) // 2, size)
    return images._replace(pixels=pixels)


def count_right(classifier: Classifier, images: Images, control: str, pixels_at_once: int = 1 << 18) -> int:
    """Returns how many images are told right."""
    pixels, factor = images.pixels, float(images.factor[0])
    if control == "resized":
        pixels, factor = at_spacing(pixels, factor, 1.0), 1.0
    if control == "wrong spacing":
        factor *= WRONG
    if control == "spacing hidden":
        factor = 1.0
    batch = max(1, pixels_at_once // pixels[0].numel())
    logits = torch.cat([classifier(x, factor) for x in pixels.split(batch)])
    return int((logits.argmax(-1) == images.label).sum())


def run(experiment: Experiment, budget: Budget, cache: Path) -> pd.DataFrame:
    """Trains and tests; returns one row per factor, setting and control."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = list(evaluate(train(experiment, budget, cache), experiment, budget, cache))
    return pd.DataFrame(rows).assign(**dataclasses.asdict(experiment), seconds=round(time.perf_counter() - began))
