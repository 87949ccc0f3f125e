"""Does knowing the pixel size help? Trains and tests all networks of the study, and writes the report.

    python examples/run_resolution_study.py                           # what `results.csv` does not have yet
    python examples/run_resolution_study.py --jobs 2 --tasks cells    # two at a time, of one task
    python examples/run_resolution_study.py --quick --output FOLDER   # a small part, in a minute

Every training is one line of the plan: a task, a network, a regime (at which pixel sizes it is trained) and a seed. Its
results are added to `results.csv` when it is done, so that the study may be interrupted and goes on where it was.
"""

import argparse
import functools
import itertools
from pathlib import Path

from resolution_study import report
from resolution_study.experiments import Budget, Experiment, run
from resolution_study.networks import COARSENED, FORMER, HIDDEN, NETWORKS, PEERS, RAT, TOLD
from resolution_study.tasks import REGIMES, TASKS
from studies.results import carry_out

FOLDER = Path(__file__).parent / "resolution_study"
SEEDS = (0, 1, 2)
# Where all images have one spacing, neither hiding nor resizing changes the training, and a channel says nothing.
PLAN = {
    ("cells", "one"): (
        TOLD,
        FORMER,
        *PEERS,
        "plain rat",
        RAT,
        "rat, physical kernel",
        "rat, pyramid",
        "rat, strided convolutions",
        COARSENED,
        "convnext, resized, coarsened",
        "swin, resized, coarsened",
    ),
    ("cells", "two"): (FORMER, HIDDEN, "convnext, channel", "convnext, resized"),
    ("cells", "mixed"): (
        FORMER,
        HIDDEN,
        *PEERS,
        "convnext, channel",
        "convnext, channel, longer",
        "convnext, resized",
        "swin, resized",
        RAT,
        "rat, log scaling",
        "rat, conditioned stem",
    ),
    ("photographs", "one"): (TOLD, COARSENED, FORMER, "convnext", "swin", "swin, resized, coarsened"),
    ("photographs", "mixed"): (FORMER, HIDDEN, "convnext, channel", "convnext, resized", "swin, resized"),
    ("cells in volumes", "one"): (TOLD, COARSENED, FORMER),
    ("cells in volumes", "mixed"): (FORMER, HIDDEN),
}


def plan(tasks: list[str]) -> list[Experiment]:
    """Returns all experiments, task by task and seed by seed."""
    return [
        Experiment(task, network, regime, seed)
        for task, seed in itertools.product(tasks, SEEDS)
        for (of, regime), networks in PLAN.items()
        for network in networks
        if of == task
    ]


def main() -> None:
    """Runs what is left of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where results, pictures and the report go (resolution_study)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rat_timm_study", help="for images")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time, one core each")
    parser.add_argument("--quick", action="store_true", help="one network that learns fast, for a short time")
    given = parser.parse_args()
    budget, wanted, output = Budget(), plan(given.tasks), given.output or FOLDER
    if given.quick:
        if given.output is None:
            parser.error("--quick needs --output, so that its results are not taken for the study's")
        budget = Budget(epochs=9, trained=0.3, tested=0.2, factors=(0.5, 1.0, 2.0), share=1.0)
        wanted = [Experiment("cells", "plain rat", "one", 0)]
    chosen = {"network": given.networks, "regime": given.regimes, "seed": given.seeds}
    wanted = [each for each in wanted if all(getattr(each, name) in allowed for name, allowed in chosen.items())]
    carry_out(
        wanted,
        functools.partial(run, budget=budget, cache=given.cache),
        output / "results.csv",
        report.COLUMNS,
        given.jobs,
    )
    report.write(output)


if __name__ == "__main__":
    main()
