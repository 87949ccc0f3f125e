"""OME-Zarr 0.4 and 0.5, on `zarr`.

Metadata are read here: all packages that read them hand out Dask arrays, whose pool of threads does not survive a fork.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ReadError
from ..units import Length
from .source import SPACE, Format, Source, StoredImage, import_zarr, is_file_object, pick

if TYPE_CHECKING:
    import zarr


def open_ome_zarr(source: Source, level: int, image: int | None, max_bytes: int | None) -> StoredImage:
    """Reads what an OME-Zarr image says; see `source.Opener`."""
    if is_file_object(source.place):
        raise ValueError(f"{source.name}: OME-Zarr must be a path, an address or a zarr.Group, got a file object")
    zarr = import_zarr()
    group = source.place if isinstance(source.place, zarr.Group) else zarr.open_group(str(source.place), mode="r")
    multiscale = _multiscale(group, source.name)
    axes = multiscale["axes"]
    dataset = pick(multiscale["datasets"], level, source.name)
    scale = _scale(dataset, len(axes), source.name)
    if multiscale.get("coordinateTransformations"):  # on top of each level's own
        common = _scale(multiscale, len(axes), source.name)
        scale = [one * other for one, other in zip(scale, common, strict=True)]
    array = _array(group, dataset.get("path"), source.name)
    if max_bytes is not None:
        array = importlib.import_module(f"{__package__}.zarr_codecs").bounded(array)  # imports zarr
    if array.ndim != len(axes):
        raise ReadError(f"{source.name}: must have {len(axes)} axes, as its metadata say, got {array.ndim}")
    letters = "".join(_letter(axis) for axis in axes)
    sizes = {
        letter: Length(size, axis.get("unit"))
        for letter, axis, size in zip(letters, axes, scale, strict=True)
        if letter in SPACE
    }
    shape, pieces = tuple(map(int, array.shape)), tuple(map(int, array.chunks))
    chunks = tuple(map(int, array.shards or array.chunks))
    return StoredImage(letters, shape, array.dtype, chunks, pieces, sizes, lambda part: np.asarray(array[part]))


def _is_zarr(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup"))


def _multiscale(group: "zarr.Group", name: str) -> dict[str, Any]:
    """Returns the metadata of the image, if they are of a version that has scales."""
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, dict) else None
    image = images[0] if isinstance(images, list) and _are_dicts(images) else {}
    complete = _are_dicts(image.get("axes")) and _are_dicts(image.get("datasets"))
    if not complete or not all("coordinateTransformations" in dataset for dataset in image["datasets"]):
        raise ReadError(f"{name}: must be an image of OME-Zarr 0.4 or later, whose metadata say the pixel size")
    return image


def _are_dicts(items: Any) -> bool:
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) for item in items)


def _scale(described: dict[str, Any], count: int, name: str) -> list[float]:
    """Returns the scale, one number per axis, of metadata that have exactly one."""
    parts = described["coordinateTransformations"]
    scales = [part.get("scale") for part in parts if part.get("type") == "scale"] if _are_dicts(parts) else []
    kinds = {part.get("type") for part in parts} if scales else set()
    if len(scales) != 1 or not _are_numbers(scales[0], count) or not kinds <= {"scale", "translation"}:
        raise ReadError(f"{name}: must have one scale of {count} numbers, got {parts!r:.200}")
    return scales[0]


def _are_numbers(items: Any, count: int) -> bool:
    numbers = isinstance(items, list) and all(type(item) in (int, float) for item in items)
    return numbers and len(items) == count


def _letter(axis: dict[str, Any]) -> str:
    """Returns the letter of an axis; "?" for one that has none."""
    kind = axis.get("type")
    letter = {"channel": "c", "time": "t"}.get(kind if isinstance(kind, str) else "", str(axis.get("name")).lower())
    return letter if len(letter) == 1 else "?"


def _array(group: "zarr.Group", path: Any, name: str) -> "zarr.Array":
    """Returns a level's array, which must be inside the group."""
    if not isinstance(path, str) or any(part in ("", ".", "..") for part in path.split("/")) or "\\" in path:
        raise ReadError(f"{name}: a level must be in the image's own folder, got {path!r:.200}")
    array = group[path]
    if not isinstance(array, import_zarr().Array):
        raise ReadError(f"{name}: {path} must be an array, got a {type(array).__name__}")
    if any(getattr(codec, "codec_id", "") == "pickle" for codec in (*array.filters, *array.compressors)):
        raise ReadError(f"{name}: pixels must not be pickled, for reading them would run the file's code")
    return array


OME_ZARR = Format("OME-Zarr", (".zarr",), open_ome_zarr, has_levels=True, is_folder=_is_zarr)
