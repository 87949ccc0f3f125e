"""Fine-tunes any variant on a folder of images or volumes, or on handwritten digits, with the pixel size.

    python examples/finetune.py --output runs/digits                       # test_rat on digits, two minutes
    python examples/finetune.py --config mine.yaml --lr 1e-4               # a config, and flags over it
    torchrun --nproc_per_node=4 examples/finetune.py --config mine.yaml    # DDP
    torchrun --nproc_per_node=4 examples/finetune.py --config mine.yaml --parallel fsdp
    python examples/finetune_ray.py --config mine.yaml --num_workers 4     # on a Ray cluster

`--help` lists what a config may hold. The folder has `train/<class>/*` and `validation/<class>/*`: OME-TIFF, OME-Zarr,
NIfTI or DICOM, which say their pixel size, or PNG and JPEG, whose pixel size `--spacing` says. The same command goes on
where it was interrupted, with the same losses as if it had not been. The folder `model` in the output is what
`timm.create_model("local-dir:OUTPUT/model", pretrained=True)` takes.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import numpy as np
import timm
import torch
import yaml
from finetune_data import Augmented, open_data
from finetune_engines import Checkpoints, Engine, create_engine
from rich.progress import Progress
from timm.scheduler import create_scheduler_v2
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassAccuracy

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import hub
from rat_timm.data import Batch, collate, evaluation_transform, training_transform

FREE = ("output", "epochs", "compile", "device", "workers", "checkpoint_every")  # may change when training goes on


@dataclasses.dataclass
class Config:
    """What to train, on what, and how.

    Args:
        output: Folder for checkpoints, TensorBoard's logs and the trained model; all processes have to see it.
        model: A name that timm knows.
        model_args: Further keywords of timm's create_model, such as drop_path_rate.
        pretrained: Whether to start from pretrained weights.
        data: "digits", or a folder with train/<class>/* and validation/<class>/*.
        size: Pixels along each axis to which images are brought. Default: the model's.
        spacing: Pixel size (z, y, x) of files that do not say it, in the unit.
        unit: Unit of the pixel sizes, which is that of the model's reference spacing.
        intensity: "model" scales integers to 0..1 and uses the model's mean and deviation; "sample" uses each sample's.
        scale: Least and largest share of an image that a training crop keeps.
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
    intensity: Literal["model", "sample"] = "model"
    scale: tuple[float, float] = (0.6, 1.0)
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


def main() -> None:
    """Reads the command line and trains."""
    config = jsonargparse.auto_cli(Config, as_positional=False, description=__doc__)
    accuracy = train(config)
    print(f"accuracy {accuracy:.1%}, {config.output / 'model'}")


def train(config: Config, report: Callable[[dict[str, float]], None] = lambda metrics: None) -> float:
    """Trains from the last checkpoint on, if there is one; every process calls this.

    Args:
        config: The same in every process.
        report: Is given the metrics after every epoch.

    Returns:
        The share of the validation data that the trained model gets right.
    """
    with _processes(config):
        torch.manual_seed(config.seed)
        training, validation, classes = open_data(config)
        model = timm.create_model(
            config.model, pretrained=config.pretrained, num_classes=len(classes), **config.model_args
        )
        size = config.size or model.pretrained_cfg["input_size"][1:]
        augmented = Augmented(training, training_transform(size, config.scale, config.flip), model, config)
        held_out = Augmented(validation, evaluation_transform(size), model, config)
        engine = create_engine(model, config)
        accuracy = _Trainer(config, engine, augmented, held_out, len(classes), report).run()
        weights = engine.weights()  # every process has a part in it
        if _rank() == 0:
            model = timm.create_model(config.model, num_classes=len(classes), **config.model_args)
            model.load_state_dict(weights)
            hub.save(model, config.output / "model", label_names=classes)
        return accuracy


def remember(config: Config) -> None:
    """Writes a config to its output.

    Raises:
        ValueError: If training began there with another one, but for what changes no result.
    """
    file = config.output / "config.yaml"
    given = {**dataclasses.asdict(config), "output": str(config.output), "scale": list(config.scale)}
    began = yaml.safe_load(file.read_text()) if file.exists() else given
    changed = sorted(name for name in given if name not in FREE and given[name] != began[name])
    if changed:
        raise ValueError(f"{', '.join(changed)} must be as in {file}, or output another folder")
    config.output.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(given, sort_keys=False))


@contextlib.contextmanager
def _processes(config: Config) -> Iterator[None]:
    """Connects the processes that torchrun started, unless somebody has done so."""
    ours = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size % _count():
        raise ValueError(f"batch_size must be a multiple of the {_count()} processes, got {config.batch_size}")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _mean(value: torch.Tensor) -> float:
    """Returns the mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value) / _count()


class _Trainer:
    """The loop over epochs and steps.

    Which samples a step has, and all chance in it, follow from the seed and the step alone, whatever the number of
    processes is and wherever training began again.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        training: Augmented,
        validation: Augmented,
        num_classes: int,
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self.config, self.engine, self.training, self.report = config, engine, training, report
        self.held_out = DistributedSampler(validation, _count(), _rank(), shuffle=False)
        self.evaluation = self._loader(validation, list(BatchSampler(self.held_out, self._share, drop_last=False)))
        self.order = DistributedSampler(training, _count(), _rank(), seed=config.seed, drop_last=True)
        self.steps = len(training) // config.batch_size  # per epoch
        if not self.steps:
            raise ValueError(f"batch_size must be at most the {len(training)} samples, got {config.batch_size}")
        self.scheduler, _ = create_scheduler_v2(
            engine.optimizer,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            warmup_lr=config.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        self.accuracy = MulticlassAccuracy(num_classes, average="micro").to(config.device)
        if _rank() == 0:
            remember(config)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.step = self.checkpoints.load_last(engine)
        self.writer = SummaryWriter(config.output, purge_step=self.step + 1) if _rank() == 0 else None

    def run(self) -> float:
        """Trains the epochs that are left; returns the last accuracy."""
        accuracy = None
        with Progress(disable=_rank() > 0) as progress:
            bar = progress.add_task(self.config.model, total=self.config.epochs * self.steps, completed=self.step)
            for epoch in range(self.step // self.steps, self.config.epochs):
                for batch in self._batches(epoch):
                    loss = self._train_step(batch)
                    progress.update(bar, advance=1, description=f"{self.config.model}, loss {loss:.3f}")
                accuracy = self._evaluate()
                self.report({"epoch": epoch, "loss": loss, "accuracy": accuracy})
        accuracy = self._evaluate() if accuracy is None else accuracy
        if self.writer is not None:
            self.writer.close()
        return accuracy

    @property
    def _share(self) -> int:
        return self.config.batch_size // _count()

    def _batches(self, epoch: int) -> DataLoader:
        """Returns this process's batches of an epoch, without those that are done."""
        self.training.epoch = epoch
        self.order.set_epoch(epoch)
        batches = list(BatchSampler(self.order, self._share, drop_last=True))
        return self._loader(self.training, batches[self.step - epoch * self.steps : self.steps])

    def _loader(self, data: Augmented, batches: Sequence[list[int]]) -> DataLoader:
        memory = self.config.device == "cuda"
        return DataLoader(
            data, batch_sampler=batches, num_workers=self.config.workers, collate_fn=collate, pin_memory=memory
        )

    def _train_step(self, batch: Batch) -> float:
        self.scheduler.step_update(self.step)
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, self.step, _rank()]).generate_state(1)[0]))
        loss = _mean(self.engine.step(batch.to(self.config.device, non_blocking=True)))
        self.step += 1
        if self.writer is not None:
            self.writer.add_scalar("train/loss", loss, self.step)
            self.writer.add_scalar("train/lr", max(g["lr"] for g in self.engine.optimizer.param_groups), self.step)
        if self.step % self.config.checkpoint_every == 0 or self.step % self.steps == 0:
            self.checkpoints.save(self.engine, self.step)
        return loss

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Returns the share of the validation data that is right, each sample counted once."""
        self.accuracy.reset()
        place, count = _rank(), len(self.held_out.dataset)
        for batch in self.evaluation:
            batch = batch.to(self.config.device)
            logits = self.engine.predict(batch)
            places = place + _count() * torch.arange(len(logits))  # the last ones may be repeats of the first
            new = places < count
            if new.any():
                self.accuracy.update(logits[new].float(), batch.target[new])
            place += _count() * len(logits)
        accuracy = float(self.accuracy.compute())
        if self.writer is not None:
            self.writer.add_scalar("validation/accuracy", accuracy, self.step)
        return accuracy


if __name__ == "__main__":
    main()
