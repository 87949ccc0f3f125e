"""Writes what run.sh found as `results.csv`, and prints the tables of README.md: ``python tables.py FOLDER``."""

import sys
from pathlib import Path

import pandas as pd

KEYS = ["data", "network", "resized", "factor"]
FIGURES = ["ap50", "ap75", "ap", "pq", "iou"]


def gather(folder: Path) -> pd.DataFrame:
    """Returns a row for each run and condition."""
    parts = []
    for file in sorted(folder.glob("*-*-*/test/all.csv")):
        data, network, seed = file.parts[-3].split("-")
        found = pd.read_csv(file).query("wrong == 1")
        if "pq" in found:  # a network for instances
            parts.append(found.assign(data=data, network=network, seed=int(seed)))
    results = pd.concat(parts)
    # the panoptic quality over TP / (TP + FP / 2 + FN / 2), which is the mean IoU of objects that were found
    results["iou"] = results.pq * (1 + results.ap50) / (2 * results.ap50)
    return results[[*KEYS, "seed", *FIGURES]].sort_values([*KEYS, "seed"])


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean and the deviation over seeds, in percent."""
    by = results.groupby(KEYS)[FIGURES]
    return (100 * by.mean()).round(1).astype(str) + " ± " + (100 * by.std()).round(1).astype(str)


def main() -> None:
    """Reads the command line."""
    results = gather(Path(sys.argv[1]))
    results.round(4).to_csv(Path(__file__).with_name("results.csv"), index=False)
    table = summarize(results)
    print(table["ap50"].unstack("factor").to_string(), table.xs(1.0, level="factor").to_string(), sep="\n\n")


if __name__ == "__main__":
    main()
