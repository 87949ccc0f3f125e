"""Evaluates what train.py trained on labelled images, at pixel sizes that it was not trained at too.

    python examples/evaluate.py --trained runs/hela --output runs/hela/test --factors 0.25 0.5 1 2 4
    python examples/evaluate.py --trained runs/hela --output runs/hela/test --wrong 0.8 1.25 --resized
    python examples/evaluate.py --trained runs/mine --data other/folder --output runs/other --num_workers 4     # Ray

A factor makes the images' pixels so many times as large, and tells the model so; predictions are made on the pixels of
the files, whose labels are as they are. A wrong factor tells a pixel size that is so many times too large. --resized
adds the control: images that are brought to the training images' pixel size before the model gets them, for models that
are told nothing too.

Written are `images.csv`, the figures of each image; `all.csv`, those of all images together; `factors.png`, a curve;
and `prediction.png`, the first image's. With --num_workers images are spread over processes of a Ray cluster, that of
RAY_ADDRESS or one of this machine; what a process that dies had to do is done again.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from rich.progress import track

from rat_timm.optional import import_optional
from training.conditions import Evaluation, conditions
from training.tasks import Measured


class Worker:
    """Evaluates images in a process of a Ray cluster."""

    def __init__(self, evaluation: Evaluation) -> None:
        torch.set_num_threads(1)
        self.evaluation = evaluation

    def measure(self, index: int) -> list[Measured]:
        """Evaluates the image of an index."""
        return self.evaluation.measure(index)


def over_ray(evaluation: Evaluation, num_workers: int) -> list[list[Measured]]:
    """Evaluates all images in so many processes."""
    ray = import_optional("ray", "ray")
    pool = import_optional("ray.util.actor_pool", "ray").ActorPool
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}, ignore_reinit_error=True)
    options = {"num_cpus": 1, "num_gpus": int(evaluation.device == "cuda"), "max_restarts": -1, "max_task_retries": -1}
    worker = ray.remote(**options)(Worker)
    workers = pool([worker.remote(evaluation) for _ in range(num_workers)])
    measured = workers.map(lambda worker, index: worker.measure.remote(index), range(len(evaluation.frames)))
    return list(track(measured, total=len(evaluation.frames), disable=None))


def tables(evaluation: Evaluation, measured: Sequence[Sequence[Measured]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the figures of each image, and those of all, for each condition."""
    each, together = [], []
    for place, condition in enumerate(evaluation.conditions):
        shown = dataclasses.asdict(condition)
        for name, image in zip(evaluation.frames.names, measured, strict=True):
            each.append({"image": name, **shown, **image[place].values})
        together.append({**shown, **evaluation.loaded[0].summarize([image[place] for image in measured])})
    return pd.DataFrame(each), pd.DataFrame(together)


def draw(together: pd.DataFrame, score: str, file: Path) -> None:
    """Draws the score over the pixel size, that of the images and the one that is told."""
    figure = import_optional("matplotlib.figure", "examples").Figure(layout="constrained")
    axes = figure.subplots()
    for column, label in (("factor", "told"), ("wrong", "told wrongly")):
        for resized, rows in together.groupby("resized"):
            shown = rows[(rows.factor == 1) if column == "wrong" else (rows.wrong == 1)].sort_values(column)
            if len(shown) > 1 or column == "factor":
                name = f"{label}, resized" if resized else label
                axes.plot(shown[column], shown[score], marker="o", linestyle="--" if resized else "-", label=name)
    ticks = sorted({*together.factor, *together.wrong})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlabel="pixel size / that of the files", ylabel=score)
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Reads the command line and evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=Path, required=True, help="the output of train.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for tables and pictures")
    parser.add_argument("--data", help="as in train.py; default: the training's")
    parser.add_argument("--part", default="test", help="folder of the data: train, validation or test")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="factors of the pixel size")
    parser.add_argument("--wrong", type=float, nargs="+", default=[], help="factors by which the told size is wrong")
    parser.add_argument("--resized", action="store_true", help="add the control that resizes images")
    parser.add_argument("--tile", type=int, nargs="+", help="pixels predicted at once; default: the training's")
    parser.add_argument("--spacing", type=float, nargs="+", help="pixel size of pictures; default: the training's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_workers", type=int, default=0, help="processes on a Ray cluster; 0: this one alone")
    given = parser.parse_args()
    evaluation = Evaluation(
        given.trained.resolve(),
        given.data,
        given.part,
        tuple(conditions(given.factors, given.wrong, given.resized)),
        given.device,
        *(tuple(value) if value else None for value in (given.tile, given.spacing)),
    )
    if given.num_workers:
        measured = over_ray(evaluation, given.num_workers)
    else:
        measured = [evaluation.measure(index) for index in track(range(len(evaluation.frames)), disable=None)]
    each, together = tables(evaluation, measured)
    given.output.mkdir(parents=True, exist_ok=True)
    each.to_csv(given.output / "images.csv", index=False)
    together.to_csv(given.output / "all.csv", index=False)
    draw(together, evaluation.loaded[0].score, given.output / "factors.png")
    Image.fromarray(evaluation.picture(0, evaluation.conditions[0])).save(given.output / "prediction.png")
    print(together.to_string(index=False))


if __name__ == "__main__":
    main()
