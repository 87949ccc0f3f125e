"""OME-Zarr 0.4 to 0.6, on `zarr`.

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
    scale, shift = _transform(dataset, len(axes), source.name)
    if multiscale.get("coordinateTransformations"):  # on top of each level's own
        outer, common = _transform(multiscale, len(axes), source.name)
        shift = _moved(shift, outer, common)
        scale = [one * other for one, other in zip(scale, outer, strict=True)]
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
    offsets = None if shift is None else {a: by for a, by in zip(letters, shift, strict=True) if a in SPACE}
    return StoredImage(
        letters,
        shape,
        array.dtype,
        chunks,
        pieces,
        sizes,
        lambda part: np.asarray(array[part]),
        len(multiscale["datasets"]),
        offsets,
    )


def _is_zarr(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("zarr.json", ".zattrs", ".zgroup"))


def _multiscale(group: "zarr.Group", name: str) -> dict[str, Any]:
    """Returns the metadata of the image, if they are of a version that has scales."""
    attributes = dict(group.attrs)
    ome = attributes.get("ome", attributes)
    images = ome.get("multiscales") if isinstance(ome, dict) else None
    image = _intrinsic(images[0]) if isinstance(images, list) and _are_dicts(images) else {}
    complete = _are_dicts(image.get("axes")) and _are_dicts(image.get("datasets"))
    if not complete or not all("coordinateTransformations" in dataset for dataset in image["datasets"]):
        raise ReadError(f"{name}: must be an image of OME-Zarr 0.4 or later, whose metadata say the pixel size")
    return image


def _intrinsic(image: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata of version 0.6 as 0.5 has them, in the system of coordinates that the levels are put in.

    There the levels' transformations name one of ``coordinateSystems``, which holds the axes, and what an image has in
    common leads from it to other systems, which are of no use here.
    """
    systems: Any = image.get("coordinateSystems")
    datasets: Any = image.get("datasets")
    if not _are_dicts(systems) or not _are_dicts(datasets):
        return image
    levels = [(dataset.get("path"), dataset.get("coordinateTransformations")) for dataset in datasets]
    if not all(_are_dicts(parts) and len(parts) == 1 for _, parts in levels):
        return {}
    outputs = [part.get("output") for _, (part,) in levels]
    names = [output.get("name") if isinstance(output, dict) else output for output in outputs]
    system: dict[str, Any] = next((each for each in systems if [each.get("name")] * len(names) == names), {})
    flat = [
        {
            "path": path,
            "coordinateTransformations": part.get("transformations") if part.get("type") == "sequence" else [part],
        }
        for path, (part,) in levels
    ]
    return {"axes": system.get("axes"), "datasets": flat}


def _are_dicts(items: Any) -> bool:
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) for item in items)


def _transform(described: dict[str, Any], count: int, name: str) -> tuple[list[float], list[float] | None]:
    """Returns the scale and the translation after it, one number per axis; None for the latter if there is none."""
    parts = described["coordinateTransformations"]
    kinds = [part.get("type") for part in parts] if _are_dicts(parts) else []
    if kinds not in (["scale"], ["scale", "translation"]):
        raise ReadError(f"{name}: must have one scale of {count} numbers, got {parts!r:.200}")
    values = [part.get(kind) for part, kind in zip(parts, kinds, strict=True)]
    if not all(_are_numbers(value, count) for value in values):
        raise ReadError(f"{name}: must have one scale of {count} numbers, got {parts!r:.200}")
    return values[0], values[1] if len(values) > 1 else None


def _moved(shift: list[float] | None, scale: list[float], common: list[float] | None) -> list[float] | None:
    """Returns a level's translation after the scale and the translation that all levels have in common."""
    if shift is None and common is None:
        return None
    zero = [0.0] * len(scale)
    return [a * s + b for a, s, b in zip(shift or zero, scale, common or zero, strict=True)]


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
