"""What takes steps: a model in one process or several, by DDP, FSDP2 or DeepSpeed."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rat_timm.optional import import_optional
from training.config import Config
from training.steps import Labelled, Output, Recipe, in_float

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OptimizerOf = Callable[[nn.Module], Optimizer]


class Engine(Protocol):
    """A model with its optimizer and the moving average of its weights."""

    optimizer: Optimizer

    def step(self, batch: Labelled) -> Tensor:
        """Trains on this process's part of a batch; returns the loss."""

    def predict(self, batch: Labelled) -> Output:
        """Returns what the averaged model says, such as logits."""

    def save(self, folder: Path) -> None:
        """Writes all that training needs to go on; every process calls it."""

    def load(self, folder: Path) -> None:
        """Goes on from what was saved."""

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged weights, whole and on the CPU; every process calls it."""


def create_engine(model: nn.Module, recipe: Recipe, config: Config) -> Engine:
    """Returns the engine that a config asks for; it takes over the model."""
    model = model.to(config.device)
    if config.compile:
        model.compile()
    optimizer = functools.partial(create_optimizer, config=config)
    if config.parallel.startswith("deepspeed"):
        return DeepSpeedEngine(model, optimizer, recipe, int(config.parallel[-1]), int(config.batch_size))
    return TorchEngine(model, optimizer, recipe, config.device, config.parallel)


def create_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Makes timm's optimizer, with a learning rate per layer where the model says which layers it has."""
    has_layers = hasattr(model, "group_matcher")
    decay = config.layer_decay
    if decay is None:
        decay = 0.8 if has_layers and config.pretrained else 1.0
    if decay != 1 and not has_layers:
        raise ValueError(f"layer_decay must be 1 for {type(model).__name__}, which has no group_matcher, got {decay}")
    return create_optimizer_v2(
        model,
        config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=None if decay == 1 else decay,
    )


def shard(model: nn.Module) -> None:
    """Shards a model's blocks, one by one, and what is left."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module:
                fully_shard(block)
    fully_shard(model)
    if hasattr(model, "features"):  # what is called beside forward
        register_fsdp_forward_method(model, "features")


class TorchEngine:
    """PyTorch alone: one process, DDP or FSDP2.

    Args:
        model: Is taken over.
        optimizer: Makes the optimizer of a model, once it is sharded.
        recipe: What a step is.
        device: Where the model is.
        parallel: "ddp" or "fsdp", for several processes; None: each has a model of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerOf,
        recipe: Recipe,
        device: str = "cpu",
        parallel: str | None = "ddp",
    ) -> None:
        several = dist.is_initialized() and parallel is not None
        sharded = several and parallel == "fsdp"
        if sharded and recipe.precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 with fsdp, got fp16")
        self.recipe, self.device = recipe, device
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        if sharded:
            for each in (model, self.ema.module) if self.ema else (model,):
                shard(each)
        self.module = model
        self.model = DistributedDataParallel(model) if several and not sharded else model
        self.optimizer = optimizer(model)
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.precision == "fp16")

    def step(self, batch: Labelled) -> Tensor:
        """See `Engine`."""
        loss = self.recipe.loss(self._outputs(self.model.train(), batch), batch)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.module)
        return loss.detach()

    def predict(self, batch: Labelled) -> Output:
        """See `Engine`."""
        return self._outputs(self._averaged.eval(), batch)

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if self.ema is not None:
            set_model_state_dict(self.ema.module, state["average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return get_model_state_dict(
            self._averaged, options=StateDictOptions(full_state_dict=True, cpu_offload=dist.is_initialized())
        )

    @property
    def _averaged(self) -> nn.Module:
        return self.module if self.ema is None else self.ema.module

    def _outputs(self, model: nn.Module, batch: Labelled) -> Output:
        dtype = TYPES.get(self.recipe.precision)
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            return in_float(self.recipe.outputs(model, batch))

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        if self.ema is not None:
            state["average"] = get_model_state_dict(self.ema.module)
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state


class DeepSpeedEngine:
    """DeepSpeed's ZeRO: stage 2 shards gradients and the optimizer, stage 3 the weights too.

    Args:
        model: Is taken over.
        optimizer: Makes the optimizer of a model.
        recipe: What a step is.
        stage: 2 or 3.
        batch_size: Samples in a step, over all processes.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerOf, recipe: Recipe, stage: int, batch_size: int) -> None:
        if not dist.is_initialized():
            raise ValueError(f"parallel must be ddp or fsdp without torchrun, got deepspeed{stage}")
        if recipe.ema_decay and stage == 3:
            raise ValueError(f"ema_decay must be 0 with deepspeed3, whose weights are sharded, got {recipe.ema_decay}")
        if recipe.precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 with deepspeed, got fp16")
        self.recipe, self.stage = recipe, stage
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        self.model, self.optimizer, *_ = import_optional("deepspeed", "deepspeed").initialize(
            model=model,
            optimizer=optimizer(model),
            dist_init_required=False,
            config={
                "train_batch_size": batch_size,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": recipe.clip_grad,
                "torch_autocast": {"enabled": recipe.precision == "bf16", "dtype": "bfloat16"},
            },
        )

    def step(self, batch: Labelled) -> Tensor:
        """See `Engine`."""
        self.model.train()
        loss = self.recipe.loss(in_float(self.recipe.outputs(self.model, batch)), batch)
        self.model.backward(loss)
        self.model.step()
        if self.ema is not None:
            self.ema.update(self.model.module)
        return loss.detach()

    def predict(self, batch: Labelled) -> Output:
        """See `Engine`."""
        model = self.model if self.ema is None else self.ema.module
        model.eval()
        return in_float(self.recipe.outputs(model, batch))

    def save(self, folder: Path) -> None:
        """See `Engine`."""
        average = {} if self.ema is None else {"average": self.ema.state_dict()}
        self.model.save_checkpoint(folder, tag="state", client_state=average)

    def load(self, folder: Path) -> None:
        """See `Engine`."""
        _, state = self.model.load_checkpoint(folder, tag="state")
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        if self.ema is not None:
            return {name: value.cpu() for name, value in self.ema.module.state_dict().items()}
        module = self.model.module
        gathered = import_optional("deepspeed", "deepspeed").zero.GatheredParameters
        with gathered(list(module.parameters()), enabled=self.stage == 3):
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
