"""What a run is, on disk: digests of model, image and options, and a mark for each tile that is finished.

An interrupted run leaves a folder beside its output, ``OUTPUT.partial``. The same call goes on there; one with another
model, image or option is an error. Whenever a run is killed, what is there is a run to go on with, or none:

    OUTPUT.partial/data         the output as OME-Zarr; there before the manifest, moved or removed after it
    OUTPUT.partial/.predict     the manifest, without which the folder is no run, and marks of what is finished
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

FOLDER, DATA, NAME, DONE = ".predict", "data", "manifest.json", "done"
_SAMPLES, _EDGE = 5, 32  # parts of an image that its digest is of, and their pixels along each axis


class Manifest:
    """The state of a run.

    Args:
        partial: The folder that the run writes to.
    """

    def __init__(self, partial: Path) -> None:
        self.partial = partial
        self.folder = partial / FOLDER

    @classmethod
    def beside(cls, output: Path) -> "Manifest":
        """Returns the state of the run whose output will be there; for workers that began in another folder too."""
        return cls(output.absolute().with_name(f"{output.name}.partial"))

    def begin(self, described: Mapping[str, Any], resume: bool) -> bool:
        """Starts a run, or goes on with one.

        Args:
            described: What the run is, by "model", "image" and the names of options.
            resume: Whether to go on.

        Returns:
            Whether there is a run to go on with.

        Raises:
            ValueError: If the one that is there is another, or the folder is none of a run.
        """
        if resume and self.is_there:
            before = json.loads(self._file.read_text())
            other = sorted(key for key in before.keys() | described.keys() if before.get(key) != described.get(key))
            if other:
                raise ValueError(
                    f"{self.partial} has an unfinished run with other {', '.join(other)}: finish it with the same "
                    "arguments, delete it, or begin again with resume=False (--restart)"
                )
            return True
        self.remove()
        (self.folder / DONE).mkdir(parents=True)
        return False

    @property
    def _file(self) -> Path:
        return self.folder / NAME

    @property
    def is_there(self) -> bool:
        """Whether there is a run whose output is not there yet."""
        return self._file.is_file() and (self.partial / DATA).is_dir()

    def remove(self) -> None:
        """Removes the folder; whenever that is cut short, no run is left.

        Raises:
            ValueError: If it is none of a run.
        """
        if not self.partial.exists():
            return
        if not self.folder.is_dir() and any(self.partial.iterdir()):
            raise ValueError(f"{self.partial} is no folder of a run, which would be kept there: move it away")
        self._file.unlink(missing_ok=True)
        for folder in (self.partial / DATA, self.partial):  # the one that says whose it is goes last
            if folder.exists():
                shutil.rmtree(folder)

    def write(self, described: Mapping[str, Any]) -> None:
        """Writes what the run is, once its files are there."""
        self.keep(NAME, described)

    def check(self, described: Mapping[str, Any]) -> None:
        """Checks that the run goes on, before something is written: on a cluster, work may outlive its run.

        Raises:
            FileNotFoundError: If the run has ended, or another has begun.
        """
        if not self._file.is_file() or json.loads(self._file.read_text()) != described:
            raise FileNotFoundError(2, f"{self.partial}: the run has ended, and this is work of it", str(self.partial))

    def keep(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps a value as JSON."""
        new = self.folder / f"{name}.new"
        new.write_text(json.dumps(value, indent=1, sort_keys=True))
        os.replace(new, self.folder / name)

    def kept(self, name: str) -> dict[str, Any] | None:
        """Returns a value that was kept; None if there is none."""
        file = self.folder / name
        return json.loads(file.read_text()) if file.is_file() else None

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
