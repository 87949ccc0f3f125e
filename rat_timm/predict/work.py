"""What is done for a tile: its windows are read, the model computes them, and the tile is written."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dense.decoders import BEYOND
from ..dense.instances import instances
from ..dense.segmenter import SHARE
from ..geometry.box import Box, part_of, places_around
from ..geometry.grid import Grid, Tokens, fill
from ..geometry.sample import sample_at
from .ahead import Behind, ahead
from .manifest import Manifest
from .network import Network, load_model
from .options import Options
from .plan import Plan, Window
from .source import Scaled
from .stitch import faces_of, save_faces
from .store import LOCAL, Store

_SAME = 1e-6
FACES = "faces"


class Sight(NamedTuple):
    """What the model sees for a window.

    Attributes:
        window: The window.
        levels: The image there and its context, ``[1, *size, C]``; empty where there is nothing to predict.
    """

    window: Window
    levels: list[Tokens]


class End(NamedTuple):
    """Follows the last window of a tile.

    Attributes:
        tile: The tile's number.
    """

    tile: int


@dataclass(frozen=True)
class Job:
    """All that a tile's computation depends on; it can be pickled.

    Attributes:
        options: What the user asks.
        model: Where the model is, or the model.
        plan: Tiles and windows.
        image: The image at the pixel size at which the model computes.
        contexts: The image at the pixel sizes of further levels, cut around each window.
        overview: The whole field, ``[1, *size, C]``; None without one.
        store: Where tiles are written.
        said: What the run is.
    """

    options: Options
    model: str | Path | nn.Module
    plan: Plan
    image: Scaled
    contexts: tuple[Scaled, ...]
    overview: Tokens | None
    store: Store
    said: dict[str, Any]


class Work:
    """Computes and writes tiles, each on its own.

    Args:
        job: What to do.
        network: The model, if it is loaded.
    """

    def __init__(self, job: Job, network: Network | None = None) -> None:
        self.job = job
        self._network = network
        self._stream: Iterator[Sight | End] | None = None
        self._behind: Behind | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"job": self.job}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["job"])  # type: ignore[misc]

    @property
    def network(self) -> Network:
        """The model, loaded when it is first used."""
        if self._network is None:
            options = self.job.options
            model = load_model(self.job.model).to(options.device, getattr(torch, options.dtype))
            self._network = Network(model, options.task, options.stage, options.compile)
        return self._network

    @property
    def manifest(self) -> Manifest:
        """The run's state."""
        return Manifest(self.job.store.partial)

    def expect(self, tiles: Sequence[int]) -> None:
        """Reads ahead across tiles and writes behind, for a process that computes these tiles in this order."""
        self._stream, self._behind = self._read_ahead(tiles), Behind()

    def finish(self) -> None:
        """Waits until all is written."""
        if self._behind is not None:
            self._behind.wait()
        self._stream = self._behind = None

    def __call__(self, tile: int) -> None:
        """Computes and writes a tile."""
        if self.manifest.is_done(f"tile-{tile}"):
            return
        known = self.job.plan.known(tile)
        values, predicted = self.values(known, self._sights(tile))
        write = partial(self._write, tile, values, predicted)
        write() if self._behind is None else self._behind.start(write)

    def _sights(self, tile: int) -> Iterator[Sight]:
        stream = self._read_ahead([tile]) if self._stream is None else self._stream
        for sight in stream:
            if isinstance(sight, End):
                assert sight.tile == tile
                return
            yield sight

    def _read_ahead(self, tiles: Sequence[int]) -> Iterator[Sight | End]:
        def jobs() -> Iterator[Callable[[], Sight | End]]:
            for tile in tiles:
                for window in self.job.plan.windows(self.job.plan.known(tile), self.network):
                    yield partial(self.see, window)
                yield partial(End, tile)

        return ahead(jobs(), 2 * self.job.options.batch_size)

    def see(self, window: Window, seen: Box | None = None) -> Sight:
        """Reads what the model sees for a window, with other pixels than the window's own if asked for."""
        image, plan = self.job.image, self.job.plan
        seen = window.seen if seen is None else seen
        tokens, pixels = image.read(seen)
        own = places_around(window.box.moved(plan.region.start), plan.out, image.image.grid)
        own = own.inside(image.source(seen)).clipped(pixels.grid.shape)
        if not self._has_data(pixels, own):
            return Sight(window, [])
        levels = [tokens, *(around(context, tokens.grid) for context in self.job.contexts)]
        return Sight(window, [*levels, *([] if self.job.overview is None else [self.job.overview])])

    def _has_data(self, pixels: Tokens, own: Box) -> bool:
        index = (slice(None), *own.slices)
        if pixels.mask is not None and not bool(pixels.mask[index].any()):
            return False
        background = self.job.options.background
        if not isinstance(background, int | float):
            return True
        low, high = self.job.options.intensities or (0.0, 1.0)
        return bool((pixels.x[index] * (high - low) + low > background).any())

    def values(self, box: Box, sights: Iterable[Sight]) -> tuple[Tensor, Tensor]:
        """Computes a box of the region.

        Args:
            box: The box.
            sights: Its windows.

        Returns:
            Values ``[*box, channels]``, zero where nothing is predicted, and where something is, ``[*box]``.
        """
        total = torch.zeros(*box.shape, self.network.channels, dtype=self.job.image.image.dtype)
        predicted = torch.zeros(box.shape, dtype=torch.bool)
        for batch in _batches(sights, self.job.options.batch_size):
            maps, masks = self.compute(batch)
            for index_, sight in enumerate(batch):
                part = sight.window.box & box
                if part.size == 0:
                    continue
                map_ = Tokens(
                    maps[index_ : index_ + 1],
                    self.network.map_grid(sight.levels[0].grid),
                    None if masks is None else masks[index_ : index_ + 1],
                )
                values = self.at_places(map_, part)
                weight = sight.window.weight(part)
                index = part.inside(box).slices
                predicted[index] = True
                if weight is None:
                    total[index] = values
                else:
                    total[index] += weight * values
        valid = self.valid(box)
        if valid is not None:
            predicted &= valid
        return fill(total, None if bool(predicted.all()) else predicted), predicted

    def compute(self, batch: Sequence[Sight]) -> tuple[Tensor, Tensor | None]:
        """Runs the model on windows of one shape: ``[B, *map, channels]``, and which places are valid."""
        options = self.job.options
        images, grids, masks = [], [], []
        for level in zip(*(sight.levels for sight in batch), strict=True):
            x = torch.cat([tokens.x for tokens in level]).movedim(-1, 1)
            images.append(x.to(options.device, getattr(torch, options.dtype)))
            grids.append([tokens.grid for tokens in level])
            masks.append(_joined_mask(level, options.device))
        with torch.inference_mode():
            maps, valid = self.network(images, grids, masks)
        return maps.cpu(), None if valid is None else valid.cpu()

    def at_places(self, map_: Tokens, part: Box) -> Tensor:
        """Brings a window's map ``[1, *map, channels]`` to a box of the region, ``[*part, channels]``."""
        places, maps = part_of(self.job.plan.out, part.moved(self.job.plan.region.start)), map_.grid
        start = ((places.origin - maps.origin) / maps.spacing)[0]
        if _have_one_spacing(places, maps) and bool(((start - start.round()).abs() < _SAME).all()):
            box = Box.whole(part.shape).moved([int(n) for n in start.round().tolist()])
            if box.clipped(maps.shape) == box:
                return map_.x[0][box.slices]
        return sample_at(map_, places, BEYOND).x[0]

    def valid(self, box: Box) -> Tensor | None:
        """Returns which places of a box of the region valid pixels of the image have a share in; None for all."""
        plan, image = self.job.plan, self.job.image.image
        if image.mask is None:
            return None
        box = box.moved(plan.region.start)
        places = part_of(plan.out, box)
        if _have_one_spacing(plan.out, image.grid):
            valid = image.valid(places)
            return None if valid is None else valid[0]
        if _have_one_spacing(plan.out, plan.maps):
            return None  # the model says it
        near = places_around(box, plan.out, image.grid).grown([1] * len(box.start)).clipped(image.grid.shape)
        grid = part_of(image.grid, near)
        mask = image.valid(grid)
        assert mask is not None
        return sample_at(Tokens(mask.float().unsqueeze(-1), grid), places).x[0, ..., 0] > SHARE

    def _write(self, tile: int, values: Tensor, predicted: Tensor) -> None:
        box, known = self.job.plan.box(tile), self.job.plan.known(tile)
        inner = box.inside(known)
        self.manifest.check(self.job.said)
        if self.job.options.task == "instances":
            self._write_objects(tile, values, predicted, inner)
        elif bool(predicted[inner.slices].any()):
            result = finished(self.job.options.task, values, predicted)[inner.slices]
            result = result if self.job.store.channels is None else result.movedim(-1, 0)
            self.job.store.write(0, box, result.numpy().astype(self.job.store.dtype))
        self.manifest.mark(f"tile-{tile}")

    def _write_objects(self, tile: int, values: Tensor, predicted: Tensor, inner: Box) -> None:
        """Writes the objects of a tile, numbered on its own, and its faces for those that join them."""
        labels = objects(values, predicted, self.job.plan.out, self.job.options).numpy()
        mine = labels[inner.slices]
        if mine.any():
            save_faces(self.manifest.folder / FACES / f"{tile}.npz", faces_of(labels, inner.slices))
            self.job.store.write(LOCAL, self.job.plan.box(tile), mine.astype(self.job.store.dtype))


def _have_one_spacing(grid: Grid, other: Grid) -> bool:
    return bool(((grid.spacing / other.spacing - 1).abs() < _SAME).all())


def objects(values: Tensor, predicted: Tensor, out: Grid, options: Options) -> Tensor:
    """Returns the objects ``[*box]`` that a network for instances sees; see `rat_timm.dense.instances`."""
    step = tuple(out.spacing[0].tolist())
    return instances(values.movedim(-1, 0)[None], step, **options.of_objects(), mask=predicted[None])[0]


def finished(task: str, values: Tensor, predicted: Tensor) -> Tensor:
    """Makes labels or probabilities of logits ``[*box, channels]``, 0 where nothing is predicted."""
    if task == "features":
        return values
    if task == "labels":
        labels = values[..., 0] > 0 if values.shape[-1] == 1 else values.argmax(dim=-1)
        return labels.long() * predicted
    shares = values.sigmoid() if values.shape[-1] == 1 else values.softmax(dim=-1)
    return fill(shares, predicted)


def around(context: Scaled, window: Grid) -> Tokens:
    """Reads as many pixels around a window as it has, at another pixel size; what is outside is masked."""
    grid, shape = context.grid, window.shape
    middle = (window.corners()[0] + window.corners()[1]) / 2
    first = ((middle - grid.origin) / grid.spacing)[0] - (torch.tensor(shape) - 1) / 2
    start = [int(at) for at in (first + 0.5).floor().tolist()]
    box = Box(tuple(start), tuple(a + n for a, n in zip(start, shape, strict=True)))
    inside = box.clipped(grid.shape)
    tokens, _ = context.read(inside)
    index = (slice(None), *inside.inside(box).slices)
    x = tokens.x.new_zeros(1, *shape, tokens.x.shape[-1])
    x[index] = tokens.x
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    mask[index] = True if tokens.mask is None else tokens.mask
    return Tokens(x, part_of(grid, box), mask)


def _batches(sights: Iterable[Sight], size: int) -> Iterator[list[Sight]]:
    """Puts windows of one shape together; those without data are left out."""
    waiting: dict[tuple, list[Sight]] = {}
    for sight in sights:
        if not sight.levels:
            continue
        key = tuple(tokens.grid.shape for tokens in sight.levels)
        batch = waiting.setdefault(key, [])
        batch.append(sight)
        if len(batch) == size:
            yield waiting.pop(key)
    yield from waiting.values()


def _joined_mask(level: Sequence[Tokens], device: str | None) -> Tensor | None:
    if all(tokens.mask is None or bool(tokens.mask.all()) for tokens in level):
        return None
    full = [torch.ones(t.x.shape[:-1], dtype=torch.bool) if t.mask is None else t.mask for t in level]
    return torch.cat(full).to(device)
