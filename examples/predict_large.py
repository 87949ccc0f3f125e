"""A large image predicted from file to file, beside the model's own speed and MONAI's sliding window, in one run.

    python examples/predict_large.py --output large                           # 16,384 x 16,384 pixels
    python examples/predict_large.py --output large --size 512 1024 1024      # a volume
    python examples/predict_large.py --output large --model runs/hela/model --classes 2

The image is made of real frames (`training.cells`) by mirroring, with the pixel size of their file. Each measurement
runs in a process of its own: time, and the most memory that it had, beside that after its imports. "model" are
random ones of prediction's windows, in memory, one after the other for half a minute: what the model can do without
files. It is measured before and after the prediction, since a machine has faster and slower minutes. MONAI's
``sliding_window_inference`` gets the image in memory, the same windows and the same step. Pixels are those that come
out, so that halos count against all of them.
"""

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from ome_zarr.format import FormatV05
from ome_zarr.writer import write_multiscales_metadata

from rat_timm.data import read, read_grids
from rat_timm.dense import Segmenter
from rat_timm.geometry.box import Box
from rat_timm.geometry.grid import Grid
from rat_timm.predict import predict
from rat_timm.predict.network import Network, load_model
from rat_timm.predict.plan import make_plan
from training.cells import MOVIES, fetch, frames

CHUNK = {2: (1024, 1024), 3: (64, 128, 128)}
LASTING = 30.0  # seconds of windows in memory


def mirrored(length: int, start: int, stop: int) -> np.ndarray:
    """Returns which places of an axis stand where it goes on as in a mirror."""
    place = np.arange(start, stop) % (2 * length)
    return np.minimum(place, 2 * length - 1 - place)


def make_image(file: Path, size: tuple[int, ...]) -> None:
    """Writes an OME-Zarr of a size, chunk by chunk."""
    name = "hela" if len(size) == 2 else "cho"
    frame, spacing = frames(name, fetch()).images[0], MOVIES[name].spacing
    chunk = tuple(min(c, n) for c, n in zip(CHUNK[len(size)], size, strict=True))
    group = zarr.open_group(str(file), mode="w", zarr_format=3)
    array = group.create_array("0", shape=size, chunks=chunk, dtype="float32")
    for place in np.ndindex(*(-(-n // c) for n, c in zip(size, chunk, strict=True))):
        start = [at * c for at, c in zip(place, chunk, strict=True)]
        stop = [min(a + c, n) for a, c, n in zip(start, chunk, size, strict=True)]
        index = [mirrored(n, a, b) for n, a, b in zip(frame.shape, start, stop, strict=True)]
        array[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))] = frame[np.ix_(*index)]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"[-len(size) :]]
    transforms = [{"type": "scale", "scale": list(spacing)}]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    write_multiscales_metadata(group, datasets, fmt=FormatV05(), axes=axes)


def make_model(folder: Path, axes: int, classes: int, quick: bool) -> None:
    """Saves an untrained model of windows and sparse groupings, which does not look further than its tiles can."""
    torch.manual_seed(0)
    step = MOVIES["hela" if axes == 2 else "cho"].spacing
    options: dict[str, Any] = {"embed_dim": (32, 64), "depths": (1, 1)}
    if axes == 3:  # groups of their own cell only, so that windows with all that the model looks at fit
        options |= {"attn_kernel_size": 3, "neighborhood_kernel": 1, "width": 8}
    else:
        options |= {"attn_kernel_size": 5}
    if quick:
        options |= {"embed_dim": (16, 16), "num_heads": 2, "width": 8}
    Segmenter("test_rat" if axes == 2 else "test_rat_3d", classes, in_chans=1, spacing=step, **options).save(folder)


def _plan(image: Path, model: Path, options: dict[str, Any]) -> tuple[Any, Network]:
    network, grid = Network(load_model(str(model)), "labels"), read_grids(image)[0]
    return make_plan(network, grid, grid, Box.whole(grid.shape), tile=options.get("tile")), network


def by_prediction(image: Path, model: Path, output: Path, options: dict[str, Any]) -> dict[str, float]:
    """From file to file."""
    return {"pixels": predict(image, model, output / "labels.ome.zarr", **options).pixels}


def by_model(image: Path, model: Path, output: Path, options: dict[str, Any]) -> dict[str, float]:
    """Random windows of the plan, in memory."""
    plan, network = _plan(image, model, options)
    windows, random = list(plan.windows(Box.whole(plan.region.shape), network)), np.random.default_rng(0)
    pixels, seconds = [], []
    while len(seconds) < 3 or sum(seconds) < LASTING:
        window = windows[random.integers(len(windows))]
        grid = Grid.create(window.seen.shape, plan.working.spacing[0].tolist())
        x = torch.randn(1, network.in_chans, *grid.shape)
        begun = time.perf_counter()
        with torch.inference_mode():
            network([x], [[grid]], [None])
        seconds.append(time.perf_counter() - begun)
        sides = zip(window.box.shape, window.rise, window.fall, strict=True)
        pixels.append(math.prod(n - (rise + fall) / 2 for n, rise, fall in sides))
    return {"pixels": sum(pixels[1:]), "seconds": sum(seconds[1:])}  # the first warms up


def by_monai(image: Path, model: Path, output: Path, options: dict[str, Any]) -> dict[str, float]:
    """MONAI's sliding window over the image in memory."""
    from monai.inferers import sliding_window_inference

    plan, network = _plan(image, model, options)
    begun = time.perf_counter()
    scan = read(image, max_bytes=None)
    windows = list(plan.windows(plan.box(plan.count // 2), network))
    ratio = (plan.working.spacing / plan.out.spacing)[0].tolist()
    roi = [round(n * r) for n, r in zip(windows[len(windows) // 2].seen.shape, ratio, strict=True)]
    roi = [min(n, whole) for n, whole in zip(roi, scan.pixels.shape[1:], strict=True)]
    overlap = [max(0.0, 1 - e / r) for e, r in zip(plan.edge, roi, strict=True)]
    with torch.inference_mode():
        logits = sliding_window_inference(
            scan.pixels[None], roi, 1, lambda x: network.model(x, spacing=scan.spacing), overlap=overlap
        )
        labels = logits.argmax(dim=1)
    return {"pixels": labels.numel(), "seconds": time.perf_counter() - begun}


def measured_here(what: str, *arguments: Any) -> dict[str, float]:
    """Measures in this process."""
    torch.set_num_threads(arguments[-1])
    before, begun = _peak(), time.perf_counter()
    result = {"model": by_model, "prediction": by_prediction, "monai": by_monai}[what](*arguments[:-1])
    return {"seconds": time.perf_counter() - begun, **result, "before": before, "peak": _peak()}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(what: str, *arguments: Any) -> dict[str, float]:
    """Measures in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured_here, what, *arguments).result()


def main() -> None:
    """Makes the image, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for image, model, labels and results.json")
    parser.add_argument("--size", type=int, nargs="+", default=[16384, 16384])
    parser.add_argument("--model", type=Path, help="a saved Segmenter of one channel; default: an untrained one")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--tile", type=float, help="see rat_timm.predict.Options")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], choices=["model", "prediction", "monai"])
    parser.add_argument("--quick", action="store_true", help="a small image and a tiny model")
    given = parser.parse_args()
    size = (160, 200) if given.quick else tuple(given.size)
    tile = 50.0 if given.quick else given.tile
    given.output.mkdir(parents=True, exist_ok=True)
    image, model = given.output / "image.ome.zarr", given.model or given.output / "model"
    if not image.exists() or read_grids(image)[0].shape != size:
        shutil.rmtree(image, ignore_errors=True)
        make_image(image, size)
    if given.model is None:
        make_model(model, len(size), given.classes, given.quick)
    shutil.rmtree(given.output / "labels.ome.zarr", ignore_errors=True)
    options = {"tile": tile, "progress": not given.quick}
    results = []
    for what in ("model", "prediction", "model", "monai"):
        if what in given.without:
            continue
        row = measured(what, image, model, given.output, options, given.threads)
        results.append({"what": what, **row})
        rate = row["pixels"] / row["seconds"]
        print(
            f"{what:10} {row['seconds']:8.1f} s {rate / 1e6:8.3f} Mpixels/s, peak memory {row['peak'] / 2**30:5.2f} "
            f"GiB, {row['before'] / 2**30:.2f} of it after imports",
            flush=True,
        )
    (given.output / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
