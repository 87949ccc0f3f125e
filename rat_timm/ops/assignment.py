"""Which token went to which group: the soft assignments of a grouping, and their chain over the stages.

The chain maps the tokens of stage 1 to the groups of the last stage: a segmentation that needs no decoder
(arXiv 2505.16993).

```python
import timm
import torch

from rat_timm.layers import compose, to_pixels

model, images = timm.create_model("test_rat"), torch.randn(1, 3, 192, 256)
out = model.forward_intermediates(images, output_dict=True, return_assignments=True)
shares = compose(out["assignments"])  # [1, 48, 64, 48]
labels = to_pixels(shares.argmax(-1), (4, 4), images.shape[2:])  # [1, 192, 256]
```

The share of each of 48 x 64 tokens in each of 6 x 8 groups becomes a label of each pixel.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .windows import Tiles


class Assignment(NamedTuple):
    """The matrices of one grouping in tiles: only pairs of group and token that interact are held.

    Attributes:
        attn_q: Ah of `rat_timm.layers.grouping`, a token's share in each group, ``[tiles, B, heads, groups, tokens]``.
        attn_k: A, a group's attention to each token, same shape.
        tiles: Where the tiles' tokens (as queries) and groups (as keys) stand.
        coarse: Shape of the groups' grid.
    """

    attn_q: Tensor
    attn_k: Tensor
    tiles: Tiles
    coarse: tuple[int, ...]

    def carry_up(self, x: Tensor) -> Tensor:
        """Gives each token the mixture of its groups' features, averaged over heads.

        Args:
            x: ``[B, *coarse, C]``.

        Returns:
            ``[B, *fine, C]``, zero for a masked token.
        """
        groups = self.tiles.keys.take(x.unsqueeze(-2))  # [tiles, B, 1, groups, C]
        return self.tiles.untile(self.attn_q.mean(dim=2, keepdim=True).to(x.dtype).mT @ groups).squeeze(-2)


def carry_up(chain: Sequence[Assignment], x: Tensor) -> Tensor:
    """Carries features ``[B, *coarse, C]`` of the chain's last groups up to its first tokens, ``[B, *fine, C]``.

    Args:
        chain: Assignments of consecutive groupings, finest first.
        x: Features on the coarsest grid.
    """
    for assignment in reversed(chain):
        x = assignment.carry_up(x)
    return x


def compose(chain: Sequence[Assignment]) -> Tensor:
    """Composes assignments into the share of each first token in each last group.

    No matrix between fine grids is made on the way: the last groups are carried up as so many channels.

    Args:
        chain: Assignments of consecutive groupings, finest first.

    Returns:
        ``[B, *fine, G]`` with G the number of places of the coarsest grid, in order. Sums to 1 over the groups, to 0
        for a masked token.
    """
    last = chain[-1]
    count = math.prod(last.coarse)
    identity = torch.eye(count, dtype=last.attn_q.dtype, device=last.attn_q.device).unflatten(0, last.coarse)
    return carry_up(chain, identity.expand(last.attn_q.shape[1], *identity.shape))


def to_pixels(x: Tensor, stride: Sequence[int], size: Sequence[int]) -> Tensor:
    """Repeats tokens ``[B, *grid, ...]`` over the pixels of their stride cells, ``[B, *size, ...]``.

    Args:
        x: Anything that tokens have, such as the largest of their shares in groups.
        stride: Pixels per token and axis (``model.feature_info`` has it for each stage).
        size: The image's size; the last cell of an axis may be cut off.
    """
    for axis, (cell, length) in enumerate(zip(stride, size, strict=True), start=1):
        x = x.repeat_interleave(cell, dim=axis).narrow(axis, 0, length)
    return x
