"""Does knowing the pixel size help? Trains and tests all networks of the study, and writes the report.

    python examples/resolution_study/study.py                           # what `results.csv` does not have yet
    python examples/resolution_study/study.py --jobs 2 --tasks cells    # two at a time, of one task
    python examples/resolution_study/study.py --quick --output FOLDER   # a small part, in a minute

Every training is one line of the plan: a task, a network, a regime (at which pixel sizes it is trained) and a seed. Its
results are added to `results.csv` when it is done, so that the study may be interrupted and goes on where it was.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import report
import torch
from joblib import Parallel, delayed
from networks import NETWORKS, PEERS, Classifier, Network, at_spacing
from rich.progress import track
from tasks import FACTORS, REGIMES, TASKS, Images, test_images, training_images
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
WRONG = 1.6  # by what the spacing is wrong where it is so on purpose
TOLD = ("rat, physical stem", "rat, spacing hidden", "plain rat")
CHANNEL, RESIZED = (tuple(f"{name}, {kind}" for name in PEERS) for kind in ("channel", "resized"))
TRIED = ("rat, physical kernel", "rat, pyramid", "rat, strided convolutions", "rat, log scaling")
COARSENED = ("rat, physical stem, coarsened", "convnext, resized, coarsened")
PLAN = {
    # where all images have one spacing, a channel says nothing, and resizing in training changes nothing
    ("cells", "one"): (*TOLD, *PEERS, "rat", *COARSENED, *TRIED),
    ("cells", "two"): (*TOLD, *PEERS, *CHANNEL, *RESIZED),
    ("cells", "mixed"): (*TOLD, *PEERS, *CHANNEL, *RESIZED, "rat", "rat, conditioned stem", *TRIED),
    ("cells in volumes", "one"): TOLD,
    ("cells in volumes", "mixed"): TOLD,
    ("photographs", "one"): (*TOLD, *PEERS, *COARSENED),
    ("photographs", "mixed"): (*TOLD, *PEERS, *CHANNEL, *RESIZED),
}


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


def plan(tasks: list[str]) -> list[Experiment]:
    """Returns all experiments, seed by seed."""
    wanted = [(task, regime, networks) for (task, regime), networks in PLAN.items() if task in tasks]
    return [Experiment(t, network, r, seed) for seed in SEEDS for t, r, networks in wanted for network in networks]


def train(experiment: Experiment, budget: Budget, cache: Path) -> Classifier:
    """Trains a network."""
    task = TASKS[experiment.task]
    images = training_images(experiment.task, experiment.regime, round(task.training * budget.trained), cache)
    torch.manual_seed(experiment.seed)
    network = NETWORKS[experiment.network]
    classifier = network.create(len(task.size), task.classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=network.lr, weight_decay=0.05)
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
        for control in controls(NETWORKS[experiment.network], factor, fixed):
            shown = images
            if control == "cropped":
                shown = crop(test_images(experiment.task, 1.0, fixed, count, cache), factor)
            right = count_right(classifier, shown, control)
            yield {"factor": factor, "fixed": fixed, "control": control, "right": right, "count": count}


def controls(network: Network, factor: float, fixed: str) -> list[str]:
    """Returns how a network is tested.

    As it is; with images resized to the training spacing; with a wrong spacing; with images of the training spacing
    cropped to what the smaller field of view shows.
    """
    applicable = {
        "": True,
        "resized": network.spacing != "resized",
        "wrong spacing": network.spacing != "hidden" and fixed == "size",
        "cropped": fixed == "size" and factor < 1,
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
    batch = max(1, pixels_at_once // pixels[0].numel())
    logits = torch.cat([classifier(x, factor) for x in pixels.split(batch)])
    return int((logits.argmax(-1) == images.label).sum())


def run(experiment: Experiment, budget: Budget, cache: Path) -> pd.DataFrame:
    """Trains and tests; returns one row per factor, setting and control."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    classifier = train(experiment, budget, cache)
    seconds = round(time.perf_counter() - began)
    rows = evaluate(classifier, experiment, budget, cache)
    return pd.DataFrame([{**dataclasses.asdict(experiment), **row, "seconds": seconds} for row in rows])


def main() -> None:
    """Runs what is left of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE, help="where results, pictures and the report go")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rat_timm_study", help="for images")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="one network that learns fast, for a short time")
    given = parser.parse_args()
    budget, wanted = Budget(), plan(given.tasks)
    if given.quick:
        budget = Budget(epochs=9, trained=0.3, tested=0.2, factors=(0.5, 1.0, 2.0), shares=(1.0,))
        wanted = [Experiment("cells", "plain rat", "one", 0)]
    chosen = {"network": given.networks, "regime": given.regimes, "seed": given.seeds}
    wanted = [each for each in wanted if all(getattr(each, name) in allowed for name, allowed in chosen.items())]
    file = given.output / "results.csv"
    done = report.read(file)
    finished = set(done[["task", "network", "regime", "seed"]].itertuples(index=False, name=None))
    left = [each for each in wanted if dataclasses.astuple(each) not in finished]
    jobs = (delayed(run)(each, budget, given.cache) for each in left)
    given.output.mkdir(parents=True, exist_ok=True)
    for rows in track(Parallel(given.jobs, return_as="generator_unordered")(jobs), "trainings", total=len(left)):
        rows.to_csv(file, mode="a", header=not file.exists(), index=False)
    report.write(given.output)


if __name__ == "__main__":
    main()
