"""The study's tables and pictures, from `results.csv` into `README.md` (between two marks) and `*.png`."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from scipy.stats import binomtest

COLUMNS = ["task", "network", "regime", "seed", "factor", "fixed", "control", "right", "count", "seconds"]
RAT, HIDDEN = ("rat, physical stem", "rat, physical stem, coarsened"), "rat, spacing hidden"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


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
    sections = [section for task, rows in results.groupby("task", sort=False) for section in _task(task, rows, folder)]
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
        yield f"**{_SETTINGS[fixed]}**"
        yield f"![Accuracy over pixel size]({name})"
        for regime, trained in part.groupby("regime", sort=False):
            yield f"Trained at {_REGIMES[regime]}:"
            yield table(trained).fillna("").to_markdown()
            for network in RAT:
                if network in set(trained["network"]):
                    yield f"`{network}` beside the best of the controls and itself without the pixel size, in points:"
                    yield compare(trained, network).to_markdown()


_SETTINGS = {
    "size": "Images of a fixed number of pixels (their field of view changes)",
    "field": "A fixed field of view (the number of pixels changes)",
}
_REGIMES = {"one": "one pixel size (1)", "two": "two pixel sizes (0.7, 1.4)", "mixed": "any pixel size from 0.5 to 2"}


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns percent right, per network and control, and pixel size: mean ± deviation of seeds (95% interval)."""
    label = rows["network"] + rows["control"].map(lambda control: f" / {control}" if control else "")
    cells = rows.assign(network=label).groupby(["network", "factor"], sort=False).apply(_cell, include_groups=False)
    return cells.unstack("factor").sort_index(axis=1)


def compare(rows: pd.DataFrame, network: str) -> pd.DataFrame:
    """Returns what a network loses to itself at the training spacing, and gains over others, per pixel size.

    Controls are the other families' networks, told the spacing in a channel, with resized images, or neither.
    """
    share = (100 * rows["right"] / rows["count"]).rename("share")
    means = share.groupby([rows["network"], rows["control"], rows["factor"]]).mean().unstack("factor")
    plain = means.xs("", level="control")
    ours, others = plain.loc[network], [name for name in plain.index if name.split(",")[0] not in ("rat", "plain rat")]
    controls = means[means.index.get_level_values("network").isin(others)]
    controls = controls[controls.index.get_level_values("control").isin(["", "resized"])]
    found = {"loss": ours[1.0] - ours}
    if (network, "cropped") in means.index:
        found["loss to the same field of view"] = means.loc[(network, "cropped")] - ours
    if HIDDEN in plain.index:
        found["gain over hidden spacing"] = ours - plain.loc[HIDDEN]
    if len(controls):
        found["gain over the best control"] = ours - controls.max()
        found["best control"] = controls.idxmax().map(" / ".join).str.removesuffix(" / ")
    return (
        pd.DataFrame(found).T.map(lambda value: value if isinstance(value, str) else f"{value:.1f}").replace("nan", "")
    )


def _cell(rows: pd.DataFrame) -> str:
    share = 100 * rows["right"] / rows["count"]
    interval = binomtest(int(rows["right"].sum()), int(rows["count"].sum())).proportion_ci(method="wilson")
    spread = f" ± {share.std():.1f}" if len(share) > 1 else ""
    return f"{share.mean():.1f}{spread} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def _draw(rows: pd.DataFrame, file: Path) -> None:
    regimes = list(rows["regime"].unique())
    figure, axes = plt.subplots(1, len(regimes), figsize=(6 * len(regimes), 5), sharey=True, squeeze=False)
    shown = rows[rows["control"].isin(["", "resized"])].assign(share=100 * rows["right"] / rows["count"])
    colours = {name: plt.get_cmap("tab20")(index) for index, name in enumerate(rows["network"].unique())}
    for axis, regime in zip(axes[0], regimes, strict=True):
        for (network, control), lines in shown[shown["regime"] == regime].groupby(["network", "control"], sort=False):
            mean = lines.groupby("factor")["share"].mean()
            style = {"linestyle": ":", "alpha": 0.6} if control else {"label": network}
            axis.plot(mean.index, mean, marker=".", color=colours[network], **style)
        axis.set(title=f"trained at {_REGIMES[regime]}", xlabel="pixel size / training pixel size", xscale="log")
        axis.set_xticks(sorted(rows["factor"].unique()), [f"{f:g}" for f in sorted(rows["factor"].unique())])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="right, % (dotted: resized to the training pixel size)", ylim=(0, 102))
    axes[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
