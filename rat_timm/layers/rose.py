"""Rotary Spatial Embeddings: channels rotated by physical coordinates.

theta(h, p, n) = <coordinates_n, omega_{h,p}>; channels (2p, 2p + 1) of head h are rotated by theta.
Parameters and their names are those of the package ``rotary-spatial-embeddings``; the frequencies follow RoPE-mixed
(arXiv 2403.13298).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import RoSE
import torch
from torch import Tensor

from ..geometry.grid import Positions, check_exact
from ..ops.windows import tensor_of

FREQUENCY_SCALINGS = ("none", "linear", "sqrt", "adaptive")
INITIAL_SCALINGS = (None, "log", "rope", "identity", "linear", "power")
_COMPLEX = ("cpu", "cuda")  # devices that multiply complex numbers
_SCALE_STARTS = {"log": (0, 1, 1, 1), "rope": (0, 0, 0, 1)}  # of a, b, c, d; (1, 1, 0, 1) is the identity


class Rotation(NamedTuple):
    """A rotation of every plane of every token.

    Attributes:
        table: Cosine and sine in the tokens' dtype, ``[1 or B, ..., rotary heads, planes, 2]``; in exports the cosine
            of each channel, ``[1 or B, ..., rotary heads, d]``.
        crossed: In exports, minus the sine (first channels of planes) or the sine (second), by which the plane's other
            channel is multiplied.
        other: In exports, which channel that is, ``[d]``.
    """

    table: Tensor
    crossed: Tensor | None = None
    other: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Rotates the first ``rotary heads`` of ``x`` ``[B, ..., heads, d]``; the others pass.

        Channels are complex numbers: where memory has them side by side they are multiplied in one pass instead of
        several. Half precisions are no complex numbers, and compilers fuse the real formula only.
        """
        if self.crossed is not None and self.other is not None:
            heads = self.table.shape[-2]
            part = x if x.shape[-2] == heads else x[..., :heads, :]
            turned = part * self.table + part.index_select(-1, self.other) * self.crossed
            return turned if part is x else torch.cat((turned, x[..., heads:, :]), dim=-2)
        by, heads = self.table, self.table.shape[-3]
        planes = (x if x.shape[-2] == heads else x[..., :heads, :]).unflatten(-1, (-1, 2))
        (*steps, last), (*more, other) = planes.stride(), by.stride()
        has_complex = x.dtype == by.dtype and x.dtype in (torch.float32, torch.float64) and x.device.type in _COMPLEX
        if (
            has_complex
            and not torch.compiler.is_compiling()
            and last == other == 1
            and math.gcd(planes.storage_offset(), by.storage_offset(), *steps, *more) % 2 == 0
        ):
            turned = torch.view_as_real(torch.view_as_complex(planes) * torch.view_as_complex(by))
        else:
            (real, imaginary), (cos, sin) = planes.unbind(-1), by.unbind(-1)
            turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)
        turned = turned.flatten(-2)
        return turned if x.shape[-2] == heads else torch.cat((turned, x[..., heads:, :]), dim=-2)


class RotarySpatialEmbedding(RoSE.RotarySpatialEmbedding):
    """Rotates queries and keys by where their tokens are, coherently over grids of any spacing and origin.

    Keywords as in ``RoSE.RotarySpatialEmbedding``. What differs: frequency vectors point in directions spread over the
    sphere instead of along the diagonal; positions are physical displacements instead of index times spacing;
    phases are float32, and every dtype can be rotated.

    Args:
        feature_dims: Width of all heads together.
        num_heads: Number of heads; ``feature_dims / num_heads`` must be even.
        spatial_dims: Number of axes.
        base_theta: Ratio of the largest to the smallest frequency of a head.
        learnable: Whether the frequencies are parameters.
        init_jitter_std: Standard deviation of a log-normal factor on learnable frequencies at initialisation.
        frequency_scaling: "none", or how ``base_theta`` depends on the number of axes: "linear", "sqrt", "adaptive".
        rotary_ratio: Share of the heads that are rotated.
        learnable_scale: Whether the scaling of spacings, ``a * s^b + c * log(s / d)``, has learnable ``scale_a..d``.
        initial_scaling: Its start: "identity" (also "linear", "power"), "log", "rope"; None without scaling.
        max_frequency: The largest frequency at initialisation, in radians per unit; 0 turns nothing at first.

    Raises:
        ValueError: If heads do not divide the width into even parts, or a choice is unknown.
    """

    def __init__(
        self,
        feature_dims: int,
        num_heads: int,
        spatial_dims: int = 2,
        base_theta: float = 1e4,
        learnable: bool = True,
        init_jitter_std: float = 0.02,
        frequency_scaling: str = "sqrt",
        rotary_ratio: float = 1.0,
        learnable_scale: bool = False,
        initial_scaling: str | None = None,
        *,
        max_frequency: float = 1.0,
    ) -> None:
        check_heads(feature_dims, num_heads)
        if not 0.0 <= rotary_ratio <= 1.0:
            raise ValueError(f"rotary_ratio must be in [0, 1], got {rotary_ratio}")
        if frequency_scaling not in FREQUENCY_SCALINGS:
            raise ValueError(f"frequency_scaling must be one of {FREQUENCY_SCALINGS}, got {frequency_scaling!r}")
        if initial_scaling not in INITIAL_SCALINGS:
            raise ValueError(f"initial_scaling must be one of {INITIAL_SCALINGS}, got {initial_scaling!r}")
        super().__init__(
            feature_dims,
            num_heads,
            spatial_dims,
            base_theta,
            learnable,
            init_jitter_std=0.0,
            frequency_scaling=frequency_scaling,
            rotary_ratio=rotary_ratio,
            learnable_scale=learnable_scale,
            initial_scaling=initial_scaling,
        )
        self.init_jitter_std, self.max_frequency = init_jitter_std, max_frequency
        if self.rotary_dim > 0:
            with torch.no_grad():
                self.freqs.copy_(self._jittered_frequencies() if learnable else self._spread_frequencies())

    def _jittered_frequencies(self) -> Tensor:
        freqs = self._spread_frequencies()
        if self.init_jitter_std > 0:
            freqs = freqs * torch.exp(self.init_jitter_std * torch.randn_like(freqs[..., :1]))
        return freqs

    def _spread_frequencies(self) -> Tensor:
        """Returns ``[rotary heads, planes, axes]``: magnitudes from the largest on, directions spread evenly."""
        planes = torch.arange(self.num_rotary_planes, dtype=torch.float32)
        magnitude = self.max_frequency * self.rose_theta ** (-planes / self.num_rotary_planes)
        direction = _sphere(self.num_rotary_heads * self.num_rotary_planes, self.spatial_dims)
        return magnitude[:, None] * direction.to(magnitude.device).unflatten(
            0, (self.num_rotary_heads, self.num_rotary_planes)
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts anew what is learnable, after a move off the meta device."""
        if self.rotary_dim > 0 and self.learnable:
            self.freqs.copy_(self._jittered_frequencies())
        if self.learnable_scale:
            self._copy_scales()

    def init_non_persistent_buffers(self) -> None:
        """Computes the buffers that no checkpoint holds, after a move off the meta device."""
        if self.rotary_dim > 0 and not self.learnable:
            self.freqs.copy_(self._spread_frequencies())
        if self.initial_scaling and not self.learnable_scale:
            self._copy_scales()

    def _copy_scales(self) -> None:
        for name, value in zip("abcd", _SCALE_STARTS.get(self.initial_scaling or "", (1, 1, 0, 1)), strict=True):
            getattr(self, f"scale_{name}").fill_(value)

    def rotation(self, positions: Positions, dtype: torch.dtype) -> Rotation | None:
        """Returns the tokens' rotation for use on queries and keys of ``dtype``; None if no head is rotated."""
        if self.rotary_dim == 0:
            return None
        offset = positions.offset
        if offset[0].dtype.itemsize < 4:
            check_exact(offset[0], "positions")
        if self.learnable_scale or self.initial_scaling:
            offset = tuple(o * f for o, f in zip(offset, self._scaling(positions.spacing), strict=True))
        freqs = self.freqs if self.freqs.dtype == torch.float32 else self.freqs.float()
        other, compiles = None, torch.compiler.is_compiling()
        if compiles and torch.compiler.is_exporting():
            freqs, other = _of_channels(freqs)
        phases, shapes = [], []
        for displacement, frequency in zip(offset, freqs.unbind(-1), strict=True):
            # no matrix product, whose precision autocast and TF32 lower
            phase = displacement[..., None, None] * frequency
            phases.append(phase.double() if dtype == torch.float64 else phase)
            shapes.append(phase.shape)
        # phases that depend on one axis each are turned axis by axis: a product of complex numbers costs less than a
        # sine. But in programs, where a sum makes fewer nodes
        if compiles or shapes.count(shapes[0]) == len(shapes):
            phases = [functools.reduce(torch.add, phases)]
        first, *others = phases
        if other is not None:
            cos, sin = first.cos(), first.sin()
            return Rotation(cos, sin, other) if cos.dtype == dtype else Rotation(cos.to(dtype), sin.to(dtype), other)
        table = torch.stack((first.cos(), first.sin()), dim=-1)
        for phase in others:
            turn = Rotation(torch.stack((phase.cos(), phase.sin()), dim=-1))
            table = turn(table.flatten(-2)).unflatten(-1, (-1, 2))
        return Rotation(table if table.dtype == dtype else table.to(dtype))  # each cast is some nodes of a program

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Rotates ``x`` ``[B, ..., heads, d]`` by the tokens' positions."""
        rotation = self.rotation(positions, x.dtype)
        return x if rotation is None else rotation(x)

    def _scaling(self, spacing: Sequence[Tensor]) -> list[Tensor]:
        """Returns the factors on displacements that turn a grid's spacing s into a * s^b + c * log(s / d), per axis."""
        a, b, c, d = (getattr(self, f"scale_{name}").float().expand(len(spacing)).unbind() for name in "abcd")
        parts = zip(spacing, a, b, c, d, strict=True)
        return [(a * s**b + c * torch.log(s / d.clamp(min=1e-8))) / s for s, a, b, c, d in parts]


def _of_channels(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Turns frequencies of planes ``[rotary heads, planes, axes]`` into those of channels, for exports.

    ONNX has no views of planes: each is some nodes that work out sizes. With channels a rotation is a few operations.

    Returns:
        ``[rotary heads, d, axes]``, negative for a plane's first channel, to which minus the sine belongs; and which
        channel is the plane's other one, ``[d]``.
    """
    plane, other, signs = _channels(freqs.shape[1], freqs.device)
    return freqs.index_select(1, plane) * signs, other


@torch.compiler.assume_constant_result
def _channels(planes: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns each channel's plane, ``[d]``, its plane's other channel, and the sign of that share, ``[d, 1]``."""
    channel = np.arange(2 * planes)
    return tuple([tensor_of(x, device) for x in (channel // 2, channel ^ 1, np.where(channel % 2, 1, -1)[:, None])])


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
