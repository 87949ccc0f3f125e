"""The config of `train.py`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

# may change when training goes on: what changes no step, and the epochs, to train longer (the schedule stretches)
FREE = ("output", "epochs", "compile", "device", "workers", "checkpoint_every")

HUB = "hf-hub:"  # of a model's name: that of a repository follows
SAVED = "local-dir:"  # of a model's name: that of a folder follows
BEGAN = "config.yaml"  # the config that training began with, in the output


@dataclasses.dataclass
class Config:
    """What to train, on what, and how.

    Args:
        output: Folder for checkpoints, TensorBoard's logs and the trained model; all processes have to see it.
        task: "classification" of images; classes of pixels ("segmentation"); objects that are told apart
            ("instances"); boxes around objects ("detection", in 2D). Of images without labels: pixels of hidden blocks
            ("masked"), or the maps of a teacher ("distillation").
        model: A name of this package's, or "local-dir:FOLDER" for one that was saved, by pretraining say; for
            segmentation and instances also "smp:ARCHITECTURE-ENCODER", a network of segmentation_models_pytorch around
            an encoder of timm, such as "smp:unet-convnext_atto".
        model_args: Further keywords of timm's create_model, such as drop_path_rate, or of smp's. Of labelled images, a
            model without weights has the pixel size of the first training image as its reference spacing.
        decoder: Of segmentation and instances, see `rat_timm.dense.Segmenter`.
        width: Of that decoder, or of the maps of a detector. Of masked images: of the blocks that predict pixels, a
            multiple of 32.
        detail: Of segmentation and instances, see `rat_timm.dense.Segmenter`.
        detector: Of detection.
        depth: Of masked images: how many blocks predict pixels.
        stages: Of images without labels and a hierarchical model: how many stages, counted from the last, pixels are
            predicted from, or are compared with a teacher.
        share: Of masked images: the share that is hidden.
        block: Physical length of the blocks that are hidden; in other levels than the first they are as much longer as
            pixels are. Default: a place of the last stage, or a patch, but half a crop at most.
        window: Likewise, of the blocks in which pixels are normalised: within one, how bright it is as a whole need not
            be predicted. Default: ``block``.
        hide_level: Probability that one of the ``levels`` is hidden as a whole.
        teacher: Of distillation: a name that timm knows, or a folder with a saved model.
        teacher_args: Further keywords of timm's create_model for it.
        teacher_index: Which of its maps.
        teacher_spacing: Pixel size, per axis, to which images are brought before the teacher gets them. Default: they
            are given as they are.
        planes: Of volumes, for a teacher of images: the axes across which slices are taken.
        slices: How many of a crop across each of them.
        pretrained: Whether to start from pretrained weights.
        data: "digits", or a folder with train/<class>/* and validation/<class>/*. Of the other tasks: "discs" (drawn),
            "hela", "bacteria" or "cho" (see `training.cells`), or a folder with train/images/*, train/labels/* and
            the same in validation; images without labels may lie in train and validation themselves. Default: "digits"
            or "discs".
        size: Pixels along each axis to which images are brought. Default: the model's. Of the other tasks: of random
            crops; default: 128 (2D), 16 x 64 x 64 (3D).
        images: How many of the training images are used, evenly chosen; of labelled images. Default: all.
        crops: Random crops of each image in an epoch; not of classification.
        foreground: Probability that a crop is chosen among those with a label above 0 in them, rather than among all.
        levels: Pixel sizes of the levels of a pyramid relative to the crop's: with [1, 4] the model also gets an
            overview around each crop, four times as wide; of segmentation and instances.
        ignored: Number in a folder's labels that means "not annotated"; -1 always does.
        length: Of instances: about the distance from the middle of an object to its boundary, in the unit. Default:
            as measured in the training labels.
        min_size: Of instances: area or volume below which predicted objects are dropped. Default: a quarter of the
            length to the power of the number of axes.
        tolerance: Of segmentation: the distance, in the unit, that the surface Dice allows. Default: two pixels of the
            training images.
        tile: Pixels along each axis that are predicted at once in validation; larger images go through overlapping
            windows of this size. Default: images are predicted whole.
        spacing: Pixel size (y, x) of pictures (PNG, JPEG), which do not say it, in the unit.
        unit: Unit of the pixel sizes, which is that of the model's reference spacing.
        assumed_unit: Unit of the pixel sizes of files that have numbers and no unit; else they are an error.
        skip_unreadable: Whether to train without files that cannot be read, rather than stop at the first one. All are
            tried before training begins; those that it leaves out are listed in the output.
        intensity: "model" scales integers to 0..1 and uses the model's mean and deviation; "sample" uses each sample's;
            "data", not for classification, those of all training images, as for Hounsfield units.
        scale: Least and largest share of an image that a training crop keeps, of classification.
        factors: Least and largest factor of the pixel size of training crops, drawn log-uniformly: a crop has so many
            more or fewer pixels in the same field of view, and the noise of such pixels. (Of the other tasks a crop
            keeps its number of pixels, and the field of view is so many times as large.) Default: pixels as they are.
        p_factors: Probability that a training crop has another pixel size, with ``factors``.
        flip: Whether to flip training crops along each axis, half of the time.
        gamma: By what exponent, or by one over what, intensities of a crop are bent at most, drawn log-uniformly; 1 for
            as they are. Not of classification.
        epochs: Number of epochs.
        batch_size: Samples in a step, over all processes; "auto" tries powers of two with the model before training,
            and takes the largest that fits into memory and is not more than the samples there are.
        optimizer: A name that timm's create_optimizer_v2 knows.
        lr: Learning rate, at its peak.
        weight_decay: Weight decay.
        layer_decay: By what the learning rate of a layer is less than the next one's; 1 for none. Default: 0.8 where
            ``pretrained`` weights are to change little and the model says which layers it has (all of classification),
            else 1.
        warmup_epochs: Epochs in which the learning rate rises; then it falls as a cosine. Default: a tenth of all, at
            least one.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        label_smoothing: Label smoothing, of classification.
        ema_decay: Decay of the moving average of weights, which is then what is evaluated and kept; 0 for none.
        precision: Precision of products: fp32, or bf16 or fp16 by autocast.
        parallel: How several processes work together: DDP, FSDP2, or DeepSpeed's ZeRO stage 2 or 3.
        compile: Whether to compile the model.
        device: Default: "cuda" where there is one.
        workers: Processes that load data, for each training process.
        checkpoint_every: Steps between checkpoints; there is one at the end of an epoch anyway.
        seed: Of weights, order and augmentation.
        quick: Two epochs on some of the data, to see that everything works; of the other tasks on small crops, four in
            a step.
    """

    output: Path
    task: Literal["classification", "segmentation", "instances", "detection", "masked", "distillation"] = (
        "classification"
    )
    model: str = "test_rat"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Literal["fpn", "groups"] = "fpn"
    width: int = 64
    detail: bool | Literal["contrast", "pixels"] = "contrast"
    detector: Literal["fcos", "mask_rcnn"] = "fcos"
    depth: int = 2
    stages: int = 2
    share: float = 0.75
    block: float | None = None
    window: float | None = None
    hide_level: float = 0.0
    teacher: str = "rat_vit_small_patch16_dinov3.lvd1689m"
    teacher_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher_index: int = -1
    teacher_spacing: list[float] | None = None
    planes: list[int] = dataclasses.field(default_factory=lambda: [0])
    slices: int = 4
    pretrained: bool = True
    data: str | None = None
    size: list[int] | None = None
    images: int | None = None
    crops: int = 8
    foreground: float = 0.5
    levels: list[float] = dataclasses.field(default_factory=lambda: [1])
    ignored: int | None = None
    length: float | None = None
    min_size: float | None = None
    tolerance: float | None = None
    tile: list[int] | None = None
    spacing: list[float] | None = None
    unit: str = "um"
    assumed_unit: str | None = None
    skip_unreadable: bool = False
    intensity: Literal["model", "sample", "data"] = "model"
    scale: tuple[float, float] = (0.6, 1.0)
    factors: tuple[float, float] | None = None
    p_factors: float = 1.0
    flip: bool = False
    gamma: float = 1.0
    epochs: int = 10
    batch_size: int | Literal["auto"] = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    warmup_epochs: int | None = None
    clip_grad: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.9
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    parallel: Literal["ddp", "fsdp", "deepspeed2", "deepspeed3"] = "ddp"
    compile: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 1
    checkpoint_every: int = 100
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        if self.data is None:
            self.data = "digits" if self.task == "classification" else "discs"
        if self.levels[0] != 1 or any(level < 1 for level in self.levels):
            raise ValueError(f"levels must begin with 1 and be at least that, got {self.levels}")
        if self.images is not None and self.images < 1:
            raise ValueError(f"images must be positive, got {self.images}")
        if self.crops < 1:
            raise ValueError(f"crops must be positive, got {self.crops}")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"foreground must be a probability, got {self.foreground}")
        if self.gamma < 1:
            raise ValueError(f"gamma must be at least 1, got {self.gamma}")
        if self.quick:
            self.epochs = 2
        if self.quick and self.task != "classification":
            self.size = [16, 32, 32] if axes_of(self) == 3 else [64, 64]
            self.batch_size = "auto" if self.batch_size == "auto" else 4


def warmup_of(config: Config, epochs: int) -> int:
    """Returns in how many of a training's epochs the learning rate rises."""
    return max(1, epochs // 10) if config.warmup_epochs is None else config.warmup_epochs


def axes_of(config: Config) -> int:
    """Returns the number of axes of a model's images, as its name, or what was saved of it, says."""
    name, saved = config.model, {}
    if name.startswith(SAVED):
        described = json.loads((Path(name.removeprefix(SAVED)) / "config.json").read_text())
        name, saved = described["architecture"], described["model_args"]
    elif name.startswith(HUB):
        from timm.models import load_model_config_from_hf  # takes seconds

        _, name, saved = load_model_config_from_hf(name.removeprefix(HUB))
    return int({**saved, **config.model_args}.get("spatial_dims", 3 if name.endswith("_3d") else 2))


def saved_config(output: Path) -> Config:
    """Returns the config that training began with in an output."""
    return Config(**{**_read(output / BEGAN), "output": output})


def remember(config: Config, write: bool) -> None:
    """Compares a config with the one that training began with; writes it where nothing was trained yet.

    Raises:
        ValueError: If it differs in what would change the training that it is to go on with, or the one that training
            began with cannot be read.
    """
    file = config.output / BEGAN
    text = json.dumps(dataclasses.asdict(config), default=str, indent=2)  # which is YAML, and has no tuples
    if file.exists() and any((config.output / "checkpoints").glob("*")):
        given, began = yaml.safe_load(text), _read(file)
        changed = sorted(name for name in given if name not in FREE and given[name] != began.get(name))
        if changed:
            raise ValueError(f"{', '.join(changed)} must be as in {file}, or output another folder")
    elif write:
        config.output.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(text)
        unfinished.rename(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        began = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is damaged: {error}") from error
    if not isinstance(began, dict):
        raise ValueError(f"{file}: must hold the config that training began with, got {began!r}")
    return began
