"""The tokens of adaptive patches: prefix tokens and a set of patches in one sequence."""

from typing import Any, NamedTuple

from torch import Tensor

from ...geometry.grid import Positions, fill
from ...layers.adaptive_patching import Patches
from ...layers.head import with_mask
from ..vit.sequence import pad_prefix


class PatchSequence(NamedTuple):
    """Prefix tokens and patches of one image; see `rat_timm.models.vit.sequence.VitSequence`.

    Attributes:
        x: Prefix tokens and patches, ``[B, P + N, C]``.
        prefix: Number of prefix tokens.
        patches: The patches, and where they are.
        positions: Where all tokens are, ``[B, P + N]`` per axis; None if blocks do not ask.
    """

    x: Tensor
    prefix: int
    patches: Patches
    positions: Positions | None

    @property
    def valid(self) -> Tensor | None:
        """Which patches are valid, ``[B, N]``; None if all are."""
        return self.patches.mask

    def block_args(self, index: int) -> dict[str, Any]:
        """Returns where the tokens are."""
        return {} if self.positions is None else {"positions": self.positions}

    def sequences(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[B, P + N, C]`` with zeros for invalid patches, and with their mask."""
        return with_mask(self._fill(x), self.valid)

    def maps(self, x: Tensor, output_fmt: str) -> Tensor:
        """Returns the patches alone, ``[B, N, C]``, whatever the format: they form no map."""
        return self._fill(x)[:, self.prefix :]

    def places(self, count: int) -> dict[str, Any]:
        """Returns the patches, which are the same for all maps."""
        return {"patches": self.patches}

    def _fill(self, x: Tensor) -> Tensor:
        return x if self.valid is None else fill(x, pad_prefix(self.valid, self.prefix))
