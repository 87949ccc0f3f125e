"""From an image to a prediction: opens, plans, says what it will take, computes tiles, and puts the output together."""

import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..data.pyramid import Level
from ..data.units import metres_of
from ..geometry.box import Box
from ..geometry.grid import Grid, Tokens, exact_dtype, per_axis
from ..optional import import_optional
from . import engines
from .facts import as_trained
from .manifest import Manifest, image_digest, model_digest
from .measure import Difference, difference, tile_memory, window_memory
from .network import Network, load_model
from .options import OVERVIEW, Options
from .plan import Plan, make_plan
from .preview import draw
from .source import ImageLike, Masked, Scaled, open_levels, overview, rescaling
from .stitch import join, load_faces, relabel
from .store import ENDINGS, LOCAL, WRITTEN, Store, import_writer
from .work import FACES, Job, Work

_OVERVIEW_PIXELS = {1: 1 << 12, 2: 1 << 16, 3: 1 << 18}
_SLAB_PIXELS = 1 << 24
_LARGEST = 10.0  # times the scale of a network for instances
_LOOK = 32  # pixels to each side of the middle
_FAR = 20.0  # times what lies between two intensities; trained pixels have a deviation of about 1
TABLES, GAP = "tables", "difference.json"


class Prediction(NamedTuple):
    """What a run did.

    Attributes:
        output: Where the prediction is.
        pixels: How many pixels of the output it has.
        computed: How many of them this call computed; others were finished before.
        seconds: How long tiles took.
        difference: How far values may be from those of the whole image; None where they are the same.
    """

    output: Path
    pixels: int
    computed: int
    seconds: float
    difference: Difference | None


def predict(
    image: ImageLike,
    model: str | PathLike | nn.Module,
    output: str | PathLike,
    options: Options | None = None,
    **changes: Any,
) -> Prediction:
    """Predicts an image of any size, tile by tile, and writes the result with its pixel size.

    Tiles that are finished stay if a run ends early, by an error too; the same call goes on where it stopped.

    Args:
        image: What `rat_timm.data.read` reads (OME-Zarr, OME-TIFF, NIfTI, DICOM), or levels of an image in memory.
        model: A folder of `rat_timm.dense.Segmenter.save` or `rat_timm.hub.save`, ``hf-hub:owner/name``, a registered
            name, or a model.
        output: ``.ome.zarr``, ``.nii``, ``.nii.gz`` or ``.ome.tif``; its folder must be there, itself not.
        options: How; see `Options`.
        **changes: Any field of `Options`, to change ``options``.

    Raises:
        ValueError: If an argument does not fit, or an image cannot be read (`rat_timm.data.ReadError`).
        FileExistsError: If there is an output.
        OSError: If it cannot be written.
    """
    options = as_trained(dataclasses.replace(options or Options(), **changes), model)
    output = Path(output)
    _check_output(output)
    _check_preview(options.preview)
    import_writer()  # it writes last, hours after this
    engines.check(options.scheduler, options.workers)
    options = dataclasses.replace(options, device=_device(options.device))
    network = Network(load_model(model), options.task, options.stage, options.compile)
    network.model.to(options.device, getattr(torch, options.dtype))
    levels, masked = _open(image, network, options)
    _warn_of_scale(masked.level, options.intensities)
    said = _describe(network, levels, options)
    wanted = options.levels
    if wanted is None:
        wanted = [OVERVIEW] if network.unbounded else []
    network = dataclasses.replace(network, levels=1 + len(wanted))
    plan = _plan(network, masked.grid, options)
    wanted = [] if plan.is_whole and options.levels is None else wanted
    asked = dataclasses.replace(options, levels=wanted, progress=False)  # functions cannot be sent to workers
    job = _job(network, model, levels, masked, plan, asked, output, said)
    work, manifest = Work(job, network), Manifest(job.store.partial)
    if not manifest.begin(said, options.resume):
        job.store.create()
        for folder in (FACES, TABLES):
            (manifest.folder / folder).mkdir(exist_ok=True)
        manifest.write(said)
    gap = None if plan.is_exact else _gap(work)
    if options.progress is True:
        print(_forecast(work, gap), file=sys.stderr, flush=True)
    left = manifest.left("tile-", plan.count)
    begun = time.perf_counter()
    with engines.Workers(options.scheduler, options.workers) as workers:
        _compute(work, left, options, workers)
        seconds = time.perf_counter() - begun
        if options.task == "instances":
            _join(work, workers)
        _coarsen(job.store, manifest, workers)
    job.store.write_metadata(output.name.split(".")[0], _provenance(said, gap))
    if options.preview is not None:
        draw(job, levels, Path(options.preview))
    job.store.finish(output, _affine(image, plan, options))
    computed = sum(plan.box(tile).size for tile in left)
    return Prediction(output, plan.region.size, computed, seconds, gap)


def _gap(work: Work) -> Difference | None:
    """Measures the difference, or returns what the run that goes on measured."""
    manifest = work.manifest
    kept = manifest.kept(GAP)
    if kept is None:
        gap = difference(work)
        kept = {"difference": None if gap is None else gap._asdict()}
        manifest.keep(GAP, kept)
    return None if kept["difference"] is None else Difference(**kept["difference"])


def _check_output(output: Path) -> None:
    if not output.name.lower().endswith(ENDINGS):
        raise ValueError(f"output must end in one of {ENDINGS}, got {output.name}")
    if output.exists():
        before = Manifest.beside(output)
        if before.folder.is_dir() and (before.is_done(WRITTEN) or not before.is_there):
            before.remove()  # it was killed when the output was there
        raise FileExistsError(f"output {output} exists: delete it or give another name")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output's folder {output.parent} must be there")


def _check_preview(preview: str | PathLike | None) -> None:
    if preview is not None and (Path(preview).suffix.lower() != ".png" or not Path(preview).absolute().parent.is_dir()):
        raise ValueError(f"preview must be a .png in a folder that is there, got {str(preview)!r}")


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        raise ValueError(f"device must be one that PyTorch finds here, got {name!r}: {error}") from error
    return name


def _open(image: ImageLike, network: Network, options: Options) -> tuple[list[Level], Masked]:
    """Opens the image and what masks it, and checks that the model goes with it."""
    axes = network.axes
    spacing = options.spacing
    if spacing is not None:
        spacing = tuple(per_axis(spacing, "spacing", axes, positive=True)[0].tolist())
    levels = open_levels(image, options.unit, spacing, options.time, options.assumed_unit)
    grid = levels[0].grid
    if len(grid.shape) != axes:
        raise ValueError(f"image must have {axes} spatial axes, as the model has, got {len(grid.shape)}: {grid.shape}")
    if not 0 <= options.level < len(levels):
        raise ValueError(f"level must be from 0 to {len(levels) - 1}, got {options.level}")
    channels = len(levels[0].read([slice(0, 1)] * axes))
    if channels != network.in_chans:
        raise ValueError(f"image must have {network.in_chans} channels, as the model has, got {channels}")
    mask = options.background
    if isinstance(mask, str | PathLike):
        mask = open_levels(mask, options.unit, assumed_unit=options.assumed_unit)[0]
    if isinstance(mask, Level) and len(mask.grid.shape) != axes:
        raise ValueError(f"background must have {axes} axes, as the image has, got {mask.grid.shape}")
    mask = mask if isinstance(mask, Level) else None
    dtype = exact_dtype(getattr(torch, options.dtype))
    return levels, Masked(levels[options.level], mask, options.intensities, dtype)


def _warn_of_scale(level: Level, intensities: tuple[float, float] | None) -> None:
    """Warns if pixels in the middle of an image are so far from what becomes 0 and 1 that a model knows no such."""
    if intensities is None:
        return
    shape = level.grid.shape
    values = level.read([slice(max(0, n // 2 - _LOOK), min(n, n // 2 + _LOOK)) for n in shape]).double()
    values = values[values.isfinite()]
    low, high = intensities
    if len(values) and ((values - low) / (high - low)).abs().median() > _FAR:
        warnings.warn(
            f"image has pixels of {values.min():.6g} to {values.max():.6g}, far from the intensities {low:g} and "
            f"{high:g} that become 0 and 1: if the model was trained on images of another scale, give intensities",
            stacklevel=3,
        )


def _describe(network: Network, levels: Sequence[Level], options: Options) -> dict[str, Any]:
    from .. import __version__  # at the end of the package's import

    digests = {"model": model_digest(network.model), "image": image_digest(levels), "version": __version__}
    return {**digests, **options.described()}


def _provenance(said: dict[str, Any], gap: Difference | None) -> dict[str, Any]:
    """Returns what the output says of itself: no names of files."""
    kept = {name: said[name] for name in ("version", "model", "image", "task", "unit", "tile", "halo", "dtype")}
    return kept if gap is None else {**kept, "difference": gap._asdict()}


def _plan(network: Network, image: Grid, options: Options) -> Plan:
    out = _output_grid(network, image, options)
    largest = 0.0
    if options.task == "instances":
        largest = _LARGEST * (options.scale or 0.0) if options.largest is None else options.largest
    region = _region(image, out, options.region)
    return make_plan(network, image, out, region, tile=options.tile, halo=options.halo, largest=largest)


def _output_grid(network: Network, image: Grid, options: Options) -> Grid:
    if options.out is not None:
        step = per_axis(options.out, "out", len(image.shape), positive=True)
        lower, upper = image.corners()
        shape = tuple(max(1, math.floor(n + 0.5 + 1e-6)) for n in ((upper - lower) / step)[0].tolist())
        return Grid.create(shape, step[0].tolist(), (lower + step / 2)[0].tolist())
    if options.task == "features" and network.model is network.backbone:
        return network.map_grid(rescaling(image, network.spacing(image))[1])
    return image


def _region(image: Grid, out: Grid, region: Sequence[slice] | None) -> Box:
    if region is None:
        return Box.whole(out.shape)
    pairs = list(zip(region, image.shape, strict=False))
    bounds = [(part.start or 0, n if part.stop is None else part.stop) for part, n in pairs]
    valid = all(0 <= a < b <= n for (a, b), n in zip(bounds, image.shape, strict=False))
    if not valid or len(region) != len(image.shape) or any(part.step not in (None, 1) for part in region):
        raise ValueError(f"region must be one slice of pixels per axis within {image.shape}, got {list(region)}")
    start, stop = (tuple(side) for side in zip(*bounds, strict=True))
    if out is image:
        return Box(start, stop)
    ratio, count = (image.spacing / out.spacing)[0].tolist(), len(start)
    first = tuple(math.floor(a * r + 1e-6) for a, r in zip(start, ratio, strict=True))
    last = tuple(max(first[i] + 1, math.ceil(stop[i] * ratio[i] - 1e-6)) for i in range(count))
    return Box(first, last).clipped(out.shape)


def _job(
    network: Network,
    model: str | PathLike | nn.Module,
    levels: Sequence[Level],
    image: Masked,
    plan: Plan,
    options: Options,
    output: Path,
    said: dict[str, Any],
) -> Job:
    spacing = network.spacing(image.grid)
    wanted = options.levels or ()
    steps = [tuple(per_axis(s, "levels", network.axes)[0].tolist()) for s in wanted if not isinstance(s, str)]
    field: Tokens | None = None
    if OVERVIEW in wanted:
        pixels = math.prod(plan.working.shape) / _OVERVIEW_PIXELS[network.axes]
        factor = max(1.0, pixels ** (1 / network.axes))
        field = overview(levels, image, [s * factor for s in spacing]).read_in_slabs(_SLAB_PIXELS)
    labels = options.task in ("labels", "instances")
    dtype = "float32" if not labels else "uint8" if network.channels <= 256 else "uint16"
    out, start = plan.out, plan.out.spacing.new_tensor(plan.region.start)
    store = Store(
        Manifest.beside(output).partial,
        plan.region.shape,
        plan.chunk,
        plan.tile,
        tuple(out.spacing[0].tolist()),
        tuple((out.origin + start * out.spacing)[0].tolist()),
        options.unit,
        None if labels else network.channels,
        "uint32" if options.task == "instances" else dtype,
        labels,
        options.task == "instances",
    )
    place = model if isinstance(model, nn.Module) else os.path.abspath(model) if Path(model).exists() else str(model)
    contexts = tuple(overview(levels, image, step) for step in steps)
    return Job(options, place, plan, Scaled.at(image, spacing), contexts, field, store, said)


def _forecast(work: Work, gap: Difference | None) -> str:
    """Says what will be done, what memory it takes, and how far it may be from the whole."""
    plan, network = work.job.plan, work.network

    def size(numbers: Sequence[float]) -> str:
        return " x ".join(f"{n:g}" for n in numbers)

    window = window_memory(work)
    memory = "unknown" if window is None else f"{window / 2**30:.2f} GiB for a batch of windows"
    lines = [
        f"{size(plan.region.shape)} places of {size(plan.out.spacing[0].tolist())} {work.job.options.unit}, "
        f"computed at {size(plan.working.spacing[0].tolist())}: {plan.count} tiles of {size(plan.tile)} in windows of "
        f"{size(plan.edge)}",
        f"peak memory of a process: {memory}, and {tile_memory(work) / 2**30:.2f} GiB for a tile",
    ]
    if plan.is_exact:
        what = "windows see all that the model looks at" if not plan.is_whole else "one window sees the whole image"
        return "\n".join([*lines, f"equal to the whole image: {what}"])
    reasons = network.unbounded or [f"the model looks {size(network.reach)} pixels far, windows {size(plan.halo)}"]
    lines.append(f"not equal to the whole image, windows are blended: {'; '.join(reasons)}")
    if gap is not None:
        lines.append(
            f"999 of 1000 values differ from the whole's by less than {gap.usual:.2g} (mean {gap.mean:.2g}, at most "
            f"{gap.most:.2g}; the likeliest class of {100 * gap.changed:.2g}% of places changes): measured on "
            f"{gap.windows} windows, seen with longer halos"
        )
    return "\n".join(lines)


def _compute(work: Work, tiles: Sequence[int], options: Options, workers: engines.Workers) -> None:
    """Computes tiles; in this process, reads ahead and writes behind."""
    plan = work.job.plan
    total, count = sum(plan.box(tile).size for tile in tiles), 0
    with tqdm(total=total, unit="px", unit_scale=True, disable=options.progress is not True, desc="predict") as bar:

        def done(tile: int) -> None:
            nonlocal count
            count += plan.box(tile).size
            bar.update(plan.box(tile).size)
            if callable(options.progress):
                options.progress(count, total)

        if options.scheduler is None and not options.workers:
            work.expect(tiles)
        try:
            workers.run(work, tiles, done)
        finally:
            work.finish()


class Relabel:
    """Gives a tile's objects their numbers in the whole.

    Args:
        store: The prediction.
        plan: Its tiles.
    """

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store, self.plan = store, plan

    def __call__(self, tile: int) -> None:
        """Writes a tile's numbers."""
        manifest, box = Manifest(self.store.partial), self.plan.box(tile)
        table = np.load(manifest.folder / TABLES / f"{tile}.npy")
        labels = self.store.read(LOCAL, box)
        self.store.write(0, box, relabel(labels, table).astype(self.store.dtype))
        manifest.mark(f"relabel-{tile}")


def _join(work: Work, workers: engines.Workers) -> None:
    """Makes one object of those that tiles cut, and numbers all."""
    plan, store, manifest = work.job.plan, work.job.store, work.manifest
    faces, tables = manifest.folder / FACES, manifest.folder / TABLES

    def load(tile: int, only: Sequence[tuple[int, ...]]) -> Any:
        file = faces / f"{tile}.npz"
        return load_faces(file, only) if file.exists() else None

    if not manifest.is_done("joined"):
        for tile, table in enumerate(join(plan.tiles, load).tables):
            new = tables / f"{tile}.new.npy"
            np.save(new, table)
            os.replace(new, tables / f"{tile}.npy")
        manifest.mark("joined")
    left = [tile for tile in manifest.left("relabel-", plan.count) if (faces / f"{tile}.npz").exists()]
    workers.run(Relabel(store, plan), left)


class Coarsen:
    """Makes a tile of a coarser level.

    Args:
        store: The prediction.
        level: Of the level.
    """

    def __init__(self, store: Store, level: int) -> None:
        self.store, self.level = store, level

    def __call__(self, tile: int) -> None:
        """Writes a tile."""
        self.store.coarsen(self.level, self.store.tiles(self.level)[tile])


def _coarsen(store: Store, manifest: Manifest, workers: engines.Workers) -> None:
    for level in range(1, len(store.factors)):
        if not manifest.is_done(f"level-{level}"):
            tiles = range(len(store.tiles(level)))
            workers.run(Coarsen(store, level), tiles)
            manifest.mark(f"level-{level}")


def _affine(image: ImageLike, plan: Plan, options: Options) -> np.ndarray | None:
    """Returns where voxels of the output are in the space of a NIfTI image; None if the image is another."""
    name = str(image).lower() if isinstance(image, str | PathLike) else ""
    if not name.endswith((".nii", ".nii.gz")) or options.spacing is not None:
        return None
    affine = import_optional("nibabel", "data").load(str(image)).affine
    own = np.linalg.norm(affine[:3, :3], axis=0)  # (x, y, z), mm
    turn, to_mm = affine[:3, :3] / own, metres_of(options.unit) / metres_of("mm")
    missing = [1.0] * (3 - len(plan.out.shape))
    first = (plan.out.origin + plan.out.spacing.new_tensor(plan.region.start) * plan.out.spacing)[0]
    sizes = np.array([*(s * to_mm for s in plan.out.spacing[0].tolist()[::-1]), *missing])
    shift = np.array([*(o * to_mm for o in first.tolist()[::-1]), *missing]) - own / 2  # from centre to centre
    shift[len(plan.out.shape) :] = 0
    out = np.eye(4)
    out[:3, :3] = turn * sizes
    out[:3, 3] = affine[:3, 3] + turn @ shift
    return out
