"""Objects of real frames, predicted tile by tile and joined, beside those of the whole frame.

    PYTHONPATH=$PWD:$PWD/examples python tests/tiled_cells.py runs/hela/model --tiles 80 160 --frames 0 3

Says how many objects of the whole frame are another's or no one's pixels in any place of the tiled one, how many pixels
differ, and how far logits are apart.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr

from rat_timm import data
from rat_timm.dense import Segmenter
from rat_timm.dense.instances import instances
from rat_timm.predict import predict
from training.cells import MOVIES, Cells
from training.data import Scaling


def different(found: np.ndarray, expected: np.ndarray) -> tuple[int, int]:
    """Returns how many expected objects are none of those found, pixel by pixel, and how many pixels they differ in."""
    pairs, size = np.unique(np.stack([found.ravel(), expected.ravel()]), axis=1, return_counts=True)
    one, other = np.bincount(pairs[0]), np.bincount(pairs[1])  # with how many of the other's a number shares pixels
    same = (one[pairs[0]] == 1) & (other[pairs[1]] == 1) & (pairs[1] > 0)
    partner = np.zeros(expected.max() + 1, int)  # the one that shares most pixels
    for (a, b), _ in sorted(zip(pairs.T.tolist(), size.tolist(), strict=True), key=lambda each: each[1]):
        partner[b] = a if b else 0
    return int(expected.max() - same.sum()), int((found != partner[expected]).sum())


def main() -> None:
    """Prints a line for each frame and size of tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="hela", choices=list(MOVIES))
    parser.add_argument("--tiles", type=float, nargs="+", required=True)
    parser.add_argument("--halo", type=float)
    parser.add_argument("--frames", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--crop", type=int, help="pixels along each axis, from the middle")
    given = parser.parse_args()
    model = Segmenter.load(given.model).to(getattr(torch, given.dtype))
    facts = json.loads((given.model / "facts.json").read_text())
    scale, scaling = facts["length"], Scaling(facts["channels"], facts["mean"], facts["std"], "model")
    frames = Cells(given.data, "test")
    for number in given.frames:
        x, spacing = scaling(frames[number].image).to(getattr(torch, given.dtype)), MOVIES[given.data].spacing
        if given.crop:
            x = x[(slice(None), *(slice((n - given.crop) // 2, (n + given.crop) // 2) for n in x.shape[1:]))]
        begun = time.perf_counter()
        with torch.inference_mode():
            logits = model(x[None], spacing=spacing)
        whole, seconds = instances(logits, spacing, scale=scale)[0].numpy(), time.perf_counter() - begun
        sizes = np.bincount(whole.ravel())[1:]
        print(f"frame {number} {tuple(x.shape)}: {len(sizes)} objects, largest {sizes.max()} px, {seconds:.1f} s")
        level = data.levels_of(x, spacing, (1,))[0]
        image = [data.Level(level.grid, lambda region, x=x: x[(slice(None), *region)])]
        for tile in given.tiles:
            with tempfile.TemporaryDirectory() as folder:
                output, options = Path(folder) / "out.ome.zarr", {"tile": tile, "halo": given.halo, "scale": scale}
                options |= {"dtype": given.dtype, "device": "cpu", "progress": False}
                done = predict(image, model, output, task="instances", **options)
                found = zarr.open_array(str(output / "0"), mode="r")[:].astype(np.int64)
            objects, pixels = different(found, whole)
            exact = "exact" if done.difference is None else f"blended, {done.difference.usual:.2g} said"
            print(
                f"  tile {tile:g}: {found.max()} objects, {objects} of the whole differ, in {pixels} pixels; {exact}, "
                f"{done.seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
