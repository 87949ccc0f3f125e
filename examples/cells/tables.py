"""Writes what run.sh found as `results.csv` and `tasks.png`, and prints README.md's tables: ``tables.py FOLDER``."""

import sys
from pathlib import Path

import pandas as pd
from PIL import Image

KEYS = ["data", "network", "resized", "factor"]
FIGURES = ["ap50", "ap75", "ap", "pq", "iou"]
SIDE, GAP = 300, 8
PICTURES = {"hela-fpn-0": (400, 330), "hela-fcos-0": (400, 330), "bacteria-classes-0": (200, 220)}  # left, upper end


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


def draw(folder: Path, file: Path) -> None:
    """Puts parts of pictures side by side: objects told apart, boxes, classes of pixels."""
    together = Image.new("RGB", (len(PICTURES) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, (name, (left, upper)) in enumerate(PICTURES.items()):
        picture = Image.open(folder / name / "test/prediction.png").convert("RGB")
        together.paste(picture.crop((left, upper, left + SIDE, upper + SIDE)), (place * (SIDE + GAP), 0))
    together.save(file, optimize=True)


def main() -> None:
    """Reads the command line."""
    results = gather(Path(sys.argv[1]))
    results.round(4).to_csv(Path(__file__).with_name("results.csv"), index=False)
    draw(Path(sys.argv[1]), Path(__file__).with_name("tasks.png"))
    table = summarize(results)
    print(table["ap50"].unstack("factor").to_string(), table.xs(1.0, level="factor").to_string(), sep="\n\n")


if __name__ == "__main__":
    main()
