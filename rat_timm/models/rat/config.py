"""What a RAT is, as data: `RatConfig` says it, `StageConfig` is one stage of it worked out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

from ...geometry.grid import axis_values, integers
from ...layers.grouping import extent_and_padding
from ...layers.rose import check_heads

HEAD_DIM = 32
GROUP_WIDTHS = ("coarse", "fine")
BLOCK_TYPES = ("attention", "conv")
SGA_ATTENTION_TYPES = ("dense", "sparse", "none")


class Conv(NamedTuple):
    """A layer that slides a window along each axis.

    Attributes:
        extent: How many places the window spans.
        stride: How far it moves.
        padding: How far it begins before the first place.
    """

    extent: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class StageConfig:
    """One stage: optionally a grouping of the previous stage's tokens, then blocks.

    Attributes:
        dim_in: Width of the tokens that come in, at which grouping works.
        dim: Width of the blocks.
        depth: Number of blocks.
        num_heads: Heads of a block.
        mlp_ratio: Hidden width of a block's MLP over ``dim``.
        conv_kernel_size: Taps of the blocks' convolutions per axis; None for attention.
        attn_kernel_size: Neighbourhood per axis; None for global attention, and for convolutions.
        joint_attention: Whether tokens of several levels, and prefix tokens, attend to each other, all to all.
        reg_tokens: Number of prefix tokens that join at this stage.
        has_prefix: Whether prefix tokens come in.
        total_stride: Pixels per token, per axis.
        unit: Physical length of one rotary unit in the blocks, per axis.
        kernel_size: That of the convolution that starts the groups, per axis.
        stride: Its stride, per axis.
        dilation: Distance of its taps, per axis.
        conv_dilation: That of the blocks' convolutions.
        neighborhood_kernel: Window of a sparse grouping in stride cells, per axis.
        sga_attention_type: How tokens are grouped at the start: "dense", "sparse", "none" for a strided convolution
            alone; None without a start.
        sga_dim: Width of the groups.
        sga_attn_dim: Width of their queries, keys and values.
        sga_num_heads: Heads of the grouping.
        sga_unit: Physical length of one rotary unit in the grouping (the fine side's), per axis.
        bias_kernel_size: Neighbourhood whose relative positions have a bias in the blocks; None for no bias.
        pad_windows: Whether a grid smaller than the blocks' neighbourhood is filled up for it.
    """

    dim_in: int
    dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    conv_kernel_size: tuple[int, ...] | None
    attn_kernel_size: tuple[int, ...] | None
    joint_attention: bool
    reg_tokens: int
    has_prefix: bool
    total_stride: tuple[int, ...]
    unit: tuple[float, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    conv_dilation: tuple[int, ...]
    neighborhood_kernel: tuple[int, ...]
    sga_attention_type: str | None
    sga_dim: int
    sga_attn_dim: int
    sga_num_heads: int
    sga_unit: tuple[float, ...]
    bias_kernel_size: tuple[int, ...] | None
    pad_windows: bool

    @property
    def needs_projection(self) -> bool:
        """Whether groups, or prefix tokens that come in, have to be brought to the blocks' width."""
        return self.sga_dim != self.dim or (self.has_prefix and self.dim_in != self.dim)

    @property
    def grouping_conv(self) -> Conv:
        """The convolution that starts the groups, as `Grid.conv` takes it."""
        extent, padding = extent_and_padding(self.kernel_size, self.dilation)
        return Conv(extent, self.stride, padding)


@dataclass(frozen=True)
class RatConfig:
    """A RAT architecture. Everything per stage is one value for all stages or a sequence with one per stage.

    Attributes:
        spatial_dims: Number of axes: 2 for images, 3 for volumes.
        spacing: Reference spacing: the pixel size, per axis in array order (z, y, x), at which neighbouring tokens are
            one rotary unit apart, and which an image has whose spacing is not given.
        embed_dim: Width of stage 1, which doubles from stage to stage; or one width per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage. Default: width / 32.
        mlp_ratio: Hidden width of the blocks' MLPs over their width.
        block_types: What blocks mix tokens with, "attention" or "conv": the block of ConvNeXt (arXiv 2201.03545), a
            depthwise convolution of ``conv_kernel_size`` taps and an MLP. Convolutions know no positions: what they see
            depends on the pixel size, which a physical stem keeps the same. Levels and prefix tokens pass them apart.
        conv_kernel_size: Taps of these convolutions, odd, one number or one per axis.
        attn_kernel_size: Neighbourhood of the blocks' attention per stage, 0 for global attention. Default: 7 in 2D and
            5 otherwise. In the last stage of four that is the whole field of 224 x 224 pixels (160 x 160 x 160), and no
            token of a larger one has more keys than in training.
        joint_attention: Whether in the last stage all tokens attend to all, whatever its neighbourhood, where there are
            several levels or prefix tokens. Without it levels never meet, but in stages of global attention.
        qkv_bias: Whether queries, keys and values have a bias.
        reg_tokens: Prefix tokens, which take part from the first stage on in which all tokens attend to all.
        leading_tokens: Another name for ``reg_tokens``.
        stem_kernel_size: Kernel of each convolution of the stem.
        stem_stride: Total stride of the stem, one number or one per axis.
        stem_pool: Whether the largest of 3 neighbours is taken after the last convolution, in front of a norm, along
            axes of an even stride, of which it makes a factor of 2. With ``stem_kernel_size=(7,)`` that is the stem of
            ResNet (arXiv 1512.03385).
        physical_stem: Whether images are resampled to the reference spacing in front of the stem, so that kernels mean
            the same at any spacing; without a spacing nothing is done. Maps have then a number of places that goes with
            the extent, not with the pixels; samples of different extents are computed apart, and their maps filled up
            to the largest, and masked. False where spacing has to be an input of a program (``torch.export``, ONNX),
            or the network is to see pixels as they are: only positions are physical then.
        level_ratios: Pixel sizes of a pyramid's levels in training, relative to the finest level's: a number or one per
            axis for each, the first of them 1. A physical stem brings every level to the nearest in proportion, so that
            an overview of other pixels is seen as those in training were. Empty: levels other than the finest keep
            theirs relative to it.
        mask_token: Whether a learnable token stands at masked places of the first map, for masked image modelling: it
            takes part like any other, gets gradients, and is all that masked pixels are known by. Without it, masked
            places take no part.
        output_stride: Most pixels per token: groupings that would make more leave out their stride. Windows, and the
            taps of the convolutions that start groups, are as far apart as they would be with it (atrous convolution,
            arXiv 1706.05587), and so are rotary units, so that weights of the whole stride go on. None for the whole.
        kernel_size: Kernel of the strided convolution that starts a grouping, one number or one per axis.
        stride: Its stride, one number or one per axis.
        sga_attention_type: "sparse", "dense" or "none" (the strided convolution alone, the control) for all groupings,
            or one per grouping. What dense grouping does depends on how many tokens an image has, and it costs the
            square of their number.
        group_width: "coarse": groups have the coarser stage's width from the start; "fine": the finer stage's, and are
            projected after the grouping.
        group_attn_width: Width of a grouping's queries, keys and values: "coarse", the coarser stage's; "fine", the
            finer stage's, with half as many heads and half of the work where the width doubles. What the groups take is
            then projected to their width.
        neighborhood_kernel: Window of sparse grouping, in stride cells.
        sga_mlp_ratio: Hidden width of a grouping's MLP over its width.
        iters: Iterations of a grouping.
        group_first: Whether stage 1 opens with a grouping too.
        learnable_rose: Whether rotary frequencies are parameters.
        rotary_ratio: Share of the heads that are rotated.
        base_theta: Ratio of the largest to the smallest rotary frequency.
        frequency_scaling: How it depends on ``spatial_dims``: "none", "linear", "sqrt", "adaptive".
        init_jitter_std: Log-normal jitter of learnable frequencies at initialisation.
        learnable_rose_scaling: Whether spacings are scaled by learnable ``scale_a..d``.
        rose_initial_scaling: Their start: "identity", "log", "rope"; None without scaling.
        final_norm: Whether a LayerNorm follows the last stage.
        linear_stem: Whether nothing stands between the stem's convolutions, and a norm after the last one; else a norm
            after each and GELU between.
        norm_eps: What the norms of stem and blocks add to variances.
        layer_scale: Factor per channel, when training starts, on what attention and MLP of each block add; None for no
            such factors.
        relative_bias: Whether attention in a neighbourhood adds a learnable number per head and relative position to
            its logits. Positions are counted in the level's own tokens, whatever lies between these: at the reference
            spacing, at which a physical stem sees the finest level, a number of tokens is a length. With
            ``output_stride`` the numbers are interpolated for the tokens between. Where all tokens attend to all, those
            of a level have it too, beyond the neighbourhood as at its edge; between levels there is none.
        pad_windows: Whether a grid that is smaller than a neighbourhood is filled up, behind its end, with tokens that
            are zero after the norm and take part in attention; else the neighbourhood is cut to the grid.
        initial_frequency: Largest rotary frequency of the blocks when training starts, in radians per rotary unit. At 0
            they know nothing of positions until training gives them frequencies. Those of groupings start at 1.
        group_share: Weight of what groups take over what they start from, when training starts; at 0 a grouping is the
            strided convolution until training opens it.

    Raises:
        ValueError: On construction, if a value is out of range or has another number of entries than there are stages.
    """

    spatial_dims: int = 2
    spacing: float | Sequence[float] = 1.0
    embed_dim: int | Sequence[int] = 64
    depths: Sequence[int] = (3, 4, 18, 5)
    num_heads: int | Sequence[int] | None = None
    mlp_ratio: float | Sequence[float] = 2.0
    block_types: str | Sequence[str] = "attention"
    conv_kernel_size: int | Sequence[int] = 7
    attn_kernel_size: int | Sequence[int] | None = None
    joint_attention: bool = True
    qkv_bias: bool = True
    reg_tokens: int = 0
    leading_tokens: int = 0
    stem_kernel_size: Sequence[int] = (3, 3)
    stem_stride: int | Sequence[int] = 4
    stem_pool: bool = False
    physical_stem: bool = True
    level_ratios: Sequence[float | Sequence[float]] = ()
    mask_token: bool = False
    output_stride: int | None = None
    kernel_size: int | Sequence[int] = 3
    stride: int | Sequence[int] = 2
    sga_attention_type: str | Sequence[str] = "sparse"
    group_width: str = "coarse"
    group_attn_width: str = "coarse"
    neighborhood_kernel: int | Sequence[int] = 3
    sga_mlp_ratio: float = 0.25
    iters: int = 1
    group_first: bool = False
    learnable_rose: bool = True
    rotary_ratio: float = 1.0
    base_theta: float = 100.0
    frequency_scaling: str = "none"
    init_jitter_std: float = 0.02
    learnable_rose_scaling: bool = False
    rose_initial_scaling: str | None = None
    final_norm: bool = True
    linear_stem: bool = False
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    relative_bias: bool = False
    pad_windows: bool = False
    initial_frequency: float = 1.0
    group_share: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):  # hashable, also where JSON made lists of tuples
            if isinstance(value := getattr(self, field.name), (list, tuple)):
                object.__setattr__(self, field.name, tuple(tuple(v) if isinstance(v, list) else v for v in value))
        if self.spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {self.spatial_dims!r}")
        for name in ("group_width", "group_attn_width"):
            if getattr(self, name) not in GROUP_WIDTHS:
                raise ValueError(f"{name} must be one of {GROUP_WIDTHS}, got {getattr(self, name)!r}")
        if self.reg_tokens and self.leading_tokens:
            raise ValueError("reg_tokens and leading_tokens are two names for one thing: give one of them")
        _check_number("iters", self.iters, Integral, least=1)
        _check_number("reg_tokens", self.prefix_tokens, Integral, least=0)
        if self.output_stride is not None:
            _check_number("output_stride", self.output_stride, Integral, least=max(self.stem_strides))
        for name in ("base_theta", "sga_mlp_ratio", "norm_eps", *([] if self.layer_scale is None else ["layer_scale"])):
            _check_number(name, getattr(self, name), Real, above=0)
        for name in ("initial_frequency", "group_share"):
            _check_number(name, getattr(self, name), Real, least=0)
        for name in ("kernel_size", "neighborhood_kernel", "conv_kernel_size"):
            if any(k % 2 == 0 for k in integers(getattr(self, name), name, self.spatial_dims)):
                raise ValueError(f"{name} must be odd, got {getattr(self, name)!r}")
        if self.ratios and set(self.ratios[0]) != {1.0}:
            raise ValueError(f"level_ratios must begin with 1, that of the finest level, got {self.level_ratios!r}")
        _sequence(self.stem_kernel_size, "stem_kernel_size", "one per convolution")
        stem_convs(self.stem_strides, self.stem_kernel_size, self.stem_pool)
        self.stages()

    @property
    def prefix_tokens(self) -> int:
        """The number of prefix tokens, under either of their names."""
        return self.reg_tokens or self.leading_tokens

    @property
    def rose(self) -> dict[str, Any]:
        """The keywords of the blocks' `RotarySpatialEmbedding` that do not depend on the stage."""
        return {
            "max_frequency": self.initial_frequency,
            "base_theta": self.base_theta,
            "learnable": self.learnable_rose,
            "init_jitter_std": self.init_jitter_std,
            "frequency_scaling": self.frequency_scaling,
            "rotary_ratio": self.rotary_ratio,
            "learnable_scale": self.learnable_rose_scaling,
            "initial_scaling": self.rose_initial_scaling,
        }

    @property
    def sga_rose(self) -> dict[str, Any]:
        """The same as keywords of `SpatialGroupingAttention`, whose names are upstream's."""
        names = (
            "base_theta",
            "learnable_rose",
            "init_jitter_std",
            "frequency_scaling",
            "rotary_ratio",
            "learnable_rose_scaling",
            "rose_initial_scaling",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def reference(self) -> tuple[float, ...]:
        """The reference spacing per axis."""
        return axis_values(self.spacing, "spacing", self.spatial_dims)

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """The levels' pixel sizes relative to the finest level's, per axis."""
        each = _sequence(self.level_ratios, "level_ratios", "one per level")
        return tuple(axis_values(ratio, "level_ratios", self.spatial_dims) for ratio in each)

    @property
    def stem_strides(self) -> tuple[int, ...]:
        """The stem's total stride per axis."""
        return integers(self.stem_stride, "stem_stride", self.spatial_dims)

    @property
    def stem_convs(self) -> list[Conv]:
        """What the stem's layers do to a grid, as `Grid.conv` takes it."""
        return stem_convs(self.stem_strides, self.stem_kernel_size, self.stem_pool)

    def stages(self) -> tuple[StageConfig, ...]:
        """Works out the stages, checking everything on the way."""
        count = len(_sequence(self.depths, "depths", "one per stage"))
        if count == 0:
            raise ValueError("depths must name at least one stage, got none")
        depths = self._per_stage(self.depths, "depths", Integral, count)
        dims = self._dims(count)
        heads = [max(1, d // HEAD_DIM) for d in dims]
        if self.num_heads is not None:
            heads = self._per_stage(self.num_heads, "num_heads", Integral, count)
        for dim, head in zip(dims, heads, strict=True):
            check_heads(dim, head)
        ratios = self._per_stage(self.mlp_ratio, "mlp_ratio", Real, count)
        convs, kernels = self._convs(count), self._attention_kernels(count)
        groupings = self._groupings(count)
        steps = integers(self.stride, "stride", self.spatial_dims)
        joint = self._joint(convs, kernels)
        first_joint = joint.index(True) if any(joint) else None
        kernel_size = integers(self.kernel_size, "kernel_size", self.spatial_dims)
        wide_groups = self.group_width == "coarse"
        wide_attention = wide_groups and self.group_attn_width == "coarse"
        window = integers(self.neighborhood_kernel, "neighborhood_kernel", self.spatial_dims)
        stride = nominal = self.stem_strides
        stages = []
        for i in range(count):
            fine, dilation, step = nominal, _divide(nominal, stride), (1,) * self.spatial_dims
            if groupings[i]:
                nominal = _multiply(nominal, steps)
                step = steps if self._is_allowed(_multiply(stride, steps)) else step
                stride = _multiply(stride, step)
            wider = _divide(nominal, stride)
            stages.append(
                StageConfig(
                    dim_in=dims[max(i - 1, 0)],
                    dim=dims[i],
                    depth=depths[i],
                    num_heads=heads[i],
                    mlp_ratio=ratios[i],
                    conv_kernel_size=convs[i],
                    attn_kernel_size=None if convs[i] else _widen(kernels[i], wider),
                    joint_attention=joint[i],
                    reg_tokens=self.prefix_tokens if i == first_joint else 0,
                    has_prefix=self.prefix_tokens > 0 and first_joint is not None and i > first_joint,
                    total_stride=stride,
                    unit=self._unit(nominal),
                    kernel_size=kernel_size,
                    stride=step,
                    dilation=dilation,
                    conv_dilation=wider,
                    neighborhood_kernel=_widen(window, wider) or window,
                    sga_attention_type=groupings[i],
                    sga_dim=dims[i if wide_groups else max(i - 1, 0)],
                    sga_attn_dim=dims[i if wide_attention else max(i - 1, 0)],
                    sga_num_heads=heads[i if wide_attention else max(i - 1, 0)],
                    sga_unit=self._unit(fine),
                    bias_kernel_size=kernels[i] if self.relative_bias and not convs[i] else None,
                    pad_windows=self.pad_windows,
                )
            )
        return tuple(stages)

    def _joint(self, convs: Sequence[tuple[int, ...] | None], kernels: Sequence[tuple[int, ...] | None]) -> list[bool]:
        """Tells in which stages all tokens attend to all where there are several levels or prefix tokens."""
        last = len(kernels) - 1
        joint = [
            not convs[i] and (kernel is None or (self.joint_attention and i == last))
            for i, kernel in enumerate(kernels)
        ]
        if self.prefix_tokens and not any(joint):
            raise ValueError(
                f"reg_tokens {self.prefix_tokens} need a stage in which all tokens attend to all "
                "(attn_kernel_size 0 or joint_attention)"
            )
        return joint

    def _is_allowed(self, stride: Sequence[int]) -> bool:
        return self.output_stride is None or max(stride) <= self.output_stride

    def _unit(self, stride: Sequence[int]) -> tuple[float, ...]:
        return tuple(a * b for a, b in zip(self.reference, stride, strict=True))

    def _per_stage(self, value: Any, name: str, kind: type, count: int) -> list:
        values = [value] * count if isinstance(value, Real) else list(_sequence(value, name, "one per stage"))
        if len(values) != count:
            raise ValueError(f"{name} must have one entry per stage ({count}), got {value!r}")
        for entry in values:
            _check_number(name, entry, kind, above=0)
        return values

    def _dims(self, count: int) -> list[int]:
        dims: Any = self.embed_dim
        if isinstance(dims, Integral):
            dims = [dims * 2**i for i in range(count)]
        return self._per_stage(dims, "embed_dim", Integral, count)

    def _convs(self, count: int) -> list[tuple[int, ...] | None]:
        """Returns the taps of each stage's convolutions; None for attention."""
        types: Any = self.block_types
        types = [types] * count if isinstance(types, str) else _sequence(types, "block_types", "one per stage")
        if len(types) != count or not set(types) <= set(BLOCK_TYPES):
            raise ValueError(
                f"block_types must be one of {BLOCK_TYPES} or one of them per stage ({count}), got {self.block_types!r}"
            )
        taps = integers(self.conv_kernel_size, "conv_kernel_size", self.spatial_dims)
        return [taps if kind == "conv" else None for kind in types]

    def _attention_kernels(self, count: int) -> list[tuple[int, ...] | None]:
        sizes: Any = self.attn_kernel_size
        if sizes is None:
            sizes = default_window(self.spatial_dims)
        if isinstance(sizes, Real):
            sizes = [sizes] * count
        sizes = _sequence(sizes, "attn_kernel_size", "one per stage")
        if len(sizes) != count or any(not isinstance(k, Integral) or int(k) < 0 for k in sizes):
            raise ValueError(
                f"attn_kernel_size must be a number or one per stage ({count}), 0 for global attention, "
                f"got {self.attn_kernel_size!r}"
            )
        return [(k,) * self.spatial_dims if k else None for k in sizes]

    def _groupings(self, count: int) -> list[str | None]:
        needed = count - 1 + self.group_first
        kinds: Any = self.sga_attention_type
        name = "sga_attention_type"
        kinds = [kinds] * needed if isinstance(kinds, str) else list(_sequence(kinds, name, "one per grouping"))
        if len(kinds) != needed or not set(kinds) <= set(SGA_ATTENTION_TYPES):
            raise ValueError(
                f"{name} must be one of {SGA_ATTENTION_TYPES} or one of them per grouping ({needed}), "
                f"got {self.sga_attention_type!r}"
            )
        return kinds if self.group_first else [None, *kinds]


def _multiply(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(m * n for m, n in zip(a, b, strict=True))


def _divide(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(m // n for m, n in zip(a, b, strict=True))


def _widen(kernel: tuple[int, ...] | None, factor: Sequence[int]) -> tuple[int, ...] | None:
    """Returns a window that reaches as far where tokens are so many times as dense; None for all."""
    return kernel and tuple((k - 1) * f + 1 for k, f in zip(kernel, factor, strict=True))


def _sequence(value: Any, name: str, meaning: str) -> Sequence:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a list or tuple, {meaning}, got {value!r}")
    return value


def _check_number(name: str, value: Any, kind: type, least: float = -math.inf, above: float = -math.inf) -> None:
    valid = isinstance(value, kind)
    if not valid or not (least <= value < math.inf and value > above):
        bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        raise ValueError(f"{name} must be {'whole and ' if kind is Integral else ''}{bound}, got {value!r}")


def default_window(spatial_dims: int) -> int:
    """Returns the neighbourhood of attention that ``attn_kernel_size=None`` stands for."""
    return 7 if spatial_dims == 2 else 5


def stem_convs(stride: Sequence[int], kernel_size: Sequence[int], pool: bool = False) -> list[Conv]:
    """Splits a stem's stride into those of its convolutions and, with ``pool``, of the pooling at its end.

    Raises:
        ValueError: If a kernel is even, the stride is more than the kernels can cover, or nothing would be pooled.
    """
    pooled = tuple(2 if pool and n % 2 == 0 else 1 for n in stride)
    if pool and max(pooled) == 1:
        raise ValueError(f"stem_pool takes a factor of 2 of stem_stride along an axis, got {tuple(stride)}")
    strides = share_stride(_divide(stride, pooled), kernel_size)
    axes = len(pooled)
    convs = [Conv((k,) * axes, s, (k // 2,) * axes) for k, s in zip(kernel_size, strides, strict=True)]
    if pool:
        convs.append(Conv(tuple(2 * n - 1 for n in pooled), pooled, tuple(n - 1 for n in pooled)))
    return convs


def share_stride(stride: Sequence[int], kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits the total stride of each axis into one stride per convolution, none larger than its kernel allows."""
    if any(k < 1 or k % 2 == 0 for k in kernel_size):
        raise ValueError(f"stem_kernel_size must be odd, got {tuple(kernel_size)}")
    axes = []
    for total in stride:
        shares = _share_axis(total, kernel_size)
        if shares is None:
            raise ValueError(
                f"stem_stride {tuple(stride)} is not a product of {len(kernel_size)} strides "
                f"that kernels {tuple(kernel_size)} cover without gaps"
            )
        axes.append(shares)
    return list(zip(*axes, strict=True))


def _share_axis(total: int, kernel_size: Sequence[int]) -> tuple[int, ...] | None:
    if not kernel_size:
        return () if total == 1 else None
    for step in range(min(total, kernel_size[0]), 0, -1):
        if total % step == 0:
            rest = _share_axis(total // step, kernel_size[1:])
            if rest is not None:
                return step, *rest
    return None
