"""Scenes of tissue in which what a cell is and where it is decide together, in 2D and 3D, at any pixel size.

Regions a few hundred micrometres wide differ in one thing: how cells are arranged over them. How likely a place has a
cell is a wave, in rows (it varies along y) or in columns (along x), a little turned. Both have cells of the same kinds
and as many of them. A crop is less than half a wavelength wide and has four places of cells on its side: it hardly
tells which way the wave runs; an overview of a region does. Cells are of two kinds, with and without a texture whose
mean is that of the other kind: what tells them apart is gone at pixels as wide as the texture's wave.

A scene is a function of its seed and of physical position: in any field of view, at any pixel size, it is the same.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from studies.places import area_axes, around, direction, dot, edge, lattice, pixels

CELLS = ("textured", "plain")
ARRANGEMENTS = ("rows", "columns")
CLASSES = ("background", *(f"{cell} cells in {where}" for where in ARRANGEMENTS for cell in CELLS))
DEPTH = 0.3  # by how much the chance of a cell is more and less than a half
TURN = 0.3  # radians by which a wave is turned, at most
BACKGROUND, LIGHT, CONTRAST = 0.1, 0.65, 0.3
BLUR = 0.4  # standard deviation, micrometres
FINE = 1.0  # micrometres that area sampling tells apart, at most


@dataclasses.dataclass(frozen=True)
class Tissue:
    """Lengths, in micrometres.

    Attributes:
        diameter: Of cells.
        pitch: Distance of neighbouring places that may have a cell.
        texture: Wavelength of the texture of cells.
        wavelength: That of the arrangement.
        region: Distance of neighbouring regions' middles.
    """

    diameter: float
    pitch: float
    texture: float
    wavelength: float
    region: float


class Field(NamedTuple):
    """What is seen, and what it is.

    Attributes:
        image: ``[*size]``, float32, about 0 to 1, without noise.
        labels: The index of `CLASSES` at the centre of each pixel, ``[*size]``, uint8.
    """

    image: np.ndarray
    labels: np.ndarray


def render(
    tissue: Tissue, seed: int, size: Sequence[int], spacing: Sequence[float], corner: Sequence[float] | None = None
) -> Field:
    """Renders a field of view of a scene, with area sampling.

    Args:
        tissue: What it is of.
        seed: Which scene.
        size: Pixels.
        spacing: Their size in micrometres.
        corner: Where the field of view begins. Default: at 0.
    """
    begin = [0.0] * len(size) if corner is None else corner
    axes, parts = area_axes(size, spacing, begin, FINE)
    fine = [step / part for step, part in zip(spacing, parts, strict=True)]
    image, cells = _cells(tissue, axes, seed)
    image = pixels(gaussian_filter(image, [BLUR / step for step in fine]), parts)
    centres, _ = area_axes(size, spacing, begin, np.inf)
    if max(parts) > 1:
        _, cells = _cells(tissue, centres, seed)
    return Field(
        image, np.where(cells < 0, 0, 1 + len(CELLS) * regions(tissue, centres, seed) + cells).astype(np.uint8)
    )


def regions(tissue: Tissue, axes: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Returns the index of `ARRANGEMENTS` at each place."""
    points, chance = lattice(axes, tissue.region, _of(seed, 1), disturbed=0.2)
    at = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    return _kind(chance(0), len(ARRANGEMENTS))[cKDTree(points).query(at)[1]]


def _kind(chance: np.ndarray, count: int) -> np.ndarray:
    return (chance * count).astype(np.int64)


def _cells(tissue: Tissue, axes: Sequence[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the cells, and says which kind the one at each place is; -1 where there is none."""
    points, chance = lattice(axes, tissue.pitch, _of(seed, 0), disturbed=0.2)
    there = chance(0) < _occupied(tissue, axes, points, seed)
    kind, phase, wave = _kind(chance(1), len(CELLS)), chance(2), direction(chance, 4, len(axes))
    radius = tissue.diameter / 2 * (0.9 + 0.2 * chance(3))
    image = np.full([len(axis) for axis in axes], BACKGROUND, np.float32)
    depth, cells = np.zeros_like(image), np.full(image.shape, -1, np.int64)
    for index in np.flatnonzero(there):
        part, away = around(axes, points[index], radius[index])
        inside = radius[index] - np.sqrt(dot(away, away))
        light = LIGHT
        if kind[index] == 0:
            light = LIGHT + CONTRAST * np.cos(2 * np.pi * (dot(away, wave[index]) / tissue.texture + phase[index]))
        nearer = inside > depth[part]  # where cells overlap, the one that reaches further out is seen
        image[part] = np.where(nearer, BACKGROUND + edge(inside) * (light - BACKGROUND), image[part])
        cells[part] = np.where(nearer, kind[index], cells[part])
        depth[part] = np.maximum(depth[part], inside)
    return image, cells


def _occupied(tissue: Tissue, axes: Sequence[np.ndarray], points: np.ndarray, seed: int) -> np.ndarray:
    """Returns how likely there is a cell at each of the points ``[N, axes]``."""
    middles, chance = lattice(axes, tissue.region, _of(seed, 1), disturbed=0.2)
    kind, key = _kind(chance(0), len(ARRANGEMENTS)), (chance(1) * (1 << 24)).astype(np.int64)
    region = cKDTree(middles).query(points)[1]
    occupied = np.empty(len(points))
    for index in np.unique(region):
        here = region == index
        rng = np.random.default_rng([seed, key[index]])
        wave = _wave(ARRANGEMENTS[kind[index]], len(axes), rng.uniform(-TURN, TURN)) / tissue.wavelength
        occupied[here] = 0.5 + DEPTH * np.cos(2 * np.pi * (points[here] @ wave + rng.uniform()))
    return occupied


def _wave(arrangement: str, axes: int, turn: float) -> np.ndarray:
    """Returns the direction along which an arrangement varies, in the plane of the last two axes, ``[axes]``."""
    along = np.zeros(axes)
    along[-2:] = (np.cos(turn), np.sin(turn)) if arrangement == "rows" else (np.sin(turn), np.cos(turn))
    return along


def _of(seed: int, what: int) -> int:
    """Seeds of different things in a scene."""
    return 2 * seed + what
