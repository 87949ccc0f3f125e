"""The study's tables and pictures: from `results.csv` into `tables`, `*.png` and, between two marks, `README.md`."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import binomtest

import studies.results
from resolution_study.networks import COARSENED, FORMER, HIDDEN, NETWORKS, TOLD
from resolution_study.tasks import REGIMES, TASKS
from studies.results import put_into, spread

COLUMNS = ["task", "network", "regime", "seed", "setting", "factor", "control", "right", "count", "seconds", "answers"]
ORDER = {name: place for names in (TASKS, REGIMES, NETWORKS) for place, name in enumerate(names)}
TRAINED_AT = {"one": "one pixel size (1)", "two": "two pixel sizes (0.7, 1.4)", "mixed": "pixel sizes from 0.5 to 2"}
RATS = (TOLD, COARSENED, FORMER)  # those that are told, and compared with the controls
TOLD_WRONG = ("wrong spacing", "spacing hidden")
SAME_VIEW = "loss to the same field of view"
OVER_HIDDEN, OVER_BEST = "gain over itself, spacing hidden", "gain over the best control"

# networks in pictures, and how they are tested: the first that there is
PICTURED = {
    "RAT, told, half of training coarsened": [(COARSENED, "")],
    "RAT, told the pixel size": [(TOLD, ""), (FORMER, "")],
    "RAT, not told": [(HIDDEN, ""), (TOLD, "spacing hidden"), (FORMER, "spacing hidden")],
    "Swin, images resized": [("swin, resized", ""), ("swin", "resized")],
    "ConvNeXt, not told": [("convnext", "")],
}
POINTS = {
    "cells": "Told the pixel size, RAT holds from a quarter to four times of it",
    "photographs": "Photographs: told, networks lose 8 points at finer pixels, far more at coarser ones",
    "cells in volumes": "Volumes: told the voxel size, RAT holds to twice of it, if half of training is coarsened",
}
MARKERS = "osv^D<>x"

Answers = Mapping[tuple[str, str, float], pd.DataFrame]  # of a network, control and factor: seeds by images, 1 if right


class Points(NamedTuple):
    """A difference in percent.

    Attributes:
        mean: Over seeds and images.
        deviation: Of seeds, not a number where there is one.
        half: Half of the 95% interval that the choice of images leaves, which all seeds share.
    """

    mean: float
    deviation: float
    half: float

    def __str__(self) -> str:
        return f"{spread(self.mean, self.deviation)} ({self.mean - self.half:.0f} to {self.mean + self.half:.0f})"


def read(file: Path) -> pd.DataFrame:
    """Reads the results, none if there is no file."""
    return studies.results.read(file, COLUMNS, dtype={"answers": str})


def write(folder: Path) -> None:
    """Writes tables and pictures, and puts the summary into the report."""
    results = read(folder / "results.csv")
    if results.empty:
        return
    write_tables(results, folder)
    for task, rows in results[results["setting"] == "field"].groupby("task", sort=False):
        draw(rows, folder / f"{task}.png".replace(" ", "-"))


def write_tables(results: pd.DataFrame, folder: Path) -> None:
    """Writes the tables, and puts the summary into the report."""
    results = results.sort_values(["task", "regime", "network"], key=lambda names: names.map(ORDER), kind="stable")
    found = goals(results)
    (folder / "tables").mkdir(exist_ok=True)
    for name, rows in {"goals": found, **tables(results)}.items():
        rows.to_csv(folder / "tables" / f"{name}.csv", index=False)
    trainings = results.drop_duplicates(["task", "network", "regime", "seed"])["seconds"]
    sections = [f"{len(trainings)} trainings and their tests, {trainings.sum() / 3600:.1f} hours of one core."]
    sections += [found.to_markdown(index=False)] if len(found) else []
    put_into(folder / "README.md", sections)


def tables(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Returns what was measured, per pixel size, of all that was trained alike and is tested alike.

    They are ``right``, percent right of all networks; ``gains``, those of the RATs over the best control (see
    `compare`); and ``changes``, what changes to RATs change (see `changes`).
    """
    parts = {"right": [], "gains": [], "changes": []}
    for (task, setting, regime), rows in results.groupby(["task", "setting", "regime"], sort=False):
        where = {"task": task, "setting": setting, "trained at": TRAINED_AT[regime]}
        told = [name for name in RATS if name in set(rows["network"])]
        parts["right"].append(_labelled(table(rows), where, "network"))
        parts["gains"] += [_labelled(compare(rows, name), {**where, "network": name}, "points") for name in told]
        parts["changes"].append(_labelled(changes(rows), where, "change"))
    return {name: pd.concat([part for part in each if len(part)] or each[:1]) for name, each in parts.items() if each}


def _labelled(rows: pd.DataFrame, where: Mapping[str, str], index: str) -> pd.DataFrame:
    """Returns a table with what it is a table of in its first columns."""
    named = rows.fillna("").rename_axis(index=index, columns=None).reset_index()
    return pd.concat([pd.DataFrame([where] * len(named)), named], axis=1)


def goals(results: pd.DataFrame) -> pd.DataFrame:
    """Returns what was asked for, with a fixed field of view: losses and gains beyond the training pixel sizes."""
    rows = []
    for (task, regime), part in results[results["setting"] == "field"].groupby(["task", "regime"], sort=False):
        for network in (name for name in RATS if name in set(part["network"])):
            found = differences(part, network)
            finest, coarsest = min(REGIMES[regime]), max(REGIMES[regime])
            losses = {
                f"loss {by}x {way}": found["loss"].get(at, "")
                for by in (2, 4)
                for way, at in (("finer", finest / by), ("coarser", coarsest * by))
            }
            gains = {
                f"least {name}": min((by for at, by in found[name].items() if not finest <= at <= coarsest), default="")
                for name in (OVER_HIDDEN, OVER_BEST)
                if name in found
            }
            rows.append({"task": task, "trained at": TRAINED_AT[regime], "network": network, **losses, **gains})
    return pd.DataFrame(rows).fillna("").map(str)


def compare(rows: pd.DataFrame, network: str) -> pd.DataFrame:
    """Returns percent right, `differences`, and which control is the best, per pixel size."""
    mine = table(rows[(rows["network"] == network) & (rows["control"] == "")])
    differing = pd.DataFrame(differences(rows, network)).T.map(lambda by: "" if by != by else str(by))
    best = best_controls(rows, network)
    named = pd.DataFrame({"the best control": {at: _label(who) for at, who in best.items()}}).T
    return pd.concat([mine.set_axis(["right"]), differing, *([named] if best else [])])


def differences(rows: pd.DataFrame, network: str) -> dict[str, dict[float, Points]]:
    """Returns what a network loses to itself at training pixel sizes, and gains over others, per pixel size."""
    answers = read_answers(rows)
    ours = {at: right for (name, control, at), right in answers.items() if (name, control) == (network, "")}
    seen = REGIMES[rows["regime"].iloc[0]]
    at_seen = [right for at, right in ours.items() if min(seen) <= at <= max(seen)]
    trained = sum(at_seen) / len(at_seen)
    cropped = {at: right for (name, control, at), right in answers.items() if (name, control) == (network, "cropped")}
    best = best_controls(rows, network)
    found = {
        "loss": {at: points(trained, right) for at, right in ours.items()},
        SAME_VIEW: {at: points(right, ours[at]) for at, right in cropped.items()},
        OVER_HIDDEN: {} if NETWORKS[network].coarsened else _over(answers, ours, dict.fromkeys(ours, (HIDDEN, ""))),
        OVER_BEST: _over(answers, ours, best),
    }
    if not found[OVER_HIDDEN] and not NETWORKS[network].coarsened:  # where both would be trained alike
        found[OVER_HIDDEN] = _over(answers, ours, dict.fromkeys(ours, (network, "spacing hidden")))
    return {name: values for name, values in found.items() if values}


def _over(
    answers: Answers, ours: Mapping[float, pd.DataFrame], theirs: Mapping[float, tuple[str, str]]
) -> dict[float, Points]:
    return {at: points(ours[at], answers[(*who, at)]) for at, who in theirs.items() if (*who, at) in answers}


def best_controls(rows: pd.DataFrame, network: str) -> dict[float, tuple[str, str]]:
    """Returns the best network of another family at each pixel size, by these very tests, and how it is tested.

    It may be told the spacing in a channel, be shown resized images, or neither, and is coarsened if the network is.
    """
    mine = NETWORKS[network].coarsened
    others = [name for name, other in NETWORKS.items() if not other.is_rat and other.coarsened == mine]
    chosen = rows[rows["network"].isin(others) & rows["control"].isin(["", "resized"])]
    shares = (
        (chosen["right"] / chosen["count"]).groupby([chosen["factor"], chosen["network"], chosen["control"]]).mean()
    )
    return {at: each.idxmax()[1:] for at, each in shares.groupby("factor")}


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what changes to networks of this package change, and wrong spacings, per pixel size."""
    answers = read_answers(rows)
    pairs = {(name, ""): (network.changed, "") for name, network in NETWORKS.items()}
    pairs |= {(name, control): (name, "") for name in (TOLD, FORMER) for control in TOLD_WRONG}
    found = {}
    for who, base in pairs.items():
        ours = {at: answers[(*who, at)] for at in rows["factor"].unique() if (*who, at) in answers}
        over = _over(answers, ours, dict.fromkeys(ours, base))
        if over:
            found[f"{_label(who)} - {base[0]}"] = {at: str(by) for at, by in over.items()}
    return pd.DataFrame(found).T


def read_answers(rows: pd.DataFrame) -> Answers:
    """Returns which images are right, as 0 or 1: seeds by images, of each network, control and factor."""
    return {
        key: pd.DataFrame(
            np.stack(
                [
                    np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[:count]
                    for bits, count in zip(each["answers"], each["count"], strict=True)
                ]
            ),
            index=each["seed"],
        )
        for key, each in rows.groupby(["network", "control", "factor"])
    }


def points(one: pd.DataFrame, other: pd.DataFrame) -> Points:
    """Returns by how many percent more of the same images one is right than another, over the seeds of both."""
    seeds = one.index.intersection(other.index)
    difference = 100 * (one.loc[seeds].astype(float) - other.loc[seeds])
    half = 1.96 * difference.mean(axis=0).std() / np.sqrt(difference.shape[1])
    return Points(float(difference.to_numpy().mean()), float(difference.mean(axis=1).std()), float(half))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns percent right, per network and control, and pixel size: mean ± deviation of seeds (95% interval)."""
    label = rows["network"] + rows["control"].map(lambda control: f" / {control}" if control else "")
    cells = rows.assign(network=label).groupby(["network", "factor"], sort=False).apply(_cell, include_groups=False)
    return cells.unstack("factor").sort_index(axis=1)


def _cell(rows: pd.DataFrame) -> str:
    share = 100 * rows["right"] / rows["count"]
    # all seeds are tested on the same images, so that more seeds do not make the interval narrower
    interval = binomtest(round(rows["right"].mean()), int(rows["count"].iloc[0])).proportion_ci(method="wilson")
    return f"{spread(share.mean(), share.std())} ({100 * interval.low:.0f} to {100 * interval.high:.0f})"


def _label(who: tuple[str, str]) -> str:
    return " / ".join(who).removesuffix(" / ")


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draws what is right over the pixel size, trained at one and at nine: the networks that answer the question."""
    regimes = [regime for regime in ("one", "mixed") if regime in set(rows["regime"])]
    figure, axes = plt.subplots(
        1, len(regimes), figsize=(5.5 * len(regimes), 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    shares = rows.assign(share=100 * rows["right"] / rows["count"]).groupby(["regime", "network", "control", "factor"])
    mean, spread = shares["share"].mean(), shares["share"].std().fillna(0)
    handles = {}
    for axis, regime in zip(axes[0], regimes, strict=True):
        for index, (label, candidates) in enumerate(PICTURED.items()):
            who = next((who for who in candidates if (regime, *who) in mean.index.droplevel("factor")), None)
            if who is None:
                continue
            y, deviation = mean[(regime, *who)], spread[(regime, *who)]
            told = {"linewidth": 3, "zorder": 3} if index == 0 else {"linewidth": 1.5}
            (handles[label],) = axis.plot(y.index, y, marker=MARKERS[index], color=f"C{index}", **told)
            axis.fill_between(y.index, y - deviation, y + deviation, color=f"C{index}", alpha=0.12, linewidth=0)
        axis.set(title=f"trained at {TRAINED_AT[regime]}", xlabel="pixel size / training pixel size", xscale="log")
        axis.axvspan(min(REGIMES[regime]) / 1.03, max(REGIMES[regime]) * 1.03, color="black", alpha=0.07, linewidth=0)
        axis.axhline(100 / TASKS[rows["task"].iloc[0]].classes, color="black", linestyle=":", linewidth=1)
        axis.set_xticks(sorted(rows["factor"].unique()), [f"{f:g}" for f in sorted(rows["factor"].unique())])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="right, % of test images (dotted: chance)", ylim=(0, 102))
    figure.suptitle(POINTS.get(rows["task"].iloc[0], ""))
    figure.legend(handles.values(), handles, ncols=min(3, max(1, len(handles))), loc="outside lower center")
    figure.savefig(file, dpi=100)
    plt.close(figure)
