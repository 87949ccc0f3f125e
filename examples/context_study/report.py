"""The study's tables and pictures: from `results.csv` and `times.csv` into `tables`, `*.png` and `README.md`."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

import studies.results
from context_study.conditions import CONDITIONS
from context_study.networks import CHANNELS, MUVIT, MUVIT_ADDED, NETWORKS, OURS
from context_study.tasks import TASKS
from studies.results import put_into

COLUMNS = ["task", "network", "seed", "condition", "confusion", "seconds"]
LEVELS = ("RAT, crop", "RAT, overview")
RIVALS = (*LEVELS, MUVIT, CHANNELS, "plain RAT, pyramid", MUVIT_ADDED)
SHIFTS = ("", "half a crop off", "a crop off")
# lines of the picture: at most five
PICTURED = (OURS, "plain RAT, pyramid", MUVIT, CHANNELS)
# what a task's picture shows, in a sentence, once it is known
POINTS = {
    "tissue": "Context added by position decides, and only where it is said to be",
    "brain": "The overview says where in the head a crop is, if it is added by position",
}
MARKERS = "osv^D"


def read(file: Path) -> pd.DataFrame:
    """Reads the results, none if there is no file."""
    return studies.results.read(file, COLUMNS)


def write(folder: Path) -> None:
    """Writes tables and pictures, and puts the summary into the report."""
    results = read(folder / "results.csv")
    if results.empty:
        return
    results = measured(results)
    write_tables(results, folder)
    for task, rows in results.groupby("task", sort=False):
        draw(str(task), rows, folder / f"{task}.png".replace(" ", "-"))


def measured(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the results with what follows of the confusion: ``iou`` and ``right``, in percent.

    ``iou`` is the mean over classes of which there are pixels, ``right`` the share of pixels.
    """
    tables = [confusion_of(text) for text in results["confusion"]]
    order = {name: place for place, name in enumerate((*TASKS, *NETWORKS, *CONDITIONS))}
    found = results.assign(
        iou=[100 * mean_iou(table) for table in tables],
        right=[100 * np.trace(table) / table.sum() for table in tables],
    )
    return found.sort_values(["task", "network", "condition"], key=lambda names: names.map(order), kind="stable")


def confusion_of(text: str) -> np.ndarray:
    """Reads what `experiments.evaluate` writes: true classes by said classes."""
    numbers = np.array(text.split(), np.int64)
    count = round(len(numbers) ** 0.5)
    return numbers.reshape(count, count)


def mean_iou(confusion: np.ndarray) -> float:
    """Returns the intersection over union, averaged over the classes that there are."""
    both = np.diag(confusion)
    there = confusion.sum(axis=1) > 0
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return float(np.mean(both[there] / either[there]))


def interval(values: Sequence[float]) -> str:
    """Writes a mean and its 95% interval over seeds (Student's t)."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return f"{mean:.1f}"
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return f"{mean:.1f} ({mean - half:.1f} to {mean + half:.1f})"


def write_tables(results: pd.DataFrame, folder: Path) -> None:
    """Writes the tables, and puts the summary into the report."""
    tables = {
        "iou": table(results, "iou"),
        "right": table(results, "right"),
        "gains": gains(results),
        "conditions": conditions(results),
        "impossible": impossible(),
    }
    file = folder / "times.csv"
    if file.exists():
        tables["times"] = times(pd.read_csv(file))
    (folder / "tables").mkdir(exist_ok=True)
    for name, rows in tables.items():
        rows.to_csv(folder / "tables" / f"{name}.csv", index=False)
    trainings = results.drop_duplicates(["task", "network", "seed"])["seconds"]
    sections = [f"{len(trainings)} trainings and their tests, {trainings.sum() / 3600:.1f} hours of one core."]
    shown = ("iou", "gains", "conditions", "times")
    titles = {
        "iou": "Mean IoU in percent, as in training (95% interval over seeds):",
        "gains": "Points of mean IoU by which RAT on the pyramid is ahead, seed by seed:",
        "conditions": "Mean IoU in percent, and the points it differs by from that as in training:",
        "times": "What a step of training costs, all networks in turn in one run, on one core:",
    }
    for name in shown:
        if name in tables and len(tables[name]):
            sections += [titles[name], tables[name].to_markdown(index=False)]
    put_into(folder / "README.md", sections)


def table(results: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Returns a figure of all networks as they were trained, task by task."""
    trained = results[results["condition"] == ""]
    cells = trained.groupby(["network", "task"], sort=False)[figure].apply(interval).unstack("task")
    cells = cells.reindex(index=_known(NETWORKS, cells.index), columns=_known(TASKS, cells.columns))
    return cells.fillna("").rename_axis(columns=None).reset_index()


def gains(results: pd.DataFrame) -> pd.DataFrame:
    """Returns by how much RAT on the pyramid is ahead of others, of the same seeds."""
    trained = results[results["condition"] == ""].set_index(["task", "network", "seed"])["iou"]
    rows = []
    for task in _known(TASKS, trained.index.get_level_values("task")):
        networks = set(trained[task].index.get_level_values("network"))
        for rival in RIVALS if OURS in networks else ():
            if rival in networks:
                ahead = (trained[task][OURS] - trained[task][rival]).dropna()
                rows.append({"task": task, "ahead of": rival, "points": interval(ahead), "seeds": len(ahead)})
    return pd.DataFrame(rows, columns=["task", "ahead of", "points", "seeds"])


def conditions(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean IoU under each condition, with what is lost or gained, of networks that have several images."""
    rows = []
    for (task, network), part in results.groupby(["task", "network"], sort=False):
        if len(NETWORKS[network].views) == 1:
            continue
        row = {"task": task, "network": network}
        trained = part[part["condition"] == ""].set_index("seed")["iou"]
        for name, each in part.groupby("condition", sort=False):
            changed = each.set_index("seed")["iou"]
            difference = (changed - trained).mean()
            row[name or "as in training"] = f"{changed.mean():.1f}" + (f" ({difference:+.1f})" if name else "")
        rows.append(row)
    names = ["task", "network", "as in training", *list(CONDITIONS)[1:]]
    found = pd.DataFrame(rows)
    return found.reindex(columns=[name for name in names if name in found.columns]).fillna("-")


def impossible() -> pd.DataFrame:
    """Returns which network can not be tested under which condition, and why."""
    rows = [
        {"network": network, "condition": name, "why": condition.why_not(network)}
        for network, known in NETWORKS.items()
        if len(known.views) > 1
        for name, condition in CONDITIONS.items()
        if condition.why_not(network)
    ]
    return pd.DataFrame(rows)


def times(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what steps cost, beside MuViT's where it is there."""
    parts = []
    for _, part in rows.groupby("task", sort=False):
        base = part[part["network"] == MUVIT]["ms per crop"]
        ratio = (part["ms per crop"] / base.iloc[0]).round(2) if len(base) else ""
        parts.append(part.assign(**{"over MuViT's": ratio}))
    return pd.concat(parts)


def _known(order: Sequence[str], names: Sequence[str]) -> list[str]:
    there = set(names)
    return [name for name in order if name in there]


def draw(task: str, rows: pd.DataFrame, file: Path) -> None:
    """Draws the mean IoU over how far the overview is said to be from where it is; dotted: RAT without it."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for place, network in enumerate(name for name in PICTURED if name in set(rows["network"])):
        part = rows[(rows["network"] == network) & rows["condition"].isin(SHIFTS)]
        mean = (
            part.groupby("condition")["iou"].mean().reindex([name for name in SHIFTS if name in set(part["condition"])])
        )
        shift = [SHIFTS.index(name) / 2 for name in mean.index]
        axis.plot(shift, mean, marker=MARKERS[place], label=network, linewidth=3 if network == OURS else 1.5)
    alone = rows[(rows["network"] == LEVELS[0]) & (rows["condition"] == "")]["iou"]
    if len(alone):
        axis.axhline(alone.mean(), color="black", linestyle=":", label="RAT, crop alone")
    axis.set(
        xlabel="overview said to be elsewhere, by so many crops",
        ylabel="mean IoU, %",
        ylim=(0, 100),
        xticks=[0, 0.5, 1],
        title=POINTS.get(task, task),
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=100)
    plt.close(figure)
