"""Adaptive against regular patches: handwritten digits of any size, anywhere on a canvas, among pieces of others.

    python examples/adaptive_patches.py                    # a table, in minutes, and adaptive_patches.png

Both networks are timm's vision transformer and have the same number of tokens and about the same number of
multiplications: the regular one sees the canvas reduced to so many patches and has two blocks more; the adaptive one
places its patches itself. The digits are those that scikit-learn ships; those tested are none that are trained on.
"""

import argparse
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import timm
import torch
from joblib import Parallel, delayed
from matplotlib.patches import Polygon
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

import rat_timm  # noqa: F401  (registers the models)
from rat_timm.cost import count_macs
from training.digits import Digits, digits
from training.engines import TorchEngine
from training.steps import Recipe, answers, cross_entropy, fit, image_alone, one_cycle

CANVAS = 64  # pixels per axis
SIZES = (20, 44)  # of a digit, in pixels
PIECES = 2  # of other digits on a canvas
PATCH = 8
SMALL = {"embed_dim": 96, "num_heads": 3, "in_chans": 1, "num_classes": 10, "patch_size": PATCH, "global_pool": "avg"}


class Canvases(NamedTuple):
    """Canvases with a digit each.

    Attributes:
        image: ``[N, 1, CANVAS, CANVAS]``.
        target: Which digits they are, ``[N]``.
    """

    image: Tensor
    target: Tensor


def place(x: Tensor, size: Tensor, center: Tensor) -> Tensor:
    """Draws images ``[N, 1, h, w]`` on empty canvases, ``size`` ``[N]`` pixels large around ``center`` ``[N, 2]``."""
    scale = (CANVAS / size)[:, None, None]
    to_image = torch.cat((torch.eye(2) * scale, -(2 * center / CANVAS - 1).unsqueeze(-1) * scale), dim=-1)
    grid = F.affine_grid(to_image, [len(x), 1, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def draw(source: Digits, count: int) -> Canvases:
    """Draws canvases with a whole digit each, and pieces of others."""
    images = source.images.unsqueeze(1)
    chosen = torch.randint(len(images), (count,))
    size = torch.empty(count).uniform_(*SIZES)
    canvas = place(images[chosen], size, size[:, None] / 2 + torch.rand(count, 2) * (CANVAS - size)[:, None])
    for _ in range(PIECES):
        others = images[torch.randint(len(images), (count,))]
        near = (torch.arange(8) - torch.randint(6, (count, 2, 1))) // 3 == 0  # three pixels along each axis
        piece = others * (near[:, 0, :, None] & near[:, 1, None, :]).unsqueeze(1)
        spread = place(piece, torch.empty(count).uniform_(*SIZES), torch.rand(count, 2) * CANVAS)
        canvas = torch.maximum(canvas, spread)
    canvas = canvas + 0.05 * torch.randn_like(canvas)
    return Canvases((canvas - 0.1) / 0.25, source.labels[chosen])


class Regular(nn.Module):
    """A vision transformer that sees the canvas reduced to ``tokens`` patches."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.size = PATCH * round(tokens**0.5)
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=self.size, depth=6, **SMALL)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies canvases."""
        return self.model(F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True))


def adaptive(tokens: int) -> nn.Module:
    """Makes a vision transformer that cuts ``tokens`` patches out of the canvas."""
    return timm.create_model(
        "apvit_tiny_patch16_224",
        img_size=CANVAS,
        depth=4,
        num_patches=tokens,
        scaling="isotropic",
        max_scale=4.0,
        **SMALL,
    )


NETWORKS = {"regular": Regular, "adaptive": adaptive}


def make_optimizer(model: nn.Module) -> Optimizer:
    """Makes AdamW; places that move as fast as what is learned from them may run away from it."""
    placing = [p for name, p in model.named_parameters() if name.startswith("patching.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("patching.")]
    groups = [{"params": others, "lr": 1e-3}, {"params": placing, "lr": 3e-4}]
    return AdamW([group for group in groups if group["params"]], weight_decay=0.05)


def train(model: nn.Module, canvases: Canvases, steps: int, batch: int = 64) -> None:
    """Trains a model."""
    engine = TorchEngine(
        model, make_optimizer, Recipe(image_alone, functools.partial(cross_entropy, label_smoothing=0.0))
    )
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    chosen = (torch.randint(len(canvases.image), (batch,)) for _ in range(steps))
    batches = (Canvases(canvases.image[each], canvases.target[each]) for each in chosen)
    fit(engine, batches, one_cycle(engine.optimizer, rates, steps, warmup=0.1))


def accuracy(model: nn.Module, canvases: Canvases) -> float:
    """Returns the percentage that is told right."""
    parts = itertools.starmap(Canvases, zip(*(part.split(256) for part in canvases), strict=True))
    return 100 * answers(functools.partial(image_alone, model.eval()), parts).float().mean().item()


class Result(NamedTuple):
    """What a network came to.

    Attributes:
        patches: Which.
        tokens: How many patches.
        seed: Of the weights and of the order of training.
        mmac: Millions of multiplications for a canvas.
        right: Percentage of test canvases that are told right.
    """

    patches: str
    tokens: int
    seed: int
    mmac: float
    right: float


def run(kind: str, tokens: int, seed: int, steps: int, training: Canvases, test: Canvases) -> tuple[Result, nn.Module]:
    """Trains and tests a network."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = NETWORKS[kind](tokens)
    mmac = count_macs(model.eval(), torch.empty(1, 1, CANVAS, CANVAS)) / 1e6
    train(model, training, steps)
    return Result(kind, tokens, seed, mmac, accuracy(model, test)), model


def corners(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the corners of each patch in pixels, x before y, ``[B, N, 4, 2]``."""
    transform = model.patches(x).transform
    ends = torch.tensor([[-1.0, -1.0, 1.0], [1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
    return ((ends @ transform.mT) + 1) / 2 * CANVAS - 0.5


@torch.inference_mode()
def show(before: nn.Module, after: nn.Module, canvases: Canvases, file: Path, count: int = 8) -> None:
    """Draws the patches over canvases, before and after training."""
    figure, axes = plt.subplots(2, count, figsize=(2 * count, 4.4))
    for row, (name, model) in enumerate((("before training", before), ("after training", after))):
        places = corners(model.eval(), canvases.image[:count])
        for axis, x, boxes, label in zip(axes[row], canvases.image, places, canvases.target, strict=False):
            axis.imshow(x[0], cmap="gray")
            for index, box in enumerate(boxes):
                axis.add_patch(Polygon(box.numpy(), fill=False, edgecolor=f"C{index % 10}"))
            axis.set(xticks=[], yticks=[], title=f"{name}: {label}" if axis is axes[row, 0] else f"{label}")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main() -> None:
    """Trains, prints a table, draws a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[9, 16], help="square numbers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--canvases", type=int, default=15000, help="to train on")
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time, one core each")
    parser.add_argument("--picture", type=Path, default=Path("adaptive_patches.png"))
    given = parser.parse_args()
    torch.manual_seed(0)
    training, test = (draw(source, count) for source, count in zip(digits(), (given.canvases, 2000), strict=True))
    plan = list(itertools.product(NETWORKS, given.tokens, range(given.seeds)))
    jobs = (delayed(run)(*experiment, given.steps, training, test) for experiment in plan)
    done = list(track(Parallel(given.jobs, return_as="generator")(jobs), "trainings", total=len(plan)))
    results = pd.DataFrame([result for result, _ in done])
    table = results.groupby(["tokens", "patches"], sort=False).agg(
        mmac=("mmac", "first"),
        right=("right", "mean"),
        deviation=("right", "std"),
        seeds=("right", lambda right: ", ".join(f"{value:.1f}" for value in right)),
    )
    print(table.round(1).to_string())
    trained = next(model for result, model in done if result.patches == "adaptive")
    torch.manual_seed(0)
    show(adaptive(given.tokens[0]), trained, test, given.picture)
    print(given.picture)


if __name__ == "__main__":
    main()
