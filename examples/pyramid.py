"""A high-resolution crop inside its low-resolution overview, in one forward pass with one physical coordinate system.

    python examples/pyramid.py [PICTURE.png]

The image is the stained tissue that scikit-image ships. Its pixel size is not known, so the unit of length is one of
its pixels: the overview is the whole image averaged over 4 x 4 pixels (spacing 4), the crop a part of it as it is
(spacing 1). A corner of the overview is masked. The network has random weights: the groups follow colour and no more.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table
from skimage.data import immunohistochemistry
from skimage.segmentation import find_boundaries
from torch import Tensor
from torch.nn.functional import avg_pool2d

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import Grid
from rat_timm.layers import compose, to_pixels

RATIO = 4
CROP = (slice(130, 322), slice(250, 410))  # rows and columns of the whole image


class Level(NamedTuple):
    """An image ``[1, 3, H, W]``, its valid pixels ``[1, H, W]``, spacing, and its first pixel's centre."""

    title: str
    image: Tensor
    mask: Tensor
    spacing: tuple[float, float]
    origin: tuple[float, float]


def scene() -> list[Level]:
    """Cuts overview and crop out of the photograph."""
    image = torch.from_numpy(immunohistochemistry()).permute(2, 0, 1)[None] / 255
    overview, crop = avg_pool2d(image, RATIO), image[..., CROP[0], CROP[1]]
    mask = torch.ones(1, *overview.shape[2:], dtype=torch.bool)
    mask[:, :30, :40] = False
    whole = torch.ones(1, *crop.shape[2:], dtype=torch.bool)
    return [
        Level("overview", overview, mask, (RATIO, RATIO), (RATIO / 2, RATIO / 2)),
        Level("crop", crop, whole, (1.0, 1.0), tuple(part.start + 0.5 for part in CROP)),
    ]


@torch.inference_mode()
def analyse(levels: list[Level]) -> tuple[list[list[Grid]], list[np.ndarray]]:
    """Returns each stage's grids, and the group of every pixel of each level, -1 where masked."""
    torch.manual_seed(0)
    model = timm.create_model("rat_tiny").eval()
    out = model.forward_intermediates(
        [(level.image - 0.5) / 0.25 for level in levels],
        spacing=[level.spacing for level in levels],
        origin=[level.origin for level in levels],
        mask=[level.mask for level in levels],
        output_dict=True,
        return_assignments=True,
    )
    groups = []
    for i, level in enumerate(levels):
        shares = compose([grouping[i] for grouping in out["assignments"]])
        label = torch.where(out["masks"][0][i], shares.argmax(dim=-1), -1)
        groups.append(to_pixels(label, model.feature_info[0]["stride"], level.image.shape[2:])[0].numpy())
    return out["grids"], groups


def tabulate(levels: list[Level], grids: list[list[Grid]]) -> Table:
    """Lists where each stage's tokens are."""
    table = Table("level", "stage", "grid", "spacing", "first centre", title="One coordinate system")
    for i, level in enumerate(levels):
        for stage, per_level in enumerate(grids, start=1):
            grid = per_level[i]
            rows = (grid.shape, grid.spacing[0].tolist(), grid.origin[0].tolist())
            numbers = (" x ".join(f"{v:g}" for v in row) for row in rows)
            table.add_row(level.title, str(stage), *numbers)
    return table


def draw(levels: list[Level], groups: list[np.ndarray], path: Path) -> None:
    """Draws both fields of view with their groups, in physical units."""
    figure, row = plt.subplots(1, len(levels), figsize=(13, 6.4), constrained_layout=True)
    outline = {}
    for axis, level, group in zip(row, levels, groups, strict=True):
        pixels = level.image[0].movedim(0, -1).numpy()
        borders = find_boundaries(group, mode="inner")
        shown = np.where(borders[..., None], (1.0, 0.9, 0.0), pixels)
        shown = np.where(level.mask[0].numpy()[..., None], shown, 0.3 * pixels)
        (height, width), (dy, dx), (y, x) = group.shape, level.spacing, level.origin
        top, left = y - dy / 2, x - dx / 2
        axis.imshow(shown, extent=(left, left + width * dx, top + height * dy, top))
        axis.set(title=f"{level.title}: {height} x {width} pixels, spacing {dy:g}", xlabel="x", ylabel="y")
        outline = {"xy": (left, top), "width": width * dx, "height": height * dy}
    row[0].add_patch(Rectangle(**outline, fill=False, edgecolor="red", linewidth=2))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs the pyramid, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("pyramid.png"))
    path = parser.parse_args().picture
    levels = scene()
    grids, groups = analyse(levels)
    Console().print(tabulate(levels, grids))
    draw(levels, groups, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
