"""timm's rotary embeddings, evaluated at physical places instead of patch indices.

Each family is a set of frequency vectors, one per plane of channels, and a way to count: from patch to patch
(RoPE-mixed, arXiv 2403.13298), stretched to a reference grid (EVA-02, arXiv 2303.11331), or from -1 to 1 over the image
(DINOv3, arXiv 2508.10104). Here the coordinate is linear in the physical position, so that for an image of the
reference size at the reference spacing it is timm's, number for number.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from timm.layers import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed
from timm.layers.pos_embed_sincos import _apply_coord_augs
from torch import Tensor

TimmRotary: TypeAlias = RotaryEmbeddingCat | RotaryEmbeddingMixed | RotaryEmbeddingDinoV3
"""The rotary embeddings of timm's whose coordinates are evaluated here."""

_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


class Frame(NamedTuple):
    """How rotary coordinates are laid over physical space.

    Attributes:
        center: Physical position of the middle, ``[1 or B, axes]``.
        extent: Physical size of the image that the coordinates are laid over, in its plane (y, x), ``[1 or B, 2]``.
        patches: Number of its patches (y, x).
        depth: Physical distance along z that counts as a step from patch to patch does in the plane, ``[1 or B, 1]``;
            None for images.
    """

    center: Tensor
    extent: Tensor
    patches: tuple[int, int]
    depth: Tensor | None = None

    def relative(self, places: Tensor) -> Tensor:
        """Returns in-plane positions ``[1 or B, N, 2]`` (y, x), from -1 to 1 over the extent; float32."""
        plane = (places - self.center.unsqueeze(1))[..., -2:]
        return (2 * plane / self.extent.unsqueeze(1)).float()


def frequencies(rope: TimmRotary, axes: int) -> Tensor:
    """Returns the frequency vectors of a timm embedding in array-axis order, radians per unit of its coordinate.

    Along z, which no weights know, a plane's frequency is as large as in the image's plane, times a cosine that differs
    from plane to plane: a step along z looks like no step in the plane.

    Args:
        rope: timm's embedding.
        axes: 2 or 3.

    Returns:
        ``[planes, axes]``, or ``[depth, heads, planes, axes]`` where each block and head has its own.
    """
    if isinstance(rope, RotaryEmbeddingMixed):
        vectors = rope.freqs.float().movedim(0, -1)  # [depth, heads, planes, 2 or 3]
    else:
        bands = 2 * math.pi / rope.periods if isinstance(rope, RotaryEmbeddingDinoV3) else rope.bands
        vectors = torch.block_diag(bands.float()[:, None], bands.float()[:, None])  # [planes, 2]
    if axes == 3 and vectors.shape[-1] == 2:
        vectors = torch.cat((vectors, _along_z(vectors)), dim=-1)
    plane = [1, 0] if rope.grid_indexing == "xy" else [0, 1]
    return vectors[..., plane if axes == 2 else [2, *plane]]


def extend_along_z(freqs: Tensor) -> Tensor:
    """``[2, depth, heads, planes]`` -> ``[3, depth, heads, planes]``: RoPE-mixed frequencies for volumes."""
    return torch.cat((freqs, _along_z(freqs.movedim(0, -1)).movedim(-1, 0)))


def _along_z(vectors: Tensor) -> Tensor:
    angle = torch.arange(vectors.shape[-2], device=vectors.device, dtype=vectors.dtype) * _GOLDEN_ANGLE
    return vectors.norm(dim=-1, keepdim=True) * angle.cos().unsqueeze(-1)


def coordinates(rope: TimmRotary, frame: Frame, places: Tensor) -> Tensor:
    """Returns the rotary coordinates of physical ``places`` ``[1 or B, N, axes]``; float32, same shape."""
    count = frame.extent.new_tensor(frame.patches)
    offset = getattr(rope, "grid_offset", 0.0)
    if isinstance(rope, RotaryEmbeddingDinoV3):
        length, middle = torch.full_like(count, 2.0), 2 * offset / count
    else:
        reference = getattr(rope, "ref_feat_shape", None)
        length = count if reference is None else count.new_tensor(reference)
        middle = ((count - 1) / 2 + offset) * length / count
    scale, middle = length / frame.extent, middle.expand_as(frame.extent)
    if frame.depth is not None:
        step = (length / count)[:1]
        scale = torch.cat((step / frame.depth, scale), dim=-1)
        middle = torch.cat((torch.zeros_like(middle[:, :1]), middle), dim=-1)
    coords = ((places - frame.center.unsqueeze(1)) * scale.unsqueeze(1) + middle.unsqueeze(1)).float()
    if rope.training and rope.aug_active:
        coords = _apply_coord_augs(coords, rope.shift_coords, rope.jitter_coords, rope.rescale_coords)
    return coords


def rotary_embedding(rope: TimmRotary, frame: Frame, places: Tensor) -> Tensor:
    """Returns sines and cosines in the layout of timm's attention.

    Args:
        rope: timm's embedding.
        frame: Where its coordinates lie.
        places: Physical positions, ``[1 or B, N, axes]``.

    Returns:
        ``[1 or B, 1, N, 2 * head_dim]``, or ``[depth, 1 or B, heads, N, 2 * head_dim]``; float32.
    """
    coords, vectors = coordinates(rope, frame, places), frequencies(rope, places.shape[-1])
    if vectors.ndim == 4:
        vectors = vectors[:, None, :, None]  # [depth, 1, heads, 1, planes, axes]
    # no matrix product, whose precision autocast and TF32 lower
    parts = zip(coords[:, None].unsqueeze(-1).unbind(-2), vectors.unbind(-1), strict=True)
    phase = sum((place * vector for place, vector in parts), start=torch.zeros((), device=coords.device))
    return torch.cat([_layout(phase.sin(), rope), _layout(phase.cos(), rope)], dim=-1)


def _layout(values: Tensor, rope: TimmRotary) -> Tensor:
    if getattr(rope, "rotate_half", False):
        return torch.cat((values, values), dim=-1)
    return values.repeat_interleave(2, dim=-1)
