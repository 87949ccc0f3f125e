"""DINOv3 features of a volume whose voxels are no cubes, from timm's weights as they are.

    python examples/pretrained_features.py [PICTURE.png]

The volume is the MR series that nibabel ships among its test data, 2.2 x 2 x 2 mm. The network is DINOv3's small ViT
with a reference spacing of 2.2 x 0.5 x 0.5 mm: it sees the head as it would in slices of 0.5 mm pixels, and one patch
covers 8.8 x 8 x 8 mm, for which its kernel is resampled. The picture shows the first three principal components of the
last block's features. Weights come from the Hugging Face Hub; where that cannot be reached they are random, and the
program and the picture say so: then the colours show no more than brightness and edges.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import Grid
from studies.head import Volume, head

MODEL = "rat_vit_small_patch16_dinov3.lvd1689m"
SETTINGS = {
    "spatial_dims": 3,
    "in_chans": 1,
    "patch_depth": 4,
    "spacing": (2.2, 0.5, 0.5),
    "physical_patches": True,
}


def network() -> tuple[nn.Module, str]:
    """Makes the network, with pretrained weights if they can be had; returns it and what weights it has."""
    try:
        return timm.create_model(MODEL, pretrained=True, **SETTINGS).eval(), "DINOv3 weights"
    except OSError as error:  # the Hub cannot be reached, and nothing is cached
        print(
            f"No pretrained weights ({type(error).__name__}): they are RANDOM, the colours show brightness and edges."
        )
        torch.manual_seed(0)
        return timm.create_model(MODEL.split(".")[0], **SETTINGS).eval(), "RANDOM weights"


@torch.inference_mode()
def features(model: nn.Module, volume: Volume) -> tuple[Tensor, Grid]:
    """Returns the last block's map ``[C, z, y, x]`` and its grid."""
    mean, std = (float(np.mean(model.pretrained_cfg[name])) for name in ("mean", "std"))
    out = model.forward_intermediates(
        (volume.image - mean) / std,
        indices=1,
        norm=True,
        spacing=volume.spacing,
        intermediates_only=True,
        output_dict=True,
    )
    return out["image_intermediates"][0][0], out["grids"][0]


def colours(found: Tensor) -> np.ndarray:
    """Returns the first three principal components of a map ``[C, z, y, x]`` as colours, ``[z, y, x, 3]``."""
    flat = found.flatten(1).T.double()
    flat = flat - flat.mean(dim=0)
    components = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    return ((components - low) / (high - low)).clamp(0, 1).unflatten(0, found.shape[1:]).numpy()


def draw(volume: Volume, found: Tensor, grid: Grid, weights: str, path: Path) -> None:
    """Draws every layer of patches below the middle slice that it covers, in physical proportions."""
    painted = colours(found)
    figure, rows = plt.subplots(2, len(painted), figsize=(2.4 * len(painted), 4.6), constrained_layout=True)
    figure.suptitle(f"{MODEL.split('.')[0]}, {weights}: components 1-3 of the last block (mm)")
    _, *plane = (n * s for n, s in zip(volume.image.shape[2:], volume.spacing, strict=True))
    _, *covered = (n * float(s) for n, s in zip(grid.shape, grid.spacing[0], strict=True))
    for layer, (above, below) in enumerate(rows.T):
        height = float(grid.coordinates()[0, layer, 0, 0, 0])
        slice_ = min(int(height / volume.spacing[0]), volume.image.shape[2] - 1)
        above.imshow(volume.image[0, 0, slice_], cmap="gray", extent=(0, plane[1], plane[0], 0))
        above.set(title=f"z = {height:.1f}")
        below.imshow(painted[layer], extent=(0, covered[1], covered[0], 0))
        below.set(xlim=(0, plane[1]), ylim=(plane[0], 0))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Computes the features, prints their geometry, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("pretrained_features.png"))
    path = parser.parse_args().picture
    volume = head()
    model, weights = network()
    found, grid = features(model, volume)
    table = Table("", "grid", "spacing (mm)", title=f"{MODEL}, {weights}")
    for name, shape, spacing in (
        ("voxels", volume.image.shape[2:], volume.spacing),
        ("patches", grid.shape, grid.spacing[0].tolist()),
    ):
        table.add_row(name, " x ".join(map(str, shape)), " x ".join(f"{s:g}" for s in spacing))
    Console().print(table)
    draw(volume, found, grid, weights, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
