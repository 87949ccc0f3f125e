"""A backbone, a decoder and a classifier of places: logits on an image's own pixels, or on any grid asked for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from ..geometry.grid import Grid, Pyramid, Scalars, Tokens, channels_first, channels_last, fill, per_axis
from ..geometry.parts import Part, join_parts
from ..geometry.read import Told, read_images, what_is_told
from ..geometry.sample import sample_at
from ..geometry.types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike
from ..layers.grouping import CONVS
from ..layers.sharded import run_parts, tie
from ..models import RatVit, ResolutionAwareTransformer
from .decoders import BEYOND, DECODERS, Decoder, DetailLevels, LevelMaps, SimplePyramid, add_context
from .saving import load_segmenter, save_segmenter

SHARE = 1e-3  # of valid pixels in a place, linearly; rounding makes less of a neighbour's


class Segmenter(nn.Module):
    """Classifies every pixel of images and volumes.

        model = Segmenter("rat_tiny", num_classes=3)
        logits = model(image, spacing=0.5)  # [B, 3, *size]

    Args:
        backbone: A registered name of a hierarchical or plain RAT (``rat_tiny``, ``rat_vit_...``), or such a model. Of
            a model that is given, the classifier is removed.
        num_classes: Number of channels that come out.
        decoder: "fpn" interpolates between coarse maps, "groups" carries them up along the groupings' assignments; see
            `rat_timm.dense.decoders`. A plain RAT has one map, of which the feature pyramid of ViTDet makes four, and
            no groupings.
        width: Width of the decoder.
        detail: Whether two convolutional levels, at strides 1 and 2, bring in what is finer than the backbone's maps.
            They see the image as the backbone does: at the reference spacing where its stem is physical.
        context: Whether the other levels of a pyramid reach level 0's pixels by their positions too
            (`rat_timm.dense.decoders.add_context`), and not by attention alone; for models trained on pyramids.
        in_chans: Number of image channels. Default: the backbone's.
        class_names: A name for each class, which `save` keeps.
        **backbone_kwargs: Of ``timm.create_model``, for a name.

    Attributes:
        classifier: The convolution, of three taps per axis, that makes logits of the decoder's features.

    Raises:
        ValueError: If an argument is out of range, or the backbone does not go with it.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        decoder: Literal["fpn", "groups"] = "fpn",
        width: int = 64,
        detail: bool = True,
        in_chans: int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        context: bool = False,
        **backbone_kwargs: Any,
    ) -> None:
        super().__init__()
        self.context = context
        if num_classes < 1 or width < 1:
            raise ValueError(f"num_classes and width must be positive, got {num_classes}, {width}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names must be {num_classes} strings, one per class, got {class_names!r}")
        self.num_classes, self.width = int(num_classes), int(width)
        self.class_names = None if class_names is None else list(class_names)
        self.backbone: Any = _without_head(_make(backbone, in_chans, backbone_kwargs))
        _check_decoder(decoder, self.backbone)
        self.decoder_name = decoder
        self.in_chans: int = self.backbone.in_chans
        dims = [info["num_chs"] for info in self.backbone.feature_info]
        strides: Sequence[float] = self.backbone.feature_info[0]["stride"]
        self.pyramid: SimplePyramid | None = None
        if isinstance(self.backbone, RatVit):
            self.pyramid = SimplePyramid(dims[-1], strides)  # type: ignore[arg-type]
            dims, strides = self.pyramid.dims, self.pyramid.strides
        self.decoder: Decoder = DECODERS[self.decoder_name](dims, width, self.spatial_dims)
        step = [2 if stride >= 2 else 1 for stride in strides]
        self.detail = DetailLevels(self.in_chans, width, step) if detail else None
        self.classifier = CONVS[self.spatial_dims](self.num_features, num_classes, 3, padding=1)
        nn.init.zeros_(self.classifier.get_parameter("bias"))

    @property
    def spatial_dims(self) -> int:
        """Number of axes of the images."""
        return self.backbone.spatial_dims

    @property
    def reference_spacing(self) -> tuple[float, ...]:
        """The backbone's: the pixel size per axis that an image has whose spacing is not given."""
        return self.backbone.reference_spacing

    @property
    def num_features(self) -> int:
        """Width of what `forward_features` returns."""
        return self.width if self.detail is None else self.detail.dims

    def forward(
        self,
        x: ImageOrPyramid,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
        out: Grid | Scalars | None = None,
    ) -> Tensor:
        """Classifies pixels.

        Args:
            x: Image ``[B, C, *size]`` of any size, or a pyramid: a list of images of one scene, of which the first is
                classified and the others are context.
            spacing: Physical pixel size in array-axis order (z, y, x); see the backbone's ``forward``.
            mask: ``[B, *size]``, True = valid, or one per level. What is masked influences nothing.
            origin: Physical position of the first pixel's centre, in the forms of ``spacing``.
            out: Where to classify: a `Grid`, or a pixel size, at which the places are those of level 0's field of view.
                Default: level 0's own pixels.

        Returns:
            Logits ``[B, num_classes, *size]`` on level 0's pixels, or on the grid asked for. Zero where level 0 is
            masked, outside its field of view, and where no valid pixel is near.

        Raises:
            ValueError: If an argument does not fit the model or another argument.
        """
        told = what_is_told(x, spacing, mask, origin)
        images = self._read(x, told)
        image = images.levels[0]
        grid = image.grid if out is None else _output_grid(out, image)
        features = self._features(images, told)
        return at_grid(features._replace(x=self.classify(features)), image, grid).movedim(-1, 1)

    def forward_features(
        self,
        x: ImageOrPyramid,
        *,
        spacing: SpacingLike = None,
        mask: MaskLike = None,
        origin: OriginLike = None,
    ) -> Tokens:
        """Returns what the classifier gets, for other heads: `at_grid` brings what they make of it to pixels.

        Args:
            x: See `forward`.
            spacing: See `forward`.
            mask: See `forward`.
            origin: See `forward`.

        Returns:
            ``[B, *grid, num_features]`` with its grid and mask, zero where masked. The grid is the image's at the
            reference spacing (or as it is, where the backbone does not resample); without ``detail`` that of the
            decoder's finest map. Samples of several sizes are filled up to the largest, and masked there.
        """
        told = what_is_told(x, spacing, mask, origin)
        features = self._features(self._read(x, told), told)
        return features._replace(x=features.filled())

    def classify(self, features: Tokens) -> Tensor:
        """Returns the logits ``[B, *grid, num_classes]`` of what `forward_features` returned."""
        return channels_last(self.classifier(channels_first(features.filled())))

    def save(self, folder: str | Path) -> Path:
        """Saves weights (safetensors) and config.json, from which `load` makes the segmenter again.

        Args:
            folder: Made if there is none. What it holds of an earlier one is replaced.

        Returns:
            The folder.

        Raises:
            ValueError: If the backbone was not made by ``timm.create_model``, or its modules were changed since.
        """
        return save_segmenter(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> "Segmenter":
        """Makes the segmenter again that `save` wrote, in evaluation mode; digests are compared.

        Args:
            folder: Where `save` wrote.

        Raises:
            ValueError: If weights or config are damaged, or a classifier's.
            FileNotFoundError: If there are none.
        """
        found, options = load_segmenter(folder)
        model = cls(found.architecture, **options, **found.model_args)  # type: ignore[arg-type]
        model.load_state_dict(found.state_dict)
        return model.eval()

    def _read(self, x: ImageOrPyramid, told: Told) -> Pyramid:
        least = (1,) * self.spatial_dims
        if isinstance(self.backbone, ResolutionAwareTransformer) and not self.backbone.cfg.physical_stem:
            least = self.backbone.cfg.stem_strides
        images = read_images(x, told, self.reference_spacing, self.in_chans, least)
        self.backbone._check_range(told, images)
        return images

    def _features(self, images: Pyramid, told: Told) -> Tokens:
        """Decodes the images of a batch; those that come to sizes of their own at the reference spacing, apart."""
        parts = self._parts(images, told)
        decoded = run_parts(self, lambda part: self._decode(part.images, told), parts, _tied)
        return join_parts([Pyramid([tokens]) for tokens in decoded], [part.rows or [] for part in parts]).levels[0]

    def _parts(self, images: Pyramid, told: Told) -> list[Part]:
        if isinstance(self.backbone, ResolutionAwareTransformer):
            return self.backbone.parts_at_reference(images, told)
        return [Part(None, images)]

    def _decode(self, images: Pyramid, told: Told) -> Tokens:
        levels = self._plain_maps(images, told) if self.pyramid else self._stage_maps(images)
        decoded, *context = (self.decoder(*level) for level in levels)
        if self.detail is not None:
            decoded = self.detail(images.levels[0], decoded)
            context = [self.detail.project(level) for level in context]
        return add_context(decoded, context)

    def _stage_maps(self, images: Pyramid) -> list[LevelMaps]:
        """Returns the map of each stage, and how each stage's tokens became the next one's, of levels to decode."""
        run = self.backbone.run_on_grids(images, self.decoder.needs_assignments)
        between: list[Any] = run.assignments[1:] if self.backbone.cfg.group_first else run.assignments
        levels = []
        for level in range(len(images.levels) if self.context else 1):
            finest = min(level, 1, len(run.stages) - 1)
            maps, grouped = ([stage.levels[level] for stage in run.stages], [grouping[level] for grouping in between])
            levels.append(LevelMaps(maps[finest:], grouped[finest:]))
        return levels

    def _plain_maps(self, images: Pyramid, told: Told) -> list[LevelMaps]:
        """Returns the maps that the pyramid makes of a plain transformer's last one, of levels to decode."""
        assert self.pyramid is not None
        maps, masks = [level.x.movedim(-1, 1) for level in images.levels], images.masks
        out = self.backbone.forward_intermediates(
            images.unwrap(maps),
            1,
            norm=True,
            output_dict=True,
            intermediates_only=True,
            spacing=told.spacing,
            mask=None if told.mask is None else images.unwrap(masks),
            origin=told.origin,
        )
        found = [out[name][0] for name in ("image_intermediates", "grids", "masks")]
        made = zip(*([[each] for each in found] if images.single else found), strict=True)
        # where there is a norm before the head, maps have not passed it yet
        levels = [Tokens(self.backbone.fc_norm(x.movedim(1, -1)), grid, mask) for x, grid, mask in made]
        levels = levels if self.context else levels[:1]
        return [LevelMaps(self.pyramid(tokens, level > 0), []) for level, tokens in enumerate(levels)]


def _tied(tokens: Tokens, other: Tokens) -> Tokens:
    return tokens._replace(x=tie(tokens.x, other.x))


def at_grid(tokens: Tokens, image: Tokens, grid: Grid) -> Tensor:
    """Brings what was made of an image's features to the places of a grid.

    Args:
        tokens: Of `Segmenter.forward_features`, or what a head made of them.
        image: Level 0 of the images: of ``x`` no use is made.
        grid: Where to; the image's own grid for its pixels.

    Returns:
        ``[B, *grid.shape, C]``. Zero in places of which no valid pixel of the image has a share, or whose neighbours in
        ``tokens`` are all masked.
    """
    if _are_same(tokens.grid, grid):
        return fill(tokens.x, _covered(image, grid))
    return fill(sample_at(tokens, grid, BEYOND).x, _covered(image, grid))


def _covered(image: Tokens, grid: Grid) -> Tensor | None:
    """Returns which places of a grid valid pixels of an image have a share in, ``[B, *grid.shape]``."""
    if _are_same(grid, image.grid):
        return image.mask
    shape = image.x.shape[:-1]
    valid = torch.ones(shape, device=image.x.device) if image.mask is None else image.mask.float()
    share = sample_at(Tokens(valid.unsqueeze(-1), image.grid), grid)
    return share.x[..., 0] > SHARE


def _are_same(one: Grid, other: Grid) -> bool:
    """Whether two grids are one, as far as objects and numbers tell: tensors are not looked at."""
    return one is other or (one.shape == other.shape and None not in one.numbers and one.numbers == other.numbers)


def _output_grid(out: Grid | Scalars, image: Tokens) -> Grid:
    """Returns the grid that a user asks for; of a pixel size, the places inside the field of view."""
    axes, batch = len(image.grid.shape), len(image.x)
    if isinstance(out, Grid):
        if len(out.shape) != axes or len(out.spacing) not in (1, batch) or len(out.origin) not in (1, batch):
            raise ValueError(
                f"out must be a Grid of {axes} axes with one row or one per sample ({batch}), got shape {out.shape} "
                f"and {len(out.spacing)} rows"
            )
        device = image.grid.spacing.device
        return out._replace(spacing=out.spacing.to(device), origin=out.origin.to(device))
    spacing = per_axis(out, "out", axes, batch, image.grid.spacing.device, positive=True)
    lower, upper = image.grid.corners()
    counts = ((upper - lower) / spacing).amax(dim=0).tolist()
    shape = tuple(max(1, math.floor(count + 0.5 + 1e-6)) for count in counts)
    return Grid(shape, spacing, lower + spacing / 2)


def _make(backbone: str | nn.Module, in_chans: int | None, kwargs: dict[str, Any]) -> nn.Module:
    """Makes the backbone if a name is given, and checks what is given."""
    if isinstance(backbone, str):
        kwargs = kwargs if in_chans is None else {**kwargs, "in_chans": in_chans}
        backbone = timm.create_model(backbone, **{**kwargs, "num_classes": 0})
    elif kwargs:
        raise ValueError(f"backbone_kwargs go with a name as backbone, got {sorted(kwargs)} with a model")
    if not isinstance(backbone, (ResolutionAwareTransformer, RatVit)):
        raise ValueError(
            "backbone must be a ResolutionAwareTransformer or a RatVit (rat_timm.models), or the registered name of "
            f"one, got {type(backbone).__name__}"
        )
    if in_chans not in (None, backbone.in_chans):
        raise ValueError(f"in_chans must be the backbone's {backbone.in_chans}, got {in_chans}")
    return backbone


def _without_head(backbone: Any) -> Any:
    """Removes what pools and classifies, whose parameters would get no gradient."""
    if backbone.num_classes:
        backbone.reset_classifier(0)
    if getattr(backbone, "attn_pool", None) is not None:
        backbone.attn_pool = None
    return backbone


def _check_decoder(decoder: str, backbone: nn.Module) -> None:
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {tuple(DECODERS)}, got {decoder!r}")
    if decoder != "groups":
        return
    why, grouped = "a plain transformer has none", False
    if isinstance(backbone, ResolutionAwareTransformer):
        kinds = [stage.sga_attention_type for stage in backbone.cfg.stages()[1:]]
        why = f"between stages (sga_attention_type, finest first): {kinds}"
        grouped = "none" not in kinds
    if not grouped:
        raise ValueError(f"decoder 'groups' needs a grouping between all stages, but {why}: choose decoder='fpn'")
