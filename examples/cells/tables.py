"""Writes what run.sh found as `results.csv`, and prints the table of README.md: means and deviations over seeds.

python examples/cells/tables.py FOLDER
"""

import sys
from pathlib import Path

import pandas as pd

KEYS = ["data", "network", "factor", "resized"]
FIGURES = ["ap50", "ap75", "ap", "pq"]


def gather(folder: Path) -> pd.DataFrame:
    """Returns a row for each run and condition."""
    parts = []
    for file in sorted(folder.glob("*-*-*/test/all.csv")):
        data, network, seed = file.parts[-3].split("-")
        parts.append(pd.read_csv(file).query("wrong == 1").assign(data=data, network=network, seed=int(seed)))
    return pd.concat(parts)[[*KEYS, "seed", *FIGURES]].sort_values([*KEYS, "seed"])


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """Returns percentages, "mean +- deviation", with a column for each factor of the pixel size."""
    by = results.groupby(KEYS)["ap50"]
    cells = (100 * by.mean()).round(1).astype(str) + " ± " + (100 * by.std()).round(1).astype(str)
    return cells.unstack("factor")


def main() -> None:
    """Reads the command line."""
    results = gather(Path(sys.argv[1]))
    results.round(4).to_csv(Path(__file__).with_name("results.csv"), index=False)
    print(summarize(results).to_string())


if __name__ == "__main__":
    main()
