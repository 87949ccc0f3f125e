"""The tokens of a pyramid: prefix tokens and the patches of all levels in one sequence, or those that are valid."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry.grid import Tokens, channels_first, fill
from ...geometry.types import MapOrMaps
from ...layers.head import with_mask
from ...ops.masking import join_masks


class PyramidSequence(NamedTuple):
    """Prefix tokens and the patches of all levels; see `rat_timm.models.vit.sequence.VitSequence`.

    Attributes:
        x: Prefix tokens and patches, ``[B, P + N, C]``.
        prefix: Number of prefix tokens.
        rope: Of the patches, as timm's attention takes it, ``[1 or B, 1, N, 2 * head_dim]``, or one such per block and
            head, ``[depth, 1 or B, heads, N, 2 * head_dim]``.
        levels: The levels' patches: their grids and masks.
        single: Whether the user gave one image and not a list.
    """

    x: Tensor
    prefix: int
    rope: Tensor
    levels: list[Tokens]
    single: bool

    @property
    def valid(self) -> Tensor | None:
        """Which patches are valid, ``[B, N]``; None if all are."""
        return join_masks([level.mask for level in self.levels], [level.x.shape[:-1] for level in self.levels])

    def block_args(self, index: int) -> dict[str, Any]:
        """Returns the rotary embedding of a block."""
        return {"rope": self.rope[index] if self.rope.ndim == 5 else self.rope}

    def split(self, x: Tensor) -> list[Tensor]:
        """Splits patches from tokens ``[B, P + N, C]`` into ``[B, *grid, C]`` per level, zero where invalid."""
        sizes = [level.x.shape[1:-1].numel() for level in self.levels]
        parts = x[:, self.prefix :].split(sizes, dim=1)
        return [
            fill(part.unflatten(1, level.grid.shape), level.mask)
            for part, level in zip(parts, self.levels, strict=True)
        ]

    def sequences(self, x: Tensor) -> MapOrMaps:
        """Returns ``[B, P + patches, C]`` per level: the shared prefix tokens, and patches, zero where invalid."""
        prefix = x[:, : self.prefix]
        sequences = [
            with_mask(
                torch.cat((prefix, part.flatten(1, -2)), dim=1), None if level.mask is None else level.mask.flatten(1)
            )
            for part, level in zip(self.split(x), self.levels, strict=True)
        ]
        return self._unwrap(sequences)

    def maps(self, x: Tensor, output_fmt: str) -> MapOrMaps:
        """Returns ``[B, C, *grid]`` per level ("NCHW"), or ``[B, patches, C]`` ("NLC")."""
        parts = self.split(x)
        return self._unwrap(
            [channels_first(part).contiguous() if output_fmt == "NCHW" else part.flatten(1, -2) for part in parts]
        )

    def places(self, count: int) -> dict[str, Any]:
        """Returns the grids and masks of ``count`` maps."""
        return {
            "grids": [self._unwrap([level.grid for level in self.levels])] * count,
            "masks": [self._unwrap([level.mask for level in self.levels])] * count,
        }

    def _unwrap(self, per_level: list) -> Any:
        return per_level[0] if self.single else per_level


class ValidSequence(NamedTuple):
    """Prefix tokens and the valid patches alone; see `rat_timm.models.vit.sequence.VitSequence`.

    Attributes:
        x: Prefix tokens and patches, ``[B, P + K, C]``, where K is the largest number of valid patches in a sample.
        valid: Which of the patches are valid, ``[B, K]``: other samples are filled up. None if all are.
        rope: Of the patches, as in `PyramidSequence`.
        which: Which patches they are, ``[B, K]``.
        whole: All patches.
    """

    x: Tensor
    valid: Tensor | None
    rope: Tensor
    which: Tensor
    whole: PyramidSequence

    @classmethod
    def of(cls, whole: PyramidSequence) -> "ValidSequence | PyramidSequence":
        """Drops what is masked; a sequence without masks stays as it is."""
        if whole.valid is None:
            return whole
        most = max(1, int(whole.valid.sum(dim=1).max()))
        which = whole.valid.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        valid = whole.valid.gather(1, which)
        prefix, patches = whole.x[:, : whole.prefix], whole.x[:, whole.prefix :]
        x = torch.cat((prefix, patches.take_along_dim(which.unsqueeze(-1), dim=1)), dim=1)
        rows = which.view(*[1] * (whole.rope.ndim - 4), len(which), 1, most, 1)
        return cls(x, None if bool(valid.all()) else valid, whole.rope.take_along_dim(rows, dim=-2), which, whole)

    def block_args(self, index: int) -> dict[str, Any]:
        """Returns the rotary embedding of a block."""
        return self.whole._replace(rope=self.rope).block_args(index)

    def sequences(self, x: Tensor) -> MapOrMaps:
        """See `PyramidSequence.sequences`."""
        return self.whole.sequences(self._restored(x))

    def maps(self, x: Tensor, output_fmt: str) -> MapOrMaps:
        """See `PyramidSequence.maps`."""
        return self.whole.maps(self._restored(x), output_fmt)

    def places(self, count: int) -> dict[str, Any]:
        """See `PyramidSequence.places`."""
        return self.whole.places(count)

    def _restored(self, x: Tensor) -> Tensor:
        """Puts tokens ``[B, P + K, C]`` back where they were, ``[B, P + N, C]``, among zeros."""
        prefix = self.whole.prefix
        patches = x.new_zeros(len(x), self.whole.x.shape[1] - prefix, x.shape[-1])
        where = self.which.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat((x[:, :prefix], patches.scatter(1, where, x[:, prefix:])), dim=1)
