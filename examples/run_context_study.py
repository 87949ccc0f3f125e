"""Do crop and overview together say more than either alone? Trains and tests the networks, and writes the report.

    python examples/run_context_study.py                            # what `results.csv` does not have yet
    python examples/run_context_study.py --jobs 2 --tasks tissue    # two at a time, of one task
    python examples/run_context_study.py --quick --output FOLDER    # a small part, in a minute

Every training is one line of the plan: a task, a network and a seed. Its results are added to `results.csv` when it is
done, so that the study may be interrupted and goes on where it was. In the end what steps cost is measured, all
networks in turn in one process, for tasks that `times.csv` does not have: for that, leave the machine alone.
"""

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

from context_study import report
from context_study.experiments import Budget, Experiment, draw, run, time_steps
from context_study.networks import NETWORKS
from context_study.tasks import TASKS
from studies.results import carry_out, read

FOLDER = Path(__file__).parent / "context_study"
SEEDS = (0, 1, 2)
QUICK = {"networks": ["RAT, pyramid", "U-Net, overview in channels"], "tasks": ["tissue"], "seeds": [0]}


def plan(tasks: Sequence[str], networks: Sequence[str], seeds: Sequence[int]) -> list[Experiment]:
    """Returns all experiments, task by task and seed by seed."""
    return [
        Experiment(task, network, seed)
        for task, seed, network in itertools.product(tasks, seeds, networks)
        if task not in NETWORKS[network].without
    ]


def add_times(file: Path, tasks: Sequence[str], networks: Sequence[str], rounds: int, cache: Path) -> None:
    """Measures what steps cost, for the tasks that a file does not have."""
    done = set(read(file, ["task"])["task"])
    for task in tasks:
        if task not in done:
            able = [name for name in networks if task not in NETWORKS[name].without]
            time_steps(task, able, rounds, cache).to_csv(file, mode="a", header=not file.exists(), index=False)


def main() -> None:
    """Runs what is left of the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where results, pictures and the report go (context_study)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "rat_timm_study", help="for scenes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS)
    parser.add_argument("--jobs", type=int, default=1, help="experiments at a time, one core each")
    parser.add_argument("--device", default="cpu", help="where networks are trained and tested: cpu or cuda")
    parser.add_argument("--no-times", action="store_true", help="do not measure what steps cost")
    parser.add_argument("--quick", action="store_true", help="a few steps of few networks, which learn little")
    given = parser.parse_args()
    budget, rounds, output = Budget(), 10, given.output or FOLDER
    whole = {"networks": list(NETWORKS), "tasks": list(TASKS), "seeds": list(SEEDS)}
    if given.quick:
        if given.output is None:
            parser.error("--quick needs --output, so that its results are not taken for the study's")
        budget, rounds, whole = Budget(steps=0.01, scenes=0.01), 1, QUICK
    chosen = {name: getattr(given, name) or values for name, values in whole.items()}
    draw(chosen["tasks"], budget, given.cache, given.jobs)
    carry_out(
        plan(**chosen),
        functools.partial(run, budget=budget, cache=given.cache, device=given.device),
        output / "results.csv",
        report.COLUMNS,
        given.jobs,
    )
    if not given.no_times:
        add_times(output / "times.csv", chosen["tasks"], chosen["networks"], rounds, given.cache)
    report.write(output)


if __name__ == "__main__":
    main()
