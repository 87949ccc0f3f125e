"""The config of `train.py`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

# may change when training goes on: what changes no step, and the epochs, to train longer (the schedule stretches)
FREE = ("output", "epochs", "compile", "device", "workers", "checkpoint_every")

BEGAN = "config.yaml"  # the config that training began with, in the output


@dataclasses.dataclass
class Config:
    """What to train, on what, and how.

    Args:
        output: Folder for checkpoints, TensorBoard's logs and the trained model; all processes have to see it.
        model: A name of this package's.
        model_args: Further keywords of timm's create_model, such as drop_path_rate.
        pretrained: Whether to start from pretrained weights.
        data: "digits", or a folder with train/<class>/* and validation/<class>/*.
        size: Pixels along each axis to which images are brought. Default: the model's.
        spacing: Pixel size (y, x) of pictures (PNG, JPEG), which do not say it, in the unit.
        unit: Unit of the pixel sizes, which is that of the model's reference spacing.
        assumed_unit: Unit of the pixel sizes of files that have numbers and no unit; else they are an error.
        skip_unreadable: Whether to train without files that cannot be read, rather than stop at the first one. All are
            tried before training begins; those that it leaves out are listed in the output.
        intensity: "model" scales integers to 0..1 and uses the model's mean and deviation; "sample" uses each sample's.
        scale: Least and largest share of an image that a training crop keeps.
        factors: Least and largest factor of the pixel size of training crops, drawn log-uniformly: a crop has so many
            more or fewer pixels in the same field of view, and the noise of such pixels. Default: all have the size.
        flip: Whether to flip training crops along each axis, half of the time.
        epochs: Number of epochs.
        batch_size: Samples in a step, over all processes.
        optimizer: A name that timm's create_optimizer_v2 knows.
        lr: Learning rate, at its peak.
        weight_decay: Weight decay.
        layer_decay: By what the learning rate of a layer is less than the next one's; 1 for none.
        warmup_epochs: Epochs in which the learning rate rises; then it falls as a cosine.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        label_smoothing: Label smoothing.
        ema_decay: Decay of the moving average of weights, which is then what is evaluated and kept; 0 for none.
        precision: Precision of products: fp32, or bf16 or fp16 by autocast.
        parallel: How several processes work together: DDP, FSDP2, or DeepSpeed's ZeRO stage 2 or 3.
        compile: Whether to compile the model.
        device: Default: "cuda" where there is one.
        workers: Processes that load data, for each training process.
        checkpoint_every: Steps between checkpoints; there is one at the end of an epoch anyway.
        seed: Of weights, order and augmentation.
        quick: Two epochs on some of the data, to see that everything works.
    """

    output: Path
    model: str = "test_rat"
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained: bool = True
    data: str = "digits"
    size: list[int] | None = None
    spacing: list[float] | None = None
    unit: str = "um"
    assumed_unit: str | None = None
    skip_unreadable: bool = False
    intensity: Literal["model", "sample"] = "model"
    scale: tuple[float, float] = (0.6, 1.0)
    factors: tuple[float, float] | None = None
    flip: bool = False
    epochs: int = 10
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 0.8
    warmup_epochs: int = 1
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
        if self.quick:
            self.epochs = 2


def remember(config: Config, write: bool) -> None:
    """Compares a config with the one that training began with; writes it if there is none.

    Raises:
        ValueError: If it differs in what would change the training that it is to go on with, or the one that training
            began with cannot be read.
    """
    file = config.output / BEGAN
    text = json.dumps(dataclasses.asdict(config), default=str, indent=2)  # which is YAML, and has no tuples
    if file.exists():
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
