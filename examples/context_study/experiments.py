"""An experiment: a network is trained on a task, and tested as it is and under every condition that it can be."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from context_study.conditions import CONDITIONS
from context_study.networks import NETWORKS, Network, count_cost
from context_study.tasks import TASKS, Scenes, Task, held_out_scenes, training_scenes
from context_study.views import Batch, Chosen, choose, show
from training.engines import TorchEngine
from training.steps import Recipe, fit, one_cycle

AT_ONCE = 1 << 23  # pixels of whole fields of view in a batch of a test, at most


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training.

    Attributes:
        task: Name of a task.
        network: Name of a network.
        seed: Of the weights, and of which crops are trained on.
    """

    task: str
    network: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of a task is trained and tested, as shares of what the task says."""

    steps: float = 1.0
    scenes: float = 1.0
    conditions: tuple[str, ...] = tuple(CONDITIONS)

    def training(self, task: Task) -> int:
        """Returns the number of scenes to train on."""
        return max(2, round(task.training * self.scenes))

    def test(self, task: Task) -> int:
        """Returns the number of scenes to test on."""
        return max(2, round(task.test * self.scenes))


def draw(tasks: Sequence[str], budget: Budget, cache: Path, jobs: int) -> None:
    """Draws the scenes of tasks that are not drawn yet, several at a time."""
    for name in tasks:
        training_scenes(name, budget.training(TASKS[name]), cache, jobs)
        held_out_scenes(name, budget.test(TASKS[name]), cache, jobs)


def run(experiment: Experiment, budget: Budget, cache: Path, device: str = "cpu") -> pd.DataFrame:
    """Trains and tests; returns one row per condition.

    ``confusion`` has, true class by true class, how many pixels of it were said to be of each; ``seconds`` is CPU time
    of all of it.
    """
    torch.set_num_threads(1)
    began = time.process_time()
    rows = list(evaluate(train(experiment, budget, cache, device), experiment, budget, cache, device))
    seconds = round(time.process_time() - began)
    return pd.DataFrame(rows).assign(**dataclasses.asdict(experiment), seconds=seconds)


def train(experiment: Experiment, budget: Budget, cache: Path, device: str = "cpu") -> nn.Module:
    """Trains a network."""
    task, network = TASKS[experiment.task], NETWORKS[experiment.network]
    scenes = training_scenes(experiment.task, budget.training(task), cache)
    steps = max(2, round(task.steps * budget.steps))
    torch.manual_seed(experiment.seed)
    engine = create_engine(network, task, device)
    batches = itertools.islice(draw_batches(task, network, scenes, experiment.seed), steps)
    fit(
        engine,
        (batch.to(device) for batch in batches),
        one_cycle(engine.optimizer, network.lr, steps, warmup=0.15),
    )
    return engine.module.eval()


def create_engine(network: Network, task: Task, device: str = "cpu") -> TorchEngine:
    """Returns what takes the steps of a new network."""
    return TorchEngine(
        network.create(task).to(device),
        lambda model: AdamW(model.parameters(), lr=network.lr, weight_decay=0.05, fused=True),
        Recipe(lambda model, batch: model(batch), _loss),
        device,
    )


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits, batch.target)


def draw_batches(task: Task, network: Network, scenes: Scenes, seed: int) -> Iterator[Batch]:
    """Yields batches of crops at random; those of a seed are the same for all networks, but for how many there are."""
    for step in itertools.count():
        rng = np.random.default_rng([seed, step])
        scene = rng.integers(0, len(scenes.images), task.batch)
        chosen = choose(task, scenes.labels, scene, rng)
        mirrored = (rng.random(len(task.size)) < 0.5) & task.flips
        few = max(1, round(task.batch * network.at_once))
        chosen = chosen._replace(scene=chosen.scene[:few], corner=chosen.corner[:few])
        yield show(task, scenes, chosen, network.views, int(rng.integers(1 << 31)), mirrored.tolist())


@torch.inference_mode()
def evaluate(
    model: nn.Module, experiment: Experiment, budget: Budget, cache: Path, device: str = "cpu"
) -> Iterator[dict[str, str]]:
    """Yields the confusion of classes under each condition."""
    task = TASKS[experiment.task]
    scenes = held_out_scenes(experiment.task, budget.test(task), cache)
    for name in budget.conditions:
        if not CONDITIONS[name].why_not(experiment.network):
            confusion = confuse(model, task, scenes, experiment.network, name, device)
            yield {"condition": name, "confusion": " ".join(map(str, confusion.flatten().tolist()))}


def confuse(model: nn.Module, task: Task, scenes: Scenes, network: str, condition: str, device: str = "cpu") -> Tensor:
    """Returns how many pixels of each class (rows) were said to be of each (columns): the same crops for all."""
    changed, count = CONDITIONS[condition], len(task.classes)
    confusion = torch.zeros(count * count, dtype=torch.int64)
    for place, chosen in enumerate(choose_for_tests(task, scenes)):
        views = changed.views or NETWORKS[network].views
        batch = changed.change(task, show(task, scenes, chosen, views, place, [False] * len(task.size)))
        said = model(batch.to(device)).argmax(1).cpu()
        confusion += torch.bincount((batch.target * count + said).flatten(), minlength=count * count)
    return confusion.view(count, count)


def choose_for_tests(task: Task, scenes: Scenes) -> list[Chosen]:
    """Returns the crops that all networks are tested on, in batches."""
    scene = np.arange(len(scenes.images)).repeat(task.crops)
    size = max(1, min(32, AT_ONCE // int(np.prod(task.field))))
    return [
        choose(task, scenes.labels, scene[begin : begin + size], np.random.default_rng(begin))
        for begin in range(0, len(scene), size)
    ]


def time_steps(task: str, networks: Sequence[str], rounds: int, cache: Path) -> pd.DataFrame:
    """Returns what a step costs, all networks in turn: the median over rounds, in ms of one core, and what it is over.

    Columns: task, network, parameters, multiplications of one crop, crops in a step, ms in a step, ms per crop.
    """
    torch.set_num_threads(1)
    known = TASKS[task]
    scenes = training_scenes(task, 2, cache)
    engines, batches = {}, {}
    for name in networks:
        engines[name] = create_engine(NETWORKS[name], known)
        batches[name] = next(draw_batches(known, NETWORKS[name], scenes, 0))
    taken: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(rounds + 1):
        for name in networks:
            began = time.process_time()
            engines[name].step(batches[name])
            taken[name].append(1000 * (time.process_time() - began))
    rows = []
    for name in networks:
        parameters, macs = count_cost(NETWORKS[name], known)
        crops, ms = len(batches[name].target), float(np.median(taken[name][1:]))
        numbers = {"parameters": parameters, "multiplications": macs, "crops": crops}
        rows.append({"task": task, "network": name, **numbers, "ms": round(ms), "ms per crop": round(ms / crops, 1)})
    return pd.DataFrame(rows)
