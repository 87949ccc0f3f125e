"""RAT on a real image and a real volume: feature maps with their physical spacing, and the groups they come from.

    python examples/quickstart.py [PICTURE.png]

The image is the stained tissue that scikit-image ships (its pixel size is not known: lengths are in pixels); the volume
is the MR series that nibabel ships among its test data, with its voxel size read from the header. The networks have
random weights, so the groups follow colour and brightness and no more.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table
from skimage.data import immunohistochemistry
from skimage.segmentation import find_boundaries
from torch import Tensor

import rat_timm  # noqa: F401  (registers the models)
from rat_timm.layers import compose, to_pixels


class Scene(NamedTuple):
    """An image or volume ``[1, C, *size]``, its pixel size in array-axis order, and what to call them."""

    title: str
    model: str
    image: Tensor
    spacing: tuple[float, ...]
    unit: str


class Result(NamedTuple):
    """Feature maps ``[C, *grid]`` per stage, their spacing, and the group of every pixel, ``[*size]``."""

    maps: list[Tensor]
    spacings: list[list[float]]
    groups: np.ndarray


def tissue() -> Scene:
    """Loads the photograph of stained colon tissue, 512 x 512."""
    image = torch.from_numpy(immunohistochemistry()).permute(2, 0, 1)[None] / 255
    return Scene("stained tissue", "rat_tiny", (image - image.mean()) / image.std(), (1.0, 1.0), "px")


def brain() -> Scene:
    """Loads the first frame of the MR series, axes (z, y, x)."""
    series = nibabel.load(Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz")
    volume = torch.from_numpy(series.get_fdata(dtype=np.float32)[..., 0].T.copy())[None, None]
    spacing = tuple(float(size) for size in series.header.get_zooms()[2::-1])
    return Scene("MR volume", "rat_tiny_3d", (volume - volume.mean()) / volume.std(), spacing, "mm")


@torch.inference_mode()
def analyse(scene: Scene) -> Result:
    """Runs the backbone as a feature extractor, and once more for the groups behind its maps."""
    torch.manual_seed(0)
    backbone = timm.create_model(scene.model, features_only=True, spacing=scene.spacing).eval()
    maps = backbone(scene.image, spacing=scene.spacing)
    out = backbone.model.forward_intermediates(
        scene.image, spacing=scene.spacing, output_dict=True, return_assignments=True
    )
    group = compose(out["assignments"]).argmax(dim=-1)  # [1, *stage-1 grid]
    pixels = to_pixels(group, backbone.feature_info.get("stride")[0], scene.image.shape[2:])
    return Result([m[0] for m in maps], [g.spacing[0].tolist() for g in out["grids"]], pixels[0].numpy())


def tabulate(scenes: list[Scene], results: list[Result]) -> Table:
    """Lists the maps."""
    table = Table("model", "stage", "channels", "grid", "spacing", title="Feature maps")
    for scene, result in zip(scenes, results, strict=True):
        for stage, (features, spacing) in enumerate(zip(result.maps, result.spacings, strict=True), start=1):
            grid = " x ".join(str(n) for n in features.shape[1:])
            size = " x ".join(f"{length:g}" for length in np.round(spacing, 3))
            table.add_row(scene.model, str(stage), str(len(features)), grid, f"{size} {scene.unit}")
    return table


def principal_components(features: Tensor) -> np.ndarray:
    """Returns the first three principal components of a map ``[C, *grid]`` as colours, ``[*grid, 3]``."""
    flat = features.flatten(1).T.double()
    flat = flat - flat.mean(dim=0)
    components = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].T
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]))
    return colours.unflatten(0, features.shape[1:]).numpy()


def middle(array: np.ndarray, axes: int) -> np.ndarray:
    """Returns the middle plane of a volume, an image as it is."""
    return array[len(array) // 2] if axes == 3 else array


def draw(scenes: list[Scene], results: list[Result], path: Path) -> None:
    """Draws a row per scene, in physical proportions: input, components of each stage, borders of the groups."""
    figure, rows = plt.subplots(len(scenes), 6, figsize=(18, 3.4 * len(scenes)), constrained_layout=True)
    for scene, result, row in zip(scenes, results, rows, strict=True):
        axes = len(scene.spacing)
        extent = [n * s for n, s in zip(scene.image.shape[-2:], scene.spacing[-2:], strict=True)]
        place = {"extent": (0, extent[1], extent[0], 0)}
        pixels = scene.image[0].movedim(0, -1).numpy()
        pixels = np.broadcast_to(middle(pixels, axes), (*scene.image.shape[-2:], 3))
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
        row[0].imshow(pixels, **place)
        row[0].set(title=f"{scene.title} ({scene.unit})")
        for stage, (axis, features) in enumerate(zip(row[1:5], result.maps, strict=True), start=1):
            axis.imshow(middle(principal_components(features), axes), **place)
            axis.set(title=f"stage {stage}, components 1-3")
        borders = find_boundaries(middle(result.groups, axes), mode="inner")
        row[5].imshow(np.where(borders[..., None], (1.0, 0.9, 0.0), pixels), **place)
        row[5].set(title="borders of the groups")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Analyses both scenes, prints the table, writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, default=Path("quickstart.png"))
    path = parser.parse_args().picture
    scenes = [tissue(), brain()]
    results = [analyse(scene) for scene in scenes]
    Console().print(tabulate(scenes, results))
    draw(scenes, results, path)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
