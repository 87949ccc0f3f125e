"""Patches that go where the image is interesting: a spatial transformer predicts where each is, how large, how turned.

After the package "Adaptive Patching for Vision Transformers" and spatial transformers (arXiv 1506.02025).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry.grid import Grid, Tokens, channels_first, exact_dtype, integers

SCALINGS = (None, "isotropic", "anisotropic")
_CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_POOLS: dict[int, Any] = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class Patches(NamedTuple):
    """Patches cut out of images.

    Attributes:
        x: Their pixels, ``[B, N, C, *patch_size]``.
        transform: From a patch's normalised coordinates to the image's, ``[B, N, axes, axes + 1]``, as
            `torch.nn.functional.affine_grid` takes it: coordinates from -1 to 1 between outer corners, last axis first.
        center: Their centres in the image's normalised coordinates, in array-axis order, ``[B, N, axes]``.
        position: Their centres in physical coordinates, in array-axis order, ``[B, N, axes]``.
        mask: ``[B, N]``, bool, True = valid: whether a patch has a valid pixel; None if all have.
    """

    x: Tensor
    transform: Tensor
    center: Tensor
    position: Tensor
    mask: Tensor | None = None


class AdaptivePatching(nn.Module):
    """Cuts patches out of images, from places that a small network predicts from the image.

    Before training it cuts the regular grid of patches (where they do not divide the image, they overlap a little), or
    fewer that lie evenly over the image. Whatever the network predicts, patches stay inside the image. They are sampled
    bilinearly (trilinearly); those that are enlarged are sampled as densely as others, so that what is finer than their
    pixels may alias.

    Args:
        in_chans: Number of image channels.
        patch_size: Pixels of a patch, one number or one per axis (z, y, x).
        num_patches: How many; None: as many as the regular grid has, whatever the image's size.
        spatial_dims: Number of axes.
        scaling: Whether patches change size: None, "isotropic" or "anisotropic" (each axis of a patch by itself). With
            scaling, patches that are fewer than the regular grid's start as large as it takes to cover the image.
        max_scale: The most by which a patch is enlarged or reduced.
        rotate: Whether patches turn (in physical space, so that they are never sheared).
        jitter: How far patches are moved at random in training, in parts of their distance.
        hidden_dim: Width of the network that predicts.
        view: Pixels per axis of the reduced image that it looks at, a multiple of 8.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        patch_size: int | Sequence[int] = 16,
        num_patches: int | None = None,
        spatial_dims: int = 2,
        *,
        scaling: str | None = None,
        max_scale: float = 2.0,
        rotate: bool = False,
        jitter: float = 0.0,
        hidden_dim: int = 64,
        view: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {SCALINGS}, got {scaling!r}")
        if scaling and not 1 < max_scale < math.inf:
            raise ValueError(f"max_scale must be above 1 and finite, got {max_scale!r}")
        if not 0 <= jitter < math.inf:
            raise ValueError(f"jitter must not be negative, got {jitter!r}")
        self.patch_size = integers(patch_size, "patch_size", spatial_dims)
        self.num_patches = None if num_patches is None else integers(num_patches, "num_patches", 1)[0]
        self.spatial_dims, self.scaling, self.max_scale = spatial_dims, scaling, float(max_scale)
        self.rotate, self.jitter = rotate, float(jitter)
        scales = {None: 0, "isotropic": 1, "anisotropic": spatial_dims}[scaling]
        self._sizes = [spatial_dims, scales, _planes(spatial_dims) if rotate else 0]
        self.predictor = Predictor(in_chans, sum(self._sizes), spatial_dims, hidden_dim, view, device, dtype)

    def forward(self, image: Tokens) -> Patches:
        """Cuts patches out of ``image`` ``[B, *size, C]``."""
        grid, dtype = image.grid, exact_dtype(image.x.dtype)
        pixel = grid.spacing.to(dtype)
        extent = pixel * pixel.new_tensor(grid.shape)  # [1 or B, axes]
        cover = self.cover(grid.shape, pixel)
        move, grow, turn = self.predictor(image, cover.center).to(dtype).split(self._sizes, dim=-1)  # [B, N, ..]
        half = pixel[:, None] * pixel.new_tensor(self.patch_size) / 2 * self._scale(grow, cover.scale)
        rotation = _rotation(turn, self.spatial_dims) if self.rotate else torch.eye(self.spatial_dims).to(pixel)
        reach = (rotation.abs() * half.unsqueeze(-2)).sum(-1) / (extent[:, None] / 2)  # of the box around a patch
        fit = reach.amax(dim=-1, keepdim=True).clamp(min=1)
        half, reach = half / fit, reach / fit
        center = (1 - reach) * _fold(cover.spread + self._noise(move, cover.distance) + 2 * move.tanh())
        matrix = rotation * half.unsqueeze(-2) / (extent[:, None, :, None] / 2)
        matrix = matrix.expand(*center.shape, -1)  # [B, N, axes, axes]
        x, mask = _sample(image, center, matrix, self.patch_size)
        transform = torch.cat((matrix.flip(-1, -2), center.flip(-1).unsqueeze(-1)), dim=-1)
        lower, upper = (corner.unsqueeze(1) for corner in grid.corners())
        return Patches(x, transform, center, lower + (center + 1) / 2 * (upper - lower), mask)

    def cover(self, shape: Sequence[int], like: Tensor) -> "Cover":
        """Returns where patches start on images of a shape, in the type and on the device of ``like``."""
        regular = [-(-n // p) for n, p in zip(shape, self.patch_size, strict=True)]
        if self.num_patches is None:
            grid = Grid.create(regular, [1 / n for n in regular])
            middle = grid.coordinates()[0].flatten(0, -2)
            width = grid.spacing.expand_as(middle)
        else:
            cells = torch.tensor(_cells(self.num_patches, regular), dtype=torch.float64)
            middle, width = cells.mean(dim=-1), cells[..., 1] - cells[..., 0]
        center, width = 2 * middle - 1, 2 * width  # [N, axes], where the image goes from -1 to 1
        patch = torch.tensor([2 * p / n for n, p in zip(shape, self.patch_size, strict=True)], dtype=torch.float64)
        scale = torch.ones_like(width)
        if self.scaling and self.num_patches is not None:
            scale = (width / patch).clamp(1, self.max_scale)
            scale = scale.amax(dim=-1, keepdim=True).expand_as(scale) if self.scaling == "isotropic" else scale
        room = (1 - patch * scale / 2).clamp(min=1e-9)
        spread = torch.where(room > 1e-6, (center / room).clamp(-1, 1), 0.0)
        return Cover(*(part.to(like) for part in (spread, scale, center, width / room.clamp(min=1e-2))))

    def _scale(self, grow: Tensor, start: Tensor) -> Tensor:
        if self.scaling is None:
            return start
        top = math.log(self.max_scale)
        return (top * _fold(start.log() / top + 2 * grow.tanh())).exp()

    def _noise(self, move: Tensor, distance: Tensor) -> Tensor | float:
        if not (self.training and self.jitter):
            return 0.0
        return self.jitter * distance * (2 * torch.rand_like(move) - 1)

    def extra_repr(self) -> str:
        """Describes the module in a printed model."""
        return f"{self.patch_size}, num_patches={self.num_patches}, scaling={self.scaling}, rotate={self.rotate}"


class Cover(NamedTuple):
    """Where patches start: evenly over an image.

    Attributes:
        spread: Their centres, from -1 to 1 between the outermost places at which they are inside, ``[N, axes]``.
        scale: How much they are enlarged, ``[N, axes]``.
        center: The middles of the image's parts that they stand for, from -1 to 1 over the image, ``[N, axes]``.
        distance: Between neighbours, in units of ``spread``, ``[N, axes]``.
    """

    spread: Tensor
    scale: Tensor
    center: Tensor
    distance: Tensor


class Predictor(nn.Module):
    """Predicts numbers for places of an image from a reduced view of it; zeros before training.

    Args:
        in_chans: Number of image channels.
        outputs: How many numbers for each place.
        spatial_dims: Number of axes.
        hidden_dim: Width.
        view: Pixels per axis of the reduced image, a multiple of 8.
        device: PyTorch's.
        dtype: PyTorch's.

    Raises:
        ValueError: If ``hidden_dim`` or ``view`` is not a multiple of 8.
    """

    def __init__(
        self,
        in_chans: int,
        outputs: int,
        spatial_dims: int = 2,
        hidden_dim: int = 64,
        view: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_dim", hidden_dim), ("view", view)):
            if value < 8 or value % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {value!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.view = (view,) * spatial_dims
        widths = [in_chans, hidden_dim // 4, hidden_dim // 2, hidden_dim]
        layers: list[nn.Module] = []
        for old, new in itertools.pairwise(widths):
            layers += [_CONVS[spatial_dims](old, new, 3, 2, 1, **dd), nn.GroupNorm(1, new, **dd), nn.GELU()]
        self.convs = nn.Sequential(*layers)
        self.reduce = _CONVS[spatial_dims](hidden_dim, hidden_dim // 4, 1, **dd)
        self.whole = nn.Linear(hidden_dim // 4 * (view // 8) ** spatial_dims, hidden_dim, **dd)
        self.place = nn.Linear(hidden_dim + spatial_dims, hidden_dim, **dd)
        self.out = nn.Linear(hidden_dim, outputs, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Makes it predict zeros."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, image: Tokens, center: Tensor) -> Tensor:
        """Returns ``[B, N, outputs]`` for places ``[N, axes]`` in the image's normalised coordinates."""
        x = self.convs(_POOLS[len(self.view)](channels_first(image.filled()), self.view))
        whole = self.whole(self.reduce(x).flatten(1))  # [B, hidden]
        center = center.expand(x.shape[0], -1, -1)
        near = interpolate_pos_embed(x.movedim(1, -1), center)  # [B, N, hidden]
        place = self.place(torch.cat((near, center.to(near.dtype)), dim=-1))
        return self.out(F.gelu(place + whole.unsqueeze(1)))


def interpolate_pos_embed(embed: Tensor, center: Tensor) -> Tensor:
    """Interpolates an embedding, learned for the cells of a grid, linearly at any places.

    Beyond the outermost cells' centres it stays as it is there.

    Args:
        embed: ``[1 or B, *grid, C]``, of any grid.
        center: The places in normalised coordinates, from -1 to 1 between the grid's outer corners, in array-axis order
            (z, y, x), ``[B, N, axes]``.

    Returns:
        ``[B, N, C]``; at the centre of a cell what the embedding has there.

    Raises:
        ValueError: If the two do not fit.
    """
    axes = embed.ndim - 2
    if axes not in (2, 3) or center.ndim != 3 or center.shape[-1] != axes:
        raise ValueError(
            f"center must be [B, N, axes] for an embedding [1 or B, *grid, C] of 2 or 3 axes, got {list(center.shape)} "
            f"for {list(embed.shape)}"
        )
    table = channels_first(embed).expand(center.shape[0], *[-1] * (axes + 1))
    out = _grid_sample(table, center.unflatten(1, (-1, *[1] * (axes - 1))))
    return out.flatten(2).mT.to(embed.dtype)


def _grid_sample(x: Tensor, place: Tensor) -> Tensor:
    """Samples ``x`` ``[B, C, *grid]`` at ``[B, *out, axes]`` in array-axis order, not in half precision."""
    dtype = exact_dtype(x.dtype)
    return F.grid_sample(x.to(dtype), place.to(dtype).flip(-1), padding_mode="border", align_corners=False)


def _sample(image: Tokens, center: Tensor, matrix: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Samples patches ``[B, N, C, *size]``; valid pixels alone count."""
    place = center[(..., *[None] * len(size), slice(None))]  # [B, N, 1.., axes]
    for axis, n in enumerate(size):
        tick = (torch.arange(n, device=center.device, dtype=center.dtype) * 2 + 1) / n - 1
        tick = tick.view([-1 if other == axis else 1 for other in range(len(size))]).unsqueeze(-1)
        # no matrix product, whose precision autocast and TF32 lower
        place = place + tick * matrix[..., axis][(..., *[None] * len(size), slice(None))]

    def cut(x: Tensor) -> Tensor:
        return _grid_sample(channels_first(x), place.flatten(1, 2)).unflatten(2, (-1, size[0])).movedim(2, 1)

    x = cut(image.filled())
    if image.mask is None:
        return x.to(image.x.dtype), None
    weight = cut(image.mask.unsqueeze(-1).to(x.dtype))
    valid = weight > 1e-3  # of a pixel next to a masked one nothing but noise would be left
    x = torch.where(valid, x / torch.where(valid, weight, 1.0), 0.0)
    return x.to(image.x.dtype), valid.flatten(2).any(dim=-1)


def _fold(x: Tensor) -> Tensor:
    """Folds the line onto -1 to 1 as a zigzag: the identity there, and with a gradient of 1 or -1 everywhere."""
    x = (x + 1).remainder(4)
    return torch.where(x <= 2, x - 1, 3 - x)


def _planes(axes: int) -> int:
    return axes * (axes - 1) // 2


def _rotation(turn: Tensor, axes: int) -> Tensor:
    """Returns rotations ``[..., axes, axes]`` by up to half a turn in each plane of two axes."""
    first, second = torch.triu_indices(axes, axes, 1, device=turn.device)
    planes = torch.arange(len(first), device=turn.device)
    basis = turn.new_zeros(len(first), axes, axes)
    basis[planes, second, first], basis[planes, first, second] = 1.0, -1.0
    angle = math.pi * turn.tanh()
    return torch.linalg.matrix_exp((angle[..., None, None] * basis).sum(-3))


def _cells(count: int, regular: Sequence[int]) -> list[list[tuple[float, float]]]:
    """Divides a box, as long as ``regular`` per axis, into equal parts, each about as long along all axes.

    Returns:
        Per part and axis where it begins and ends, from 0 to 1.
    """
    first, *rest = regular
    slabs = count
    if rest:
        slabs = round((count * first ** len(rest) / math.prod(rest)) ** (1 / len(regular)))
        slabs = min(max(slabs, 1), count)
    ends = [count * i // slabs for i in range(slabs + 1)]
    return [
        [(i / slabs, (i + 1) / slabs), *part]
        for i, (begin, end) in enumerate(itertools.pairwise(ends))
        for part in (_cells(end - begin, rest) if rest else [[]])
    ]
