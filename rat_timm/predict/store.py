"""Where predictions are written: an OME-Zarr whose shards are tiles, and what other formats make of it at the end.

While a run goes on, its OME-Zarr stands in ``OUTPUT.partial``; the output is there as a whole or not at all.
"""

import gzip
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.readers.source import import_zarr
from ..data.units import metres_of
from ..geometry.box import Box
from ..optional import import_optional
from .manifest import DATA, FOLDER, NAME, Manifest

if TYPE_CHECKING:
    import zarr

ENDINGS = (".ome.zarr", ".zarr", ".nii", ".nii.gz", ".ome.tif", ".ome.tiff")
_NGFF_UNITS = {"nm": "nanometer", "um": "micrometer", "mm": "millimeter", "cm": "centimeter", "m": "meter"}
LOCAL = -1
"""The level of objects that each tile numbers on its own."""
WRITTEN = "written"
"""The mark of a run of which an output, if there is one, is."""
_NAME_OF_LOCAL = "local"
_UNFINISHED = ".partial"  # how zarr's files end until they are written: a process that is killed leaves them
_COARSEST = 256  # places along an axis of which no coarser level is made
_EVEN = 1.5  # by how much a pixel may be longer than the shortest and still be halved


@dataclass(frozen=True)
class Store:
    """A prediction on disk.

    Attributes:
        partial: The folder.
        shape: Places along each axis.
        chunk: Places of a chunk.
        tile: Places of a tile, which is a shard of level 0.
        spacing: Distance between places along each axis.
        origin: Position of the first place's centre.
        unit: Of both.
        channels: Number of channels; None without that axis.
        dtype: Of what is stored.
        is_labels: Whether values are numbers of things, of which no mean is taken.
        has_local: Whether there is an array more, `LOCAL`, for tiles that are numbered each on its own.
    """

    partial: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    tile: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    unit: str
    channels: int | None
    dtype: str
    is_labels: bool
    has_local: bool = False

    @cached_property
    def factors(self) -> list[tuple[int, ...]]:
        """Level 0's places in one of each level, along each axis."""
        factors = [(1,) * len(self.shape)]
        while True:
            shape = self.level_shape(len(factors) - 1, factors)
            if max(shape) <= _COARSEST:
                return factors
            steps = [s * f for s, f in zip(self.spacing, factors[-1], strict=True)]
            long = [n > _COARSEST // 2 for n in shape]
            least = min(step for step, is_long in zip(steps, long, strict=True) if is_long)
            halved = (is_long and step <= _EVEN * least for step, is_long in zip(steps, long, strict=True))
            factors.append(tuple(f * (2 if half else 1) for f, half in zip(factors[-1], halved, strict=True)))

    def level_shape(self, level: int, factors: Sequence[Sequence[int]] | None = None) -> tuple[int, ...]:
        """Returns the places of a level along each axis."""
        factor = (self.factors if factors is None else factors)[level]
        return tuple(-(-n // f) for n, f in zip(self.shape, factor, strict=True))

    def create(self) -> None:
        """Makes the group and its arrays, which are zero."""
        zarr = import_zarr()
        group = zarr.open_group(str(self.partial / DATA), mode="w", zarr_format=3)
        for level in [*range(len(self.factors)), *([LOCAL] if self.has_local else [])]:
            shape = self.level_shape(max(level, 0))
            chunk = tuple(map(min, self.chunk, shape))
            shard = tuple(-(-min(t, n) // c) * c for t, n, c in zip(self.tile, shape, chunk, strict=True))
            lead = () if self.channels is None else (self.channels,)
            here, name = group, str(level)
            if level == LOCAL:
                here, name = zarr.open_group(str(self.partial / FOLDER), mode="a", zarr_format=3), _NAME_OF_LOCAL
            here.create_array(
                name,
                shape=(*lead, *shape),
                chunks=(*(1 for _ in lead), *chunk),
                shards=(*lead, *shard),
                dtype=self.dtype,
                fill_value=0,
                dimension_names=[*("c" for _ in lead), *_axes(shape)],
            )

    def array(self, level: int = 0) -> "zarr.Array":
        """Opens a level's array."""
        name = f"{FOLDER}/{_NAME_OF_LOCAL}" if level == LOCAL else f"{DATA}/{level}"
        return import_zarr().open_array(str(self.partial / name), mode="r+")

    def write(self, level: int, box: Box, values: np.ndarray) -> None:
        """Writes a part of a level, ``[*box]`` or ``[channels, *box]``."""
        self._array(level)[self._index(box)] = values

    def read(self, level: int, box: Box) -> np.ndarray:
        """Reads a part of a level."""
        return np.asarray(self._array(level)[self._index(box)])

    @cached_property
    def _arrays(self) -> dict[int, Any]:
        return {}

    def _array(self, level: int) -> Any:
        if level not in self._arrays:
            self._arrays[level] = self.array(level)
        return self._arrays[level]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_arrays", "factors")}

    def _index(self, box: Box) -> tuple[slice, ...]:
        return box.slices if self.channels is None else (slice(None), *box.slices)

    def tiles(self, level: int) -> list[Box]:
        """Returns the tiles of a level."""
        shape = self.level_shape(level)
        counts = [-(-n // t) for n, t in zip(shape, self.tile, strict=True)]
        places = np.ndindex(*counts)
        starts = (tuple(at * t for at, t in zip(place, self.tile, strict=True)) for place in places)
        return [Box(s, tuple(a + t for a, t in zip(s, self.tile, strict=True))).clipped(shape) for s in starts]

    def coarsen(self, level: int, box: Box) -> None:
        """Makes a part of a level of the level before: the mean, or the label that most places have."""
        step = [a // b for a, b in zip(self.factors[level], self.factors[level - 1], strict=True)]
        start = tuple(a * s for a, s in zip(box.start, step, strict=True))
        stop = tuple(b * s for b, s in zip(box.stop, step, strict=True))
        values = self.read(level - 1, Box(start, stop).clipped(self.level_shape(level - 1)))
        lead = [0] * (values.ndim - len(step))
        ends = [(0, -n % s) for n, s in zip(values.shape[len(lead) :], step, strict=True)]
        values = np.pad(values, [*((0, 0) for _ in lead), *ends], mode="edge")
        self.write(level, box, (_most_frequent if self.is_labels else _mean)(_cells(values, len(lead), step)))

    def write_metadata(self, name: str, described: dict[str, Any]) -> None:
        """Writes what OME-Zarr readers want to know: axes, and scale and translation of each level."""
        fmt = import_optional("ome_zarr.format", "predict").FormatV05()
        writer = import_writer()
        group = import_zarr().open_group(str(self.partial / DATA), mode="r+")
        lead = [] if self.channels is None else [{"name": "c", "type": "channel"}]
        unit = _NGFF_UNITS.get(self.unit, self.unit)
        axes = [*lead, *({"name": axis, "type": "space", "unit": unit} for axis in _axes(self.shape))]
        datasets = []
        for level, factor in enumerate(self.factors):
            scale = [s * f for s, f in zip(self.spacing, factor, strict=True)]
            shift = [o + (f - 1) / 2 * s for o, f, s in zip(self.origin, factor, self.spacing, strict=True)]
            transforms = [
                {"type": "scale", "scale": [*(1.0 for _ in lead), *scale]},
                {"type": "translation", "translation": [*(0.0 for _ in lead), *shift]},
            ]
            datasets.append({"path": str(level), "coordinateTransformations": transforms})
        writer.write_multiscales_metadata(group, datasets, fmt=fmt, axes=axes, name=name)
        ome = dict(group.attrs["ome"])
        group.attrs["ome"] = {**ome, **({"image-label": {"version": "0.5"}} if self.is_labels else {})}
        group.attrs["rat_timm"] = described

    def finish(self, output: Path, affine: np.ndarray | None = None) -> None:
        """Puts the finished prediction at its place, as the format that the name says."""
        name, new = output.name.lower(), self.partial / DATA
        if name.endswith(".zarr"):
            for file in new.rglob(f"*{_UNFINISHED}"):
                file.unlink(missing_ok=True)
        else:
            new = self.partial / FOLDER / output.name
            write_nifti(self, new, affine) if ".nii" in name[-7:] else write_ome_tiff(self, new)
        manifest = Manifest(self.partial)
        manifest.mark(WRITTEN)
        os.replace(new, output)
        manifest.remove()


def import_writer() -> ModuleType:
    """Imports what writes the metadata of OME-Zarr."""
    return import_optional("ome_zarr.writer", "predict")


def read_whole(output: Path) -> np.ndarray:
    """Reads level 0 of a prediction that is written as OME-Zarr, ``[*shape]`` or ``[channels, *shape]``."""
    return np.asarray(import_zarr().open_array(str(output / "0"), mode="r")[:])


def _axes(shape: Sequence[int]) -> str:
    return "zyx"[-len(shape) :]


def _cells(values: np.ndarray, lead: int, step: Sequence[int]) -> np.ndarray:
    """``[*lead, *size]`` -> ``[places in a cell, *lead, *size / step]``."""
    places = (tuple(slice(at, None, s) for at, s in zip(place, step, strict=True)) for place in np.ndindex(*step))
    return np.stack([values[(*[slice(None)] * lead, *place)] for place in places])


def _mean(cells: np.ndarray) -> np.ndarray:
    return cells.mean(axis=0, dtype=np.float32).astype(cells.dtype)


def _most_frequent(cells: np.ndarray) -> np.ndarray:
    """Returns the value that most places of a cell have; the first of several."""
    values, differ = cells[0].copy(), np.zeros(cells.shape[1:], bool)
    for place in cells[1:]:
        differ |= place != values
    mixed = cells[:, differ]  # few: borders of things
    count = (mixed[:, None] == mixed).sum(axis=1, dtype=np.uint8)
    values[differ] = np.take_along_axis(mixed, count.argmax(axis=0)[None], axis=0)[0]
    return values


def _planes(store: Store) -> Iterator[np.ndarray]:
    """Yields the planes of all channels, z first, then channels."""
    depth = store.shape[0] if len(store.shape) == 3 else 1
    for channel in range(store.channels or 1):
        for start in range(0, depth, store.chunk[0] if len(store.shape) == 3 else 1):
            box = Box.whole(store.shape)
            if len(store.shape) == 3:
                stop = min(start + store.chunk[0], depth)
                box = Box((start, *box.start[1:]), (stop, *box.stop[1:]))
            index: Any = box.slices if store.channels is None else (channel, *box.slices)
            values = np.asarray(store.array()[index])
            yield from values if len(store.shape) == 3 else [values]


def write_nifti(store: Store, file: Path, affine: np.ndarray | None) -> None:
    """Writes level 0 as NIfTI, plane by plane.

    Args:
        store: The prediction.
        file: Ends in .nii or .nii.gz.
        affine: From voxels (x, y, z) to the scanner's space, in mm. Default: along the axes.
    """
    nibabel = import_optional("nibabel", "data")
    to_mm = metres_of(store.unit) / metres_of("mm")
    if affine is None:
        axes = len(store.shape)
        affine = np.diag([*(s * to_mm for s in store.spacing[::-1]), *[1.0] * (3 - axes), 1.0])
        affine[:axes, 3] = [o * to_mm for o in store.origin[::-1]]
    header = nibabel.Nifti2Header() if max(store.shape) > 32767 else nibabel.Nifti1Header()
    header.set_data_dtype(np.dtype(store.dtype))
    shape = (*store.shape[::-1], *[1] * (3 - len(store.shape)))
    header.set_data_shape(shape if store.channels is None else (*shape, 1, store.channels))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = math.ceil((int(header["sizeof_hdr"]) + 4) / 16) * 16
    is_packed = file.name.lower().endswith(".gz")
    with gzip.GzipFile(file, "wb", mtime=0) if is_packed else file.open("wb") as stream:  # the same bytes at any time
        header.write_to(stream)
        stream.write(b"\0" * (int(header["vox_offset"]) - stream.tell()))
        for plane in _planes(store):
            stream.write(np.ascontiguousarray(plane).tobytes())


def write_ome_tiff(store: Store, file: Path) -> None:
    """Writes level 0 as OME-TIFF in tiles."""
    tifffile = import_optional("tifffile", "data")
    lead = () if store.channels is None else (store.channels,)
    keys = zip("ZYX"[-len(store.shape) :], store.spacing, strict=True)
    run = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(Manifest(store.partial).kept(NAME), sort_keys=True))
    metadata: dict[str, Any] = {"axes": "C" * len(lead) + "ZYX"[-len(store.shape) :], "UUID": f"urn:uuid:{run}"}
    for axis, step in keys:
        metadata |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": _OME_UNITS.get(store.unit, store.unit)}
    with tifffile.TiffWriter(file, bigtiff=True, ome=True) as tiff:
        tiff.write(
            _planes(store),
            shape=(*lead, *store.shape),
            dtype=store.dtype,
            metadata=metadata,
            photometric="minisblack",
            compression="zlib",
        )


_OME_UNITS = {"um": "\u00b5m"}
