"""The tokens of a pyramid: prefix tokens and the patches of all levels in one sequence."""

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
