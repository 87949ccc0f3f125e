"""The study's tables and pictures, from `results.csv` into `README.md` (between two marks) and `*.png`."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import binomtest

COLUMNS = ["task", "network", "regime", "seed", "factor", "fixed", "control", "right", "count", "seconds"]
RAT, COARSENED, HIDDEN = "rat, physical stem", "rat, physical stem, coarsened", "rat, spacing hidden"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SETTINGS = {
    "size": "a fixed number of pixels, so that the field of view changes",
    "field": "a fixed field of view, so that the number of pixels changes",
}
REGIMES = {"one": "one pixel size (1)", "two": "two pixel sizes (0.7, 1.4)", "mixed": "any pixel size from 0.5 to 2"}
SEEN = {"one": (1.0, 1.0), "two": (0.7, 1.4), "mixed": (0.5, 2.0)}  # the finest and the coarsest
KNOWN_WRONG = ("wrong spacing", "spacing hidden")
SAME_VIEW = "loss to the same field of view"
OVER_HIDDEN, OVER_BEST = "gain over itself, spacing hidden", "gain over the best of controls"


def read(file: Path) -> pd.DataFrame:
    """Reads the results, none if there is no file."""
    if not file.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(file, keep_default_na=False)


def write(folder: Path) -> None:
    """Draws the pictures and puts the tables into the report."""
    results = read(folder / "results.csv")
    if results.empty:
        return
    results["share"] = 100 * results["right"] / results["count"]
    sections = ["### At a glance, in points", goals(results).to_markdown(index=False, floatfmt=".1f", missingval="")]
    for task, rows in results.groupby("task", sort=False):
        sections += _task(task, rows, folder)
    file = folder / "README.md"
    text = file.read_text() if file.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    file.write_text(before + BEGIN + "\n\n" + "\n\n".join(sections) + "\n\n" + END + rest.partition(END)[2])


def _task(task: str, rows: pd.DataFrame, folder: Path) -> Iterator[str]:
    """Yields the sections of a task."""
    yield f"### {task[0].upper()}{task[1:]}"
    seconds = rows.drop_duplicates(["network", "regime", "seed"])["seconds"]
    yield f"{len(seconds)} trainings, {seconds.sum() / 3600:.1f} hours on one core; {rows['count'].max()} test images."
    for fixed, part in rows.groupby("fixed", sort=False):
        name = f"{task}-{fixed}.png".replace(" ", "-")
        _draw(part, folder / name)
        yield f"**With {SETTINGS[fixed]}**"
        yield f"![Accuracy over pixel size]({name})"
        for regime, trained in part.groupby("regime", sort=False):
            yield from _regime(regime, trained)


def _regime(regime: str, rows: pd.DataFrame) -> Iterator[str]:
    """Yields the tables of what was trained alike and is tested alike."""
    for network in (RAT, COARSENED):
        if network in set(rows["network"]):
            yield f"Trained at {REGIMES[regime]}: `{network}`, in points"
            yield compare(rows, network).to_markdown()
    if RAT in set(rows["network"]):
        yield f"Trained at {REGIMES[regime]}: other RATs beside `{RAT}`, in points"
        yield changes(rows).to_markdown()
    yield f"<details><summary>Trained at {REGIMES[regime]}: all networks, percent right</summary>"
    yield table(rows).fillna("").to_markdown()
    yield "</details>"


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns percent right, per network and control, and pixel size: mean ± deviation of seeds (95% interval)."""
    label = rows["network"] + rows["control"].map(lambda control: f" / {control}" if control else "")
    cells = rows.assign(network=label).groupby(["network", "factor"], sort=False).apply(_cell, include_groups=False)
    return cells.unstack("factor").sort_index(axis=1)


def _cell(rows: pd.DataFrame) -> str:
    # all seeds are tested on the same images, so that more seeds do not make the interval of these narrower
    interval = binomtest(round(rows["right"].mean()), int(rows["count"].iloc[0])).proportion_ci(method="wilson")
    return f"{_spread(rows['share'])} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def _spread(values: pd.Series) -> str:
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{deviation}"


def goals(results: pd.DataFrame) -> pd.DataFrame:
    """Returns what the study asked for, in points: losses beyond the training pixel sizes, and the least gains there.

    Where a finer pixel size takes field of view, the loss is the one to images of pixel size 1 with the same view.
    """
    rows = []
    for (task, fixed, regime), part in results.groupby(["task", "fixed", "regime"], sort=False):
        for network in [name for name in (RAT, COARSENED) if name in set(part["network"])]:
            points = pd.DataFrame({name: seeds.mean() for name, seeds in differences(part, network).items()}).T
            finest, coarsest = SEEN[regime]
            loss = points.loc["loss"].where(points.columns > 1, points.loc[SAME_VIEW if fixed == "size" else "loss"])
            unseen = points.columns[(points.columns < finest) | (points.columns > coarsest)]
            found = {f"loss {by}x {way}": loss.get(at) for by, way, at in _beyond(finest, coarsest)}
            gains = {
                f"least {name}": points.loc[name, unseen].min()
                for name in (OVER_HIDDEN, OVER_BEST)
                if name in points.index
            }
            rows.append({"task": task, "fixed": fixed, "trained at": regime, "network": network, **found, **gains})
    return pd.DataFrame(rows)


def _beyond(finest: float, coarsest: float) -> list[tuple[int, str, float]]:
    return [(by, way, at) for by in (2, 4) for way, at in (("finer", finest / by), ("coarser", coarsest * by))]


def compare(rows: pd.DataFrame, network: str) -> pd.DataFrame:
    """Returns `differences` as mean ± deviation of seeds, and which control is the best."""
    points = pd.DataFrame({name: seeds.apply(_of_seeds) for name, seeds in differences(rows, network).items()}).T
    means = controls(rows)
    if len(means):
        points.loc["the best of controls"] = means.idxmax().map(_label)
    return points


def differences(rows: pd.DataFrame, network: str) -> dict[str, pd.DataFrame]:
    """Returns what a network gets right, loses to itself at pixel size 1, and gains over others, seeds by pixel sizes.

    Of `controls`, one is the best at a pixel size, chosen by these very tests; another is the best on average.
    """
    shares = rows.set_index(["network", "control", "factor", "seed"])["share"].unstack("factor")
    ours = shares.loc[(network, "")]
    found = {"right": ours, "loss": ours.rsub(ours[1.0], axis=0)}
    if (network, "cropped") in shares.index:
        found[SAME_VIEW] = shares.loc[(network, "cropped")] - ours
    for hidden in [(HIDDEN, ""), (RAT, "spacing hidden")]:  # the second stands in where both are trained alike
        if hidden in shares.index:
            found.setdefault(OVER_HIDDEN, ours - shares.loc[hidden])
    means = controls(rows)
    if len(means):
        average = means.mean(axis=1).idxmax()
        found[f"gain over {_label(average)}"] = ours - shares.loc[average]
        found[OVER_BEST] = pd.DataFrame(
            {factor: ours[factor] - shares[factor].loc[label] for factor, label in means.idxmax().items()}
        )
    return found


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what other RATs, and wrong spacings, change: what is right less what is right as it should be."""
    shares = rows.set_index(["network", "control", "factor", "seed"])["share"].unstack("factor")
    ours, found = shares.loc[(RAT, "")], {}
    for network, control in dict.fromkeys(shares.index.droplevel("seed")):
        if (network != RAT and "rat" in network and not control) or (network == RAT and control in KNOWN_WRONG):
            found[_label((network, control))] = (shares.loc[(network, control)] - ours).apply(_of_seeds)
    return pd.DataFrame(found).T


def controls(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean share of other families' networks per pixel size: told it in a channel, resized, or neither."""
    family = rows["network"].str.split(",").str[0]
    chosen = rows[~family.isin(["rat", "plain rat"]) & rows["control"].isin(["", "resized"])]
    return chosen.groupby(["network", "control", "factor"])["share"].mean().unstack("factor")


def _label(parts: tuple[str, str]) -> str:
    return " / ".join(parts).removesuffix(" / ")


def _of_seeds(values: pd.Series) -> str:
    return "" if values.dropna().empty else _spread(values.dropna())


def _draw(rows: pd.DataFrame, file: Path) -> None:
    regimes = list(rows["regime"].unique())
    figure, axes = plt.subplots(1, len(regimes), figsize=(6 * len(regimes), 5), sharey=True, squeeze=False)
    colours = {name: plt.get_cmap("tab20")(index) for index, name in enumerate(rows["network"].unique())}
    shown = rows[rows["control"].isin(["", "resized"])]
    for axis, regime in zip(axes[0], regimes, strict=True):
        for (network, control), lines in shown[shown["regime"] == regime].groupby(["network", "control"], sort=False):
            mean = lines.groupby("factor")["share"].mean()
            style = {"linestyle": ":", "alpha": 0.6} if control else {"label": network}
            axis.plot(mean.index, mean, marker=".", color=colours[network], **style)
        axis.set(title=f"trained at {REGIMES[regime]}", xlabel="pixel size / training pixel size", xscale="log")
        axis.set_xticks(sorted(rows["factor"].unique()), [f"{f:g}" for f in sorted(rows["factor"].unique())])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="right, % (dotted: resized to the training pixel size)", ylim=(0, 102))
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
