"""What a run is, on disk: digests of model, image and options, and a mark for each tile that is finished.

An interrupted run leaves a folder beside its output, ``OUTPUT.partial``. The same call goes on there; one with another
model, image or option is an error.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.pyramid import Level
from ..geometry.box import Box

FOLDER, NAME, DONE = ".predict", "manifest.json", "done"
_SAMPLES, _EDGE = 5, 32  # parts of an image that its digest is of, and their pixels along each axis


class Manifest:
    """The state of a run.

    Args:
        partial: The folder that the run writes to.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.folder = partial / FOLDER

    def begin(self, described: Mapping[str, Any], resume: bool) -> bool:
        """Starts a run, or goes on with one.

        Args:
            described: What the run is, by "model", "image" and the names of options.
            resume: Whether to go on.

        Returns:
            Whether there is a run to go on with.

        Raises:
            ValueError: If the one that is there is another.
        """
        file = self.folder / NAME
        if resume and file.is_file():
            before = json.loads(file.read_text())
            other = sorted(key for key in before.keys() | described.keys() if before.get(key) != described.get(key))
            if other:
                raise ValueError(
                    f"{self.partial} has an unfinished run with other {', '.join(other)}: finish it with the same "
                    "arguments, delete it, or begin again with resume=False (--restart)"
                )
            return True
        shutil.rmtree(self.partial, ignore_errors=True)
        (self.folder / DONE).mkdir(parents=True)
        return False

    def write(self, described: Mapping[str, Any]) -> None:
        """Writes what the run is, once its files are there."""
        new = self.folder / f"{NAME}.new"
        new.write_text(json.dumps(described, indent=1, sort_keys=True))
        os.replace(new, self.folder / NAME)

    def mark(self, name: str) -> None:
        """Marks something as finished."""
        (self.folder / DONE / name).touch()

    def is_done(self, name: str) -> bool:
        """Tells whether something is finished."""
        return (self.folder / DONE / name).exists()

    def left(self, prefix: str, count: int) -> list[int]:
        """Returns which of the numbered things that have a prefix are not finished."""
        done = set(os.listdir(self.folder / DONE))
        return [number for number in range(count) if f"{prefix}{number}" not in done]


def model_digest(model: nn.Module) -> str:
    """Returns a SHA-256 of a model's architecture and weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    backbone: Any = getattr(model, "backbone", model)
    if hasattr(backbone, "model_args"):
        digest.update(json.dumps(backbone.model_args(), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def image_digest(levels: Sequence[Level]) -> str:
    """Returns a SHA-256 of where an image's pixels are, and of some of them: all of it may be terabytes."""
    digest = hashlib.sha256()
    for level in levels:
        grid = level.grid
        digest.update(f"{grid.shape} {grid.spacing.tolist()} {grid.origin.tolist()}".encode())
    shape = levels[0].grid.shape
    for share in np.linspace(0, 1, _SAMPLES):
        start = tuple(int(share * max(0, n - _EDGE)) for n in shape)
        box = Box(start, tuple(a + _EDGE for a in start)).clipped(shape)
        digest.update(np.ascontiguousarray(levels[0].read(box.slices).numpy()).tobytes())
    return digest.hexdigest()
