"""A run of training: data, epochs, evaluation, logs and checkpoints from which it goes on, over any processes."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import timm
import torch
from rich.progress import Progress, TaskID
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import MulticlassAccuracy

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import hub
from rat_timm.data import collate, evaluation_transform, training_transform
from training.checkpoints import Checkpoints
from training.config import Config, remember
from training.data import Augmented, open_data
from training.engines import Engine, create_engine
from training.processes import count, locked, rank
from training.spacings import Spacings
from training.steps import fit


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
        transform = training_transform(size, config.scale, config.flip, config.factors)
        augmented = Augmented(training, transform, model, config)
        held_out = Augmented(validation, evaluation_transform(size), model, config)
        engine = create_engine(model, config)
        trainer = Trainer(config, engine, augmented, held_out, len(classes), report)
        accuracy = trainer.run()
        weights = engine.weights()  # every process has a part in it
        if rank() == 0:
            model = timm.create_model(config.model, num_classes=len(classes), **config.model_args)
            model.load_state_dict(weights)
            seen = trainer.spacings.range()
            hub.save(model, config.output / "model", label_names=classes, spacing_range=seen)
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


def _mean(value: Tensor) -> float:
    """Returns the mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return float(value) / count()


class Trainer:
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
        self.spacings = Spacings(config.output / "spacings.json", again=self.step > 0)
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
                seen = self.spacings.watch(self._batches(epoch))
                batches = (batch.to(self.config.device, non_blocking=True) for batch in seen)
                fit(self.engine, batches, self._prepare, functools.partial(self._finish, progress, bar), self.step)
                accuracy = self._evaluate()
                self.report({"epoch": epoch, "loss": self.loss, "accuracy": accuracy})
                self._save()  # an epoch is done once it is evaluated
        self.spacings.save()
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

    def _prepare(self, step: int) -> None:
        self.scheduler.step_update(step)
        torch.manual_seed(int(np.random.SeedSequence([self.config.seed, step, rank()]).generate_state(1)[0]))

    def _finish(self, progress: Progress, bar: TaskID, step: int, loss: Tensor) -> None:
        """Logs a step, and saves a checkpoint if it is time."""
        self.loss, self.step = _mean(loss), step + 1
        progress.update(bar, advance=1, description=f"{self.config.model}, loss {self.loss:.3f}")
        if self.writer is not None:
            self.writer.add_scalar("train/loss", self.loss, self.step)
            self.writer.add_scalar("train/lr", max(g["lr"] for g in self.engine.optimizer.param_groups), self.step)
        if self.step % self.config.checkpoint_every == 0 and self.step % self.steps:
            self._save()

    def _save(self) -> None:
        self.spacings.save()
        self.checkpoints.save(self.engine, self.step)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Returns the share of the validation data that is right, each sample counted once."""
        self.accuracy.reset()
        place, samples = rank(), len(self.held_out.dataset)
        for batch in self.spacings.watch(self.evaluation):
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
