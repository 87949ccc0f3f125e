"""A run of training: data, epochs, evaluation, logs and checkpoints from which it goes on, over any processes."""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import Progress, TaskID
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from training.batch_size import find_batch_size
from training.checkpoints import Checkpoints
from training.config import Config, remember, warmup_of
from training.engines import Engine, create_engine
from training.processes import count, gather, locked, rank
from training.spacings import Spacings
from training.steps import Recipe, fit
from training.tasks import Call, Measured, Task, task_class


def train(config: Config, report: Callable[[dict[str, float]], None] = lambda metrics: None) -> float:
    """Trains from the last checkpoint on, if there is one; every process calls this.

    Args:
        config: The same in every process.
        report: Is given the figures after every epoch.

    Returns:
        How good the trained model is on the validation data, by the task's figure that tells it.
    """
    with _processes(config), locked(config.output):
        remember(config, write=False)
        torch.manual_seed(config.seed)
        task = task_class(config)(config)
        model = task.create_model()
        training, validation = task.samples(model)
        recipe = Recipe(task.outputs, task.loss, config.clip_grad, config.ema_decay, config.precision)
        given = config
        if config.batch_size == "auto":
            config = copy.copy(config)
            config.batch_size = find_batch_size(model, training, task.collate, recipe, config)
        engine = create_engine(model, recipe, config)
        trainer = Trainer(config, given, task, engine, training, validation, report)
        figures = trainer.run()
        weights = engine.weights()  # every process has a part in it
        if rank() == 0:
            task.save(weights, config.output / "model", trainer.spacings.range())
        return figures[task.score]


@contextlib.contextmanager
def _processes(config: Config) -> Iterator[None]:
    """Connects the processes that torchrun started, unless somebody has done so."""
    ours = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch_size != "auto" and config.batch_size % count():
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
        given: Config,
        task: Task,
        engine: Engine,
        training: Dataset,
        validation: Dataset,
        report: Callable[[dict[str, float]], None],
    ) -> None:
        self.config, self.task, self.engine, self.training, self.report = config, task, engine, training, report
        self.held_out = DistributedSampler(validation, count(), rank(), shuffle=False)
        at_once = task.at_once or self._share
        self.evaluation = self._loader(validation, list(BatchSampler(self.held_out, at_once, drop_last=False)))
        self.order = DistributedSampler(training, count(), rank(), seed=config.seed, drop_last=True)
        self.steps = len(training) // config.batch_size  # per epoch
        if not self.steps:
            raise ValueError(f"batch_size must be at most the {len(training)} samples, got {config.batch_size}")
        self.scheduler, _ = create_scheduler_v2(
            engine.optimizer,
            num_epochs=config.epochs,
            warmup_epochs=warmup_of(config, config.epochs),
            warmup_lr=config.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        remember(given, write=rank() == 0)
        self.checkpoints = Checkpoints(config.output / "checkpoints")
        self.step = self.checkpoints.load_last(engine)
        self.spacings = Spacings(config.output / "spacings.json", again=self.step > 0)
        done = -(-self.step // self.steps)
        if config.epochs < done:
            raise ValueError(f"epochs must be at least the {done} begun in {config.output}, got {config.epochs}")
        self.writer = SummaryWriter(config.output, purge_step=self.step + 1) if rank() == 0 else None

    def run(self) -> dict[str, float]:
        """Trains the epochs that are left; returns the last figures."""
        figures = self._evaluate() if self.step == self.config.epochs * self.steps else {}
        with Progress(disable=rank() > 0) as progress:
            bar = progress.add_task(self.config.model, total=self.config.epochs * self.steps, completed=self.step)
            for epoch in range(self.step // self.steps, self.config.epochs):
                seen = self.spacings.watch(self._batches(epoch))
                batches = (batch.to(self.config.device, non_blocking=True) for batch in seen)
                fit(self.engine, batches, self._prepare, functools.partial(self._finish, progress, bar), self.step)
                figures = self._evaluate()
                self.report({"epoch": epoch, "loss": self.loss, **figures})
                self._save()  # an epoch is done once it is evaluated
        self.spacings.save()
        if self.writer is not None:
            self.writer.close()
        return figures

    @property
    def _share(self) -> int:
        return self.config.batch_size // count()

    def _batches(self, epoch: int) -> DataLoader:
        """Returns this process's batches of an epoch, without those that are done."""
        self.training.epoch = epoch
        self.order.set_epoch(epoch)
        batches = list(BatchSampler(self.order, self._share, drop_last=True))
        return self._loader(self.training, batches[self.step - epoch * self.steps : self.steps])

    def _loader(self, data: Dataset, batches: Sequence[list[int]]) -> DataLoader:
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=self.config.workers,
            collate_fn=self.task.collate,
            pin_memory=self.config.device == "cuda",
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
    def _evaluate(self) -> dict[str, float]:
        """Returns the figures of the validation data, each sample counted once."""
        measured: dict[int, Measured] = {}  # by the sample
        place, samples = rank(), len(self.held_out.dataset)
        call = _InStep(self.engine.predict)
        for batch in self.spacings.watch(self.evaluation):
            batch = batch.to(self.config.device)
            predictions = self.task.predict(call, batch)
            if self.config.parallel != "ddp":
                call.catch_up()
            if self.writer is not None and not measured:
                self._draw(predictions[0], batch)
            for index, prediction in enumerate(predictions):
                if place < samples:  # the last ones may be repeats of the first
                    measured[place] = self.task.measure(prediction, batch, index)
                place += count()
        together = {place: one for part in gather(measured) for place, one in part.items()}
        figures = self.task.summarize([together[place] for place in sorted(together)])
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(f"validation/{name}", value, self.step)
        return figures

    def _draw(self, prediction: object, batch: Any) -> None:
        """Shows the first prediction."""
        picture = self.task.picture(prediction, batch, 0)
        if picture is not None:
            self.writer.add_image("validation/prediction", picture, self.step)


class _InStep:
    """Calls of a model whose weights are shared, which all processes have to make together."""

    def __init__(self, predict: Call) -> None:
        self.predict, self.calls, self.last = predict, 0, None

    def __call__(self, batch: Any) -> Any:
        self.calls, self.last = self.calls + 1, batch
        return self.predict(batch)

    def catch_up(self) -> None:
        """Makes as many calls as the process that made most."""
        missing = max(gather(self.calls)) - self.calls
        for _ in range(missing):
            self(self.last)
