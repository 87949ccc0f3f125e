"""Rotary Spatial Embeddings: channels rotated by physical coordinates.

theta(h, p, n) = <coordinates_n, omega_{h,p}>; channels (2p, 2p + 1) of head h are rotated by theta.
Parameters and their names are those of the package ``rotary-spatial-embeddings``; the frequencies follow RoPE-mixed
(arXiv 2403.13298).
"""

import functools
from typing import NamedTuple

import RoSE
import torch
from torch import Tensor, nn

from ..grid import Positions

INITIAL_SCALINGS = (None, "log", "rope", "identity", "linear", "power")


class Rotation(NamedTuple):
    """A rotation of every plane of every token, in the tokens' dtype: ``[1 or B, ..., rotary heads, planes]``."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the first ``rotary heads`` of ``x`` ``[B, ..., heads, d]``; the others pass."""
        heads = self.cos.shape[-2]
        real, imaginary = x[..., :heads, :].unflatten(-1, (-1, 2)).unbind(-1)  # [B, ..., rotary heads, planes]
        rotated = torch.stack(
            (real * self.cos - imaginary * self.sin, real * self.sin + imaginary * self.cos), dim=-1
        ).flatten(-2)
        return rotated if heads == x.shape[-2] else torch.cat((rotated, x[..., heads:, :]), dim=-2)

    def broadcast(self) -> "Rotation":
        """Returns the rotation for several tensors stacked before the heads, ``[B, ..., several, heads, d]``."""
        return Rotation(self.cos.unsqueeze(-3), self.sin.unsqueeze(-3))


class RotarySpatialEmbedding(RoSE.RotarySpatialEmbedding):
    """Rotates queries and keys by where their tokens are, coherently over grids of any spacing and origin.

    Keywords as in ``RoSE.RotarySpatialEmbedding``. What differs: frequency vectors point in directions spread over the
    sphere instead of along the diagonal; positions are physical displacements instead of index times spacing; the
    rotation is real-valued with phases in float32, so that every dtype works.

    Args:
        feature_dims: Width of all heads together.
        num_heads: Number of heads; ``feature_dims / num_heads`` must be even.
        spatial_dims: Number of axes.
        base_theta: Ratio of the largest to the smallest frequency of a head; the largest is 1 radian per unit.
        learnable: Whether the frequencies are parameters.
        init_jitter_std: Standard deviation of a log-normal factor on learnable frequencies at initialisation.
        frequency_scaling: "none", or how ``base_theta`` depends on the number of axes: "linear", "sqrt", "adaptive".
        rotary_ratio: Share of the heads that are rotated.
        learnable_scale: Whether the scaling of spacings, ``a * s^b + c * log(s / d)``, has learnable ``scale_a..d``.
        initial_scaling: Its start: "identity" (also "linear", "power"), "log", "rope"; None without scaling.

    Raises:
        ValueError: If heads do not divide the width into even parts, or a choice is unknown.
    """

    def _validate_parameters(self, feature_dims: int, num_heads: int, rotary_ratio: float) -> None:
        check_heads(feature_dims, num_heads)
        if not 0.0 <= rotary_ratio <= 1.0:
            raise ValueError(f"rotary_ratio must be in [0, 1], got {rotary_ratio}")

    def _initialize_frequencies(
        self, base_theta: float, frequency_scaling: str, learnable: bool, init_jitter_std: float
    ) -> None:
        self.rose_theta = self._calculate_theta(base_theta, frequency_scaling)
        freqs = self._spread_frequencies()
        if not learnable:
            self.register_buffer("freqs", freqs, persistent=False)
            return
        if init_jitter_std > 0:
            freqs = freqs * torch.exp(init_jitter_std * torch.randn_like(freqs[..., :1]))
        self.freqs = nn.Parameter(freqs)

    def _spread_frequencies(self) -> Tensor:
        """Returns ``[rotary heads, planes, axes]``: magnitudes from 1 to 1 / theta, directions spread evenly."""
        planes = torch.arange(self.num_rotary_planes, dtype=torch.float32)
        magnitude = self.rose_theta ** (-planes / self.num_rotary_planes)
        direction = _sphere(self.num_rotary_heads * self.num_rotary_planes, self.spatial_dims)
        return magnitude[:, None] * direction.to(magnitude.device).unflatten(
            0, (self.num_rotary_heads, self.num_rotary_planes)
        )

    def _get_scale_init_values(self, initial_scaling: str | None) -> tuple[Tensor, ...]:
        if initial_scaling not in INITIAL_SCALINGS:
            raise ValueError(f"initial_scaling must be one of {INITIAL_SCALINGS}, got {initial_scaling!r}")
        return super()._get_scale_init_values(initial_scaling)

    def init_non_persistent_buffers(self) -> None:
        """Computes the buffers that no checkpoint holds, after a move off the meta device."""
        if self.rotary_dim > 0 and not self.learnable:
            self.freqs.copy_(self._spread_frequencies())
        if self.initial_scaling and not self.learnable_scale:
            for name, value in zip("abcd", self._get_scale_init_values(self.initial_scaling), strict=True):
                getattr(self, f"scale_{name}").copy_(value)

    def rotation(self, positions: Positions, dtype: torch.dtype) -> Rotation | None:
        """Returns the tokens' rotation for use on queries and keys of ``dtype``; None if no head is rotated."""
        if self.rotary_dim == 0:
            return None
        offset = positions.offset
        if self.learnable_scale or self.initial_scaling:
            offset = offset * self._scaling(positions.spacing)
        # no matrix product, whose precision autocast and TF32 lower
        parts = [d[..., None, None] * f for d, f in zip(offset.unbind(-1), self.freqs.float().unbind(-1), strict=True)]
        phase = functools.reduce(torch.add, parts)  # [1 or B, ..., rotary heads, planes]
        return Rotation(phase.cos().to(dtype), phase.sin().to(dtype))

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Rotates ``x`` ``[B, ..., heads, d]`` by the tokens' positions ``[1 or B, ..., axes]``."""
        rotation = self.rotation(positions, x.dtype)
        return x if rotation is None else rotation(x)

    def _scaling(self, spacing: Tensor) -> Tensor:
        """Returns the factor on displacements that turns a grid's spacing s into a * s^b + c * log(s / d)."""
        a, b, c, d = (getattr(self, f"scale_{name}").float() for name in "abcd")
        return (a * spacing**b + c * torch.log(spacing / d.clamp(min=1e-8))) / spacing


def check_heads(feature_dims: int, num_heads: int) -> None:
    """Raises ``ValueError`` unless the heads divide the width into even parts."""
    if num_heads < 1 or feature_dims % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide feature_dims {feature_dims}")
    if feature_dims // num_heads % 2:
        raise ValueError(f"feature_dims / num_heads must be even, got {feature_dims} / {num_heads}")


def _sphere(count: int, axes: int) -> Tensor:
    """Returns ``[count, axes]`` unit vectors spread evenly over the sphere, for any number of axes.

    The points of an additive (Kronecker) low-discrepancy sequence, taken to a normal distribution and normalised.
    """
    root = 2.0  # the positive root of x^(axes + 1) = x + 1 gives the sequence of lowest discrepancy
    for _ in range(64):
        root = (1 + root) ** (1 / (axes + 1))
    steps = torch.tensor([root ** -(axis + 1) for axis in range(axes)], dtype=torch.float64, device="cpu")
    index = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
    normal = torch.special.ndtri((0.5 + index[:, None] * steps) % 1.0)
    return (normal / torch.linalg.vector_norm(normal, dim=-1, keepdim=True)).float()
