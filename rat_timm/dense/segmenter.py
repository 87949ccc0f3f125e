"""A backbone, a decoder and a classifier of places: logits on an image's own pixels, or on any grid asked for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..geometry.grid import Grid, Pyramid, Scalars, Tokens, channels_first, channels_last, fill, per_axis
from ..geometry.read import Told, what_is_told
from ..geometry.sample import sample_at
from ..geometry.types import ImageOrPyramid, MaskLike, OriginLike, SpacingLike
from ..layers.grouping import CONVS
from ..models import RatVit, ResolutionAwareTransformer
from .backbone import in_parts, make_backbone, parts_for, plain_maps, read_for
from .decoders import BEYOND, DECODERS, DETAILS, Decoder, DetailLevels, LevelMaps, SimplePyramid, add_context
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
        detail: What two convolutional levels, at strides 1 and 2, see of the image, to bring in what is finer than the
            backbone's maps, at the reference spacing where its stem is physical: "contrast" (or True), how pixels
            differ from those around them; "pixels", as former versions did, which learn how bright objects are, and
            are wrong where those of other images are brighter (``examples/cells/README.md``). False: there are none.
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
        detail: bool | Literal["contrast", "pixels"] = "contrast",
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
        sees = "contrast" if detail is True else detail
        if sees not in (False, *DETAILS):
            raise ValueError(f"detail must be a bool or one of {DETAILS}, got {detail!r}")
        self.num_classes, self.width = int(num_classes), int(width)
        self.class_names = None if class_names is None else list(class_names)
        self.backbone = cast(Any, make_backbone(backbone, in_chans, backbone_kwargs))
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
        self.detail = DetailLevels(self.in_chans, width, strides, sees) if sees else None
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
        images = read_for(self.backbone, x, told)
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
        features = self._features(read_for(self.backbone, x, told), told)
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

    def _features(self, images: Pyramid, told: Told) -> Tokens:
        """Decodes the images of a batch; those that come to sizes of their own at the reference spacing, apart."""
        parts = parts_for(self.backbone, images, told)
        rows = [part.rows for part in parts]
        return in_parts(self, lambda part: Pyramid([self._decode(part.images, told)]), parts, rows).levels[0]

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
        levels = plain_maps(self.backbone, images, told)
        levels = levels if self.context else levels[:1]
        return [LevelMaps(self.pyramid(tokens, level > 0), []) for level, tokens in enumerate(levels)]


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
