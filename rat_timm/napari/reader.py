"""napari's reader: images and volumes with their pixel size, which napari's own reader of TIFF drops."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from ..data.readers import is_readable, read, read_grids, read_lazy
from ..data.readers.formats import format_of
from ..data.readers.source import import_zarr, locate

Layers: TypeAlias = "list[tuple[Any, dict[str, Any], str]]"
UNIT = "um"


def reader_of(path: str | Sequence[str]) -> Callable[[str | PathLike], Layers] | None:
    """Answers napari's question who reads a file: None if it is none of `rat_timm.data.read`'s, or several."""
    return open_layers if isinstance(path, str) and is_readable(path) else None


def open_layers(path: str | PathLike) -> Layers:
    """Opens an image or a volume: a layer for each of its channels, with scale, place and unit.

    Args:
        path: What `rat_timm.data.read` takes. Levels of a pyramid become those of the layer. Pixels are read when they
            are shown, but for DICOM.

    Returns:
        One entry, which napari makes layers of. Labels that `rat_timm.predict` wrote are Labels.

    Raises:
        ReadError: If the file cannot be read, or does not say its pixel size.
    """
    path = str(path)
    grids = read_grids(path, UNIT)
    form = format_of(locate(path, None))
    levels: list[Any]
    if form is not None and form.in_parts:
        levels = [read_lazy(path, UNIT, level=level).pixels for level in range(len(grids))]
    else:
        levels = [read(path, UNIT).pixels.numpy()]
    first, axes = grids[0], len(grids[0].shape)
    options = {
        "name": Path(path).name.partition(".")[0],
        "scale": first.spacing[0].tolist(),
        "translate": first.origin[0].tolist(),
        "units": (UNIT,) * axes,
        "axis_labels": tuple("zyx"[-axes:]),
        "multiscale": len(levels) > 1,
    }
    if _are_labels(path):
        levels, kind = [level[0] for level in levels], "labels"
    else:
        options, kind = {**options, "channel_axis": 0}, "image"
    return [(levels if len(levels) > 1 else levels[0], options, kind)]


def _are_labels(path: str) -> bool:
    is_zarr = path.lower().rstrip("/").endswith(".zarr")
    return is_zarr and "image-label" in import_zarr().open_group(path, mode="r").attrs.get("ome", {})
