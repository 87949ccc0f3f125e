"""Fine-tunes any variant on a folder of images or volumes, or on handwritten digits, with the pixel size.

    python examples/finetune.py --output runs/digits         # test_rat on digits, half a minute
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
import os
from collections.abc import Callable, Iterator, Sequence

import jsonargparse
import numpy as np
import timm
import torch
from finetune_config import Config, remember
from finetune_data import Augmented, open_data
from finetune_engines import Checkpoints, Engine, create_engine
from finetune_processes import count, locked, rank
from rich.progress import Progress
from timm.scheduler import create_scheduler_v2
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassAccuracy

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import hub
from rat_timm.data import Batch, collate, evaluation_transform, training_transform


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
    with _processes(config), locked(config.output):
        remember(config, write=False)
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
        if rank() == 0:
            model = timm.create_model(config.model, num_classes=len(classes), **config.model_args)
            model.load_state_dict(weights)
            hub.save(model, config.output / "model", label_names=classes)
        return accuracy


@contextlib.contextmanager
def _processes(config: Config) -> Iterator[None]:
    """Connects the processes that torchrun started, unless somebody has done so."""
    ours = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size % count():
        raise ValueError(f"batch_size must be a multiple of the {count()} processes, got {config.batch_size}")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def _mean(value: torch.Tensor) -> float:
    """Returns the mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value) / count()


class _Trainer:
    """The loop over epochs and steps.

    Which samples a step has, and chance in them, follow from the seed and the step alone, whatever the number of
    processes is and wherever training began again. (Chance in the model, such as dropout, depends on the process too.)
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
        self.held_out = DistributedSampler(validation, count(), rank(), shuffle=False)
        self.evaluation = self._loader(validation, list(BatchSampler(self.held_out, self._share, drop_last=False)))
        self.order = DistributedSampler(training, count(), rank(), seed=config.seed, drop_last=True)
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
        remember(config, write=rank() == 0)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.step = self.checkpoints.load_last(engine)
        done = -(-self.step // self.steps)
        if config.epochs < done:
            raise ValueError(f"epochs must be at least the {done} begun in {config.output}, got {config.epochs}")
        self.writer = SummaryWriter(config.output, purge_step=self.step + 1) if rank() == 0 else None

    def run(self) -> float:
        """Trains the epochs that are left; returns the last accuracy."""
        accuracy = self._evaluate() if self.step == self.config.epochs * self.steps else 0.0
        with Progress(disable=rank() > 0) as progress:
            bar = progress.add_task(self.config.model, total=self.config.epochs * self.steps, completed=self.step)
            for epoch in range(self.step // self.steps, self.config.epochs):
                for batch in self._batches(epoch):
                    loss = self._train_step(batch)
                    progress.update(bar, advance=1, description=f"{self.config.model}, loss {loss:.3f}")
                accuracy = self._evaluate()
                self.report({"epoch": epoch, "loss": loss, "accuracy": accuracy})
                self.checkpoints.save(self.engine, self.step)  # an epoch is done once it is evaluated
        if self.writer is not None:
            self.writer.close()
        return accuracy

    @property
    def _share(self) -> int:
        return self.config.batch_size // count()

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
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, self.step, rank()]).generate_state(1)[0]))
        loss = _mean(self.engine.step(batch.to(self.config.device, non_blocking=True)))
        self.step += 1
        if self.writer is not None:
            self.writer.add_scalar("train/loss", loss, self.step)
            self.writer.add_scalar("train/lr", max(g["lr"] for g in self.engine.optimizer.param_groups), self.step)
        if self.step % self.config.checkpoint_every == 0 and self.step % self.steps:
            self.checkpoints.save(self.engine, self.step)
        return loss

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Returns the share of the validation data that is right, each sample counted once."""
        self.accuracy.reset()
        place, samples = rank(), len(self.held_out.dataset)
        for batch in self.evaluation:
            batch = batch.to(self.config.device)
            logits = self.engine.predict(batch)
            places = place + count() * torch.arange(len(logits))  # the last ones may be repeats of the first
            new = places < samples
            if new.any():
                self.accuracy.update(logits[new].float(), batch.target[new])
            place += count() * len(logits)
        accuracy = float(self.accuracy.compute())
        if self.writer is not None:
            self.writer.add_scalar("validation/accuracy", accuracy, self.step)
        return accuracy


if __name__ == "__main__":
    main()
