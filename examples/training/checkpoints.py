"""Checkpoints of a training: folders whose damage is seen."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

from training.engines import Engine
from training.processes import on_first, rank, wait

MANIFEST = "manifest.json"


class Checkpoints:
    """Folders with the state after so many steps; the last two are kept.

    Each has a manifest, written last, with the SHA-256 of its files, which PyTorch's and DeepSpeed's formats do not
    have. It tells damage, not malice: both formats hold pickles (PyTorch's distributed checkpoints in their metadata),
    and reading a pickle runs what whoever wrote it wanted to run. Go on only in folders that you trust.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, engine: Engine, step: int) -> None:
        """Saves the state; the folder has its name once all of it is written."""
        unfinished = self.folder / f"unfinished-{step:08}"
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        wait()
        engine.save(unfinished)
        wait()
        if rank() == 0:
            write_manifest(unfinished)
            shutil.rmtree(self.folder / f"{step:08}", ignore_errors=True)
            unfinished.rename(self.folder / f"{step:08}")
            for old in [path for path in self._finished() if int(path.name) <= step][:-2]:
                shutil.rmtree(old)

    def load_last(self, engine: Engine) -> int:
        """Loads the last state that is not damaged, if there is one; returns its number of steps.

        Raises:
            ValueError: If all are damaged.
        """
        wait()
        name = on_first(self._last)
        if name is None:
            return 0
        engine.load(self.folder / name)
        return int(name)

    def _last(self) -> str | None:
        finished = self._finished()
        for folder in reversed(finished):
            damage = find_damage(folder)
            if damage is None:
                return folder.name
            warnings.warn(f"{folder}: is damaged and left out: {damage}", stacklevel=2)
        if finished:
            raise ValueError(f"{self.folder}: all checkpoints are damaged: remove them to begin again")
        return None

    def _finished(self) -> list[Path]:
        folders = (path for path in self.folder.glob("*") if re.fullmatch("[0-9]{8,}", path.name) and path.is_dir())
        return sorted(folders, key=lambda path: int(path.name))


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of each file in a folder beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2))


def find_damage(folder: Path) -> str | None:
    """Returns what differs from a folder's manifest; None if all files are as they were written."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        changed = [name for name, digest in digests.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed" if changed else None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
