"""Handwritten digits (scikit-learn's, real, 8 x 8 pixels) in a field of view of a physical size, in 2D and 3D."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

FIELD = 32.0  # units, along every axis
THICKNESS = 12.0  # of the plate, in volumes


class Digits(NamedTuple):
    """Digits ``[N, 8, 8]`` between 0 and 1, and which they are ``[N]``."""

    images: Tensor
    labels: Tensor


def digits() -> tuple[Digits, Digits]:
    """Returns the digits to train on and the held-out ones."""
    bunch = load_digits()
    parts = train_test_split(bunch.images / 16, bunch.target, test_size=0.2, random_state=0, stratify=bunch.target)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x.float(), train_y), Digits(test_x.float(), test_y)


def spacing_of(size: Sequence[int]) -> tuple[float, ...]:
    """Returns the pixel size of the field of view in ``size`` pixels."""
    return tuple(FIELD / n for n in size)


class Pose(NamedTuple):
    """How digits lie: rotations ``[N, axes, axes]``, and shifts ``[N, axes]`` in units."""

    rotation: Tensor
    shift: Tensor


def poses(count: int, axes: int, degrees: float, shift: float, generator: torch.Generator) -> Pose:
    """Returns random poses: turned in the plane, or volumes about both axes of the plane, and shifted in the plane."""
    planes = [(0, 1)] if axes == 2 else [(0, 1), (0, 2)]
    rotation = torch.eye(axes).expand(count, -1, -1)
    for a, b in planes:
        angle = torch.deg2rad((2 * torch.rand(count, generator=generator) - 1) * degrees)
        turn = torch.eye(axes).repeat(count, 1, 1)
        turn[:, a, a] = turn[:, b, b] = angle.cos()
        turn[:, a, b], turn[:, b, a] = -angle.sin(), angle.sin()
        rotation = rotation @ turn
    return Pose(rotation, (2 * torch.rand(count, axes, generator=generator) - 1) * shift)


def draw(images: Tensor, size: Sequence[int], pose: Pose) -> Tensor:
    """Draws digits ``[N, 8, 8]`` in a field of view of ``size`` pixels, ``[N, 1, *size]``."""
    axes = [(torch.arange(n) + 0.5) * step - FIELD / 2 for n, step in zip(size, spacing_of(size), strict=True)]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)  # [pixels, axes]
    position = (position + pose.shift.unsqueeze(1)) @ pose.rotation  # [N, pixels, axes]
    plane = position[..., [-1, -2]].unsqueeze(1) * (2 / FIELD)  # grid_sample wants x, y between -1 and 1
    drawn = F.grid_sample(images.unsqueeze(1), plane, align_corners=False)[:, :, 0]  # [N, 1, pixels]
    if len(size) == 3:
        drawn = drawn * torch.sigmoid(THICKNESS / 2 - position[..., 0].abs()).unsqueeze(1)
    return drawn.unflatten(-1, tuple(size))
