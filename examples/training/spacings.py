"""The pixel sizes that training and validation had, which a model's range is made of."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from rat_timm.data import Batch
from training.processes import gather, on_first, rank


class Spacings:
    """The smallest and the largest pixel size per axis, of all processes once they are saved.

    Args:
        file: Where they are kept beside the checkpoints.
        again: Whether training goes on, so that those of before count.
    """

    def __init__(self, file: Path, again: bool) -> None:
        self.file = file
        text = on_first(lambda: file.read_text() if again and file.exists() else "[]")
        self.pairs: list[list[float]] = json.loads(text)

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Hands batches on, whose spacings are on the CPU."""
        for batch in batches:
            low, high = batch.spacing.aminmax(dim=0)
            self._extend(torch.stack((low, high), dim=1).tolist())
            yield batch

    def _extend(self, pairs: list[list[float]]) -> None:
        known = self.pairs or pairs
        self.pairs = [[min(a[0], b[0]), max(a[1], b[1])] for a, b in zip(known, pairs, strict=True)]

    def save(self) -> None:
        """Writes them; every process calls this."""
        for pairs in gather(self.pairs):
            self._extend(pairs or self.pairs)
        if rank() == 0:
            unfinished = self.file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.pairs))
            unfinished.rename(self.file)

    def range(self) -> list[list[float]] | None:
        """Returns (low, high) per axis; None if there were no batches."""
        return self.pairs or None
