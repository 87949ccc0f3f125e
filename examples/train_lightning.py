"""Trains with Lightning: the tasks and data of `train.py` as a LightningModule and a LightningDataModule.

    python examples/train_lightning.py fit --data.config.output runs/discs --data.config.task segmentation \
        --data.config.quick true --trainer.max_epochs 2
    python examples/train_lightning.py fit --config mine.yaml --trainer.devices 4 --trainer.precision bf16-mixed

or, with a Trainer of one's own:

    data = TaskData(Config("runs/cells", task="detection", data="hela"))
    Trainer(max_epochs=20).fit(TaskModule(data), data)

`--data.config.task` is classification, segmentation, instances or detection; `train.py` says what else a config holds.
Epochs, precision, devices, clipping and moving averages are Lightning's. The trained model is in the folder `model` of
the output, as `train.py` writes it.

    # mine.yaml
    data:
      config:
        output: runs/cells
        task: segmentation
        data: cells
        model: rat_tiny
        pretrained: false
    trainer:
      max_epochs: 100
"""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset

from training.config import Config, warmup_of
from training.engines import create_optimizer
from training.processes import count, gather, rank
from training.spacings import Spacings
from training.steps import Output, in_float
from training.tasks import Measured, Task, task_class


class TaskData(LightningDataModule):
    """Images with their pixel size, and what is to be learned of them.

    Args:
        config: Says which; ``batch_size`` counts the samples of all processes.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        if config.batch_size == "auto":
            raise ValueError("batch_size must be a number with Lightning, got 'auto'")
        self.config = config
        self.task: Task = task_class(config)(config)
        self.training: Dataset | None = None
        self.validation: Dataset | None = None

    def setup(self, stage: str) -> None:
        """Opens the data, with the mean and deviation of the module's model."""
        processes = self.trainer.world_size
        if self.config.batch_size % processes:
            raise ValueError(
                f"batch_size must be a multiple of the {processes} processes, got {self.config.batch_size}"
            )
        self.training, self.validation = self.task.samples(self.trainer.lightning_module.model)

    def train_dataloader(self) -> DataLoader:
        """Samples in random order."""
        self.training.epoch = self.trainer.current_epoch
        return self._loader(self.training, self.config.batch_size // self.trainer.world_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Each sample once."""
        return self._loader(self.validation, self.task.at_once or self.config.batch_size // self.trainer.world_size)

    def _loader(self, data: Dataset, batch_size: int, shuffle: bool = False) -> DataLoader:
        return DataLoader(
            data,
            batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.config.workers,
            collate_fn=self.task.collate,
        )


class TaskModule(LightningModule):
    """The model of a task, its loss and its figures.

    Args:
        data: Whose task it is.
    """

    def __init__(self, data: TaskData) -> None:
        super().__init__()
        self.task, self.config = data.task, data.config
        self.model = self.task.create_model()
        self.measured: dict[int, Measured] = {}  # by the sample
        self.config.output.mkdir(parents=True, exist_ok=True)
        self.spacings = Spacings(self.config.output / "spacings.json", again=False)

    def forward(self, batch: Any) -> Output:
        """Calls the model on a batch with its spacing, mask and origin."""
        return in_float(self.task.outputs(self.model, batch))

    def on_train_epoch_start(self) -> None:
        """Gives crops new chance."""
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Returns the loss."""
        (batch,) = self.spacings.watch([batch])
        outputs = self(batch)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.task.loss(outputs, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.spacing))
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Compares predictions with what is true."""
        (batch,) = self.spacings.watch([batch])
        held_out = len(self.trainer.val_dataloaders.dataset)
        for number, prediction in enumerate(self.task.predict(self, batch)):
            place = rank() + count() * len(self.measured)
            if place < held_out:  # the last ones may be repeats of the first
                self.measured[place] = self.task.measure(prediction, batch, number)

    def on_validation_epoch_end(self) -> None:
        """Logs the figures of all samples."""
        together = {place: one for part in gather(self.measured) for place, one in part.items()}
        self.measured = {}
        figures = self.task.summarize([together[place] for place in sorted(together)])
        self.log_dict({f"validation/{name}": value for name, value in figures.items()}, batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        """Makes timm's optimizer, whose learning rates rise in the warmup epochs and fall then."""
        optimizer = create_optimizer(self.model, self.config)
        rates = [self.config.lr * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
        epochs = max(1, self.trainer.max_epochs or 1)
        share = min(0.5, warmup_of(self.config, epochs) / epochs)
        scheduler = OneCycleLR(optimizer, rates, int(self.trainer.estimated_stepping_batches), pct_start=share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Saves the model as `train.py` does."""
        if self.trainer.fast_dev_run:
            return
        self.spacings.save()
        if self.trainer.is_global_zero:
            weights = {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
            self.task.save(weights, self.config.output / "model", self.spacings.range())


class Cli(LightningCLI):
    """Lightning's command line, whose module has the data's task."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See Lightning."""
        parser.link_arguments("data", "model.data", apply_on="instantiate")


def main() -> None:
    """Reads the command line and trains."""
    defaults = {"max_epochs": 10, "gradient_clip_val": 1.0}
    Cli(TaskModule, TaskData, trainer_defaults=defaults, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
