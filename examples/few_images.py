"""What learns from 60 pictures? Discs and squares in noise, by networks without pretrained weights.

    python examples/few_images.py --output FOLDER

**Question.** From 30 pictures of discs and 30 of squares, 48 x 48 pixels, anywhere and of many sizes, which networks
tell others apart? 200 steps of 16 pictures with flips and the same recipe for all, 400 held-out pictures, three seeds
of weights and steps. Chance is 50%; it is an answer if the worst seed of one network is above the best of another.

Results are rows of FOLDER/few.csv; the table has percent, the mean and the range over seeds.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor
from torch.optim import AdamW

import rat_timm  # noqa: F401
from studies.layouts import FORMER
from studies.results import carry_out
from training.engines import TorchEngine
from training.steps import Recipe, answers, cross_entropy, fit, image_alone, one_cycle

SIDE, NOISE = 48, 15.0
PICTURES, BATCH, LR = 60, 16, 1e-3
NARROW = {"embed_dim": 32}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "rat_tiny, 32 wide": ("rat_tiny", NARROW),
    "the same, stem does not pool": ("rat_tiny", {**NARROW, "stem_kernel_size": (3, 3), "stem_pool": False}),
    "the same, former layout": ("rat_tiny", {**FORMER, **NARROW, "depths": (2, 3, 8, 3)}),
    "the same, former layout, stem pools": (
        "rat_tiny",
        {**FORMER, **NARROW, "depths": (2, 3, 8, 3), "stem_kernel_size": (7,), "stem_pool": True},
    ),
    "resnet10t": ("resnet10t", {}),
    "convnext_atto": ("convnext_atto", {}),
    "swin_tiny, 32 wide": ("swin_tiny_patch4_window7_224", {"img_size": SIDE, "window_size": 6, **NARROW}),
}
COLUMNS = ["network", "seed", "right", "loss", "seconds"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training.

    Attributes:
        network: One of `NETWORKS`.
        seed: Of weights and steps.
    """

    network: str
    seed: int


class Pictures(NamedTuple):
    """Pictures ``[N, 3, 48, 48]`` and what they are, ``[N]``: 0 for discs, 1 for squares."""

    image: Tensor
    target: Tensor


def draw(count: int, seed: int) -> Pictures:
    """Draws pictures; of a disc and a square of one size the area is the same."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    pictures = []
    for number in range(count):
        (v, u), radius = rng.uniform(14, SIDE - 14, 2), rng.uniform(6, 12)
        half = radius * np.sqrt(np.pi) / 2
        disc = (y - v) ** 2 + (x - u) ** 2 < radius**2
        inside = (abs(y - v) < half) & (abs(x - u) < half) if number % 2 else disc
        dark, bright = rng.uniform(40, 90), rng.uniform(130, 220)
        pictures.append(np.where(inside, bright, dark) + rng.normal(0, NOISE, inside.shape))
    image = torch.tensor(np.stack(pictures), dtype=torch.float32).clamp(0, 255) / 255
    return Pictures(((image - 0.45) / 0.22).unsqueeze(1).expand(-1, 3, -1, -1), torch.arange(count) % 2)


def batches(pictures: Pictures, steps: int) -> Iterator[Pictures]:
    """Yields pictures at random, mirrored along either axis half of the time."""
    for _ in range(steps):
        index = torch.randint(len(pictures.target), (BATCH,))
        image = pictures.image[index]
        for axis in (-1, -2):
            image = image.flip(axis) if torch.rand(()) < 0.5 else image
        yield Pictures(image, pictures.target[index])


def run(experiment: Experiment, quick: bool = False) -> pd.DataFrame:
    """Trains a network and returns the share of held-out pictures that it tells right."""
    torch.set_num_threads(1)
    torch.manual_seed(experiment.seed)
    began = time.process_time()
    name, options = NETWORKS[experiment.network]
    steps, losses = (20 if quick else 200), []
    model = timm.create_model(name, num_classes=2, **options)
    loss = functools.partial(cross_entropy, label_smoothing=0.0)
    engine = TorchEngine(
        model, lambda model: AdamW(model.parameters(), LR, weight_decay=0.05), Recipe(image_alone, loss), "cpu"
    )
    schedule = one_cycle(engine.optimizer, LR, steps, warmup=0.1)
    fit(engine, batches(draw(PICTURES, 0), steps), schedule, lambda _, loss: losses.append(float(loss)))
    model.eval()
    held_out = draw(20 if quick else 400, 1)
    parts = zip(*(tensor.split(100) for tensor in held_out), strict=True)
    right = answers(lambda batch: model(batch.image), (Pictures(*part) for part in parts))
    figures = {"right": right.float().mean().item(), "loss": float(np.mean(losses[-20:]))}
    return pd.DataFrame([{**dataclasses.asdict(experiment), **figures, "seconds": round(time.process_time() - began)}])


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="twenty steps, to see that everything works")
    given = parser.parse_args()
    wanted = [Experiment(network, seed) for network in given.networks for seed in range(given.seeds)]
    carry_out(wanted, functools.partial(run, quick=given.quick), given.output / "few.csv", COLUMNS, given.jobs)
    results = pd.read_csv(given.output / "few.csv")
    table = (100 * results.groupby("network", sort=False)["right"].agg(["mean", "min", "max"])).round(1)
    print(table.join(results.groupby("network")[["loss", "seconds"]].mean().round(3)).to_string())


if __name__ == "__main__":
    main()
