"""Draws how good layouts of `rat_tiny` are on real cells over how fast they are; see benchmarks.md.

    python examples/layouts.py --output layouts.png

`layouts.csv` has the numbers: speed in inference over Swin-T, and mean AP over IoUs of 0.5 to 0.95 of three seeds, of
networks 32 wide (`cells/README.md`).
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

COLOURS = {"HeLa": "tab:blue", "bacteria": "tab:orange"}
STYLES = {"pixels": "o--", "contrast": "s-"}


def draw(measured: pd.DataFrame, file: Path) -> None:
    """Draws one line for each movie and kind of detail."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for (data, detail), line in measured.groupby(["data", "detail"]):
        axes.errorbar(
            line["speed"],
            line["ap"],
            line["deviation"],
            fmt=STYLES[detail],
            color=COLOURS[data],
            capsize=3,
            label=f"{data}, detail sees {detail}",
        )
    for layout, speed in measured.drop_duplicates("layout")[["layout", "speed"]].itertuples(index=False):
        axes.annotate(layout, (speed, 50), ha="center", fontsize=9)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="images per second over Swin-T's (inference, two cores)", ylabel="AP, percent", xlim=(0.6, 1.2))
    axes.set(ylim=(20, 95), title="Fewer blocks cost no quality that shows; what detail sees does")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draws what `layouts.csv` has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="picture")
    draw(pd.read_csv(Path(__file__).with_suffix(".csv")), parser.parse_args().output)


if __name__ == "__main__":
    main()
