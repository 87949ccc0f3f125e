"""How `finetune.py` takes a step: in one process or several, by DDP, FSDP2 or DeepSpeed."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Protocol

import torch
from finetune_config import Config
from finetune_processes import on_first, rank, wait
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
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from rat_timm.data import Batch
from rat_timm.optional import import_optional

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MANIFEST = "manifest.json"


class Engine(Protocol):
    """A model with its optimizer and the moving average of its weights."""

    optimizer: Optimizer

    def step(self, batch: Batch) -> Tensor:
        """Trains on this process's part of a batch; returns the loss."""

    def predict(self, batch: Batch) -> Tensor:
        """Returns the logits of the averaged model."""

    def save(self, folder: Path) -> None:
        """Writes all that training needs to go on; every process calls it."""

    def load(self, folder: Path) -> None:
        """Goes on from what was saved."""

    def weights(self) -> dict[str, Tensor]:
        """Returns the averaged weights, whole and on the CPU; every process calls it."""


def create_engine(model: nn.Module, config: Config) -> Engine:
    """Returns the engine that a config asks for; it takes over the model."""
    model = model.to(config.device)
    if config.compile:
        model.compile()
    return DeepSpeedEngine(model, config) if config.parallel.startswith("deepspeed") else TorchEngine(model, config)


def make_optimizer(model: nn.Module, config: Config) -> Optimizer:
    """Returns timm's optimizer, with a learning rate per layer."""
    return create_optimizer_v2(
        model,
        config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=None if config.layer_decay == 1 else config.layer_decay,
    )


def shard(model: nn.Module) -> None:
    """Shards a model's blocks, one by one, and what is left."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == "blocks":
            for block in module:
                fully_shard(block)
    fully_shard(model)


class TorchEngine:
    """PyTorch alone: one process, DDP or FSDP2."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        sharded = dist.is_initialized() and config.parallel == "fsdp"
        if sharded and config.precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 with fsdp, got fp16")
        self.config = config
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        if sharded:
            for each in (model, self.ema.module) if self.ema else (model,):
                shard(each)
        self.module = model
        self.model = DistributedDataParallel(model) if dist.is_initialized() and not sharded else model
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(config.device, enabled=config.precision == "fp16")

    def step(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        self.model.train()
        loss = F.cross_entropy(
            self._logits(self.model, batch), batch.target, label_smoothing=self.config.label_smoothing
        )
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.module)
        return loss.detach()

    def predict(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        return self._logits(self._averaged.eval(), batch)

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

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        dtype = TYPES.get(self.config.precision)
        with torch.autocast(self.config.device, dtype, enabled=dtype is not None):
            logits = model(batch.image, spacing=batch.spacing, mask=batch.mask)
        return logits.float()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer}
        if self.ema is not None:
            state["average"] = get_model_state_dict(self.ema.module)
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state


class DeepSpeedEngine:
    """DeepSpeed's ZeRO: stage 2 shards gradients and the optimizer, stage 3 the weights too."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        if not dist.is_initialized():
            raise ValueError(f"parallel must be ddp or fsdp without torchrun, got {config.parallel}")
        if config.ema_decay and config.parallel == "deepspeed3":
            raise ValueError(f"ema_decay must be 0 with deepspeed3, whose weights are sharded, got {config.ema_decay}")
        if config.precision == "fp16":
            raise ValueError("precision must be fp32 or bf16 with deepspeed, got fp16")
        self.config = config
        self.ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
        self.model, self.optimizer, *_ = import_optional("deepspeed", "deepspeed").initialize(
            model=model,
            optimizer=make_optimizer(model, config),
            dist_init_required=False,
            config={
                "train_batch_size": config.batch_size,
                "zero_optimization": {"stage": int(config.parallel[-1])},
                "zero_allow_untested_optimizer": True,
                "gradient_clipping": config.clip_grad,
                "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
            },
        )

    def step(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        self.model.train()
        logits = self.model(batch.image, spacing=batch.spacing, mask=batch.mask).float()
        loss = F.cross_entropy(logits, batch.target, label_smoothing=self.config.label_smoothing)
        self.model.backward(loss)
        self.model.step()
        if self.ema is not None:
            self.ema.update(self.model.module)
        return loss.detach()

    def predict(self, batch: Batch) -> Tensor:
        """See `Engine`."""
        model = self.model if self.ema is None else self.ema.module
        model.eval()
        return model(batch.image, spacing=batch.spacing, mask=batch.mask)

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
        with gathered(list(module.parameters()), enabled=self.config.parallel == "deepspeed3"):
            return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


class Checkpoints:
    """Folders with the state after so many steps; the last two are kept.

    Each has a manifest, written last, with the SHA-256 of its files, which PyTorch's and DeepSpeed's formats do not
    have. It tells damage, not malice: both formats hold pickles (PyTorch's distributed checkpoints in their metadata),
    and reading a pickle runs what whoever wrote it wanted to run. Go on only in folders that you trust.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, engine: Engine, step: int) -> None:
        """Saves the state; the folder has its name once all of it is written."""
        unfinished = self.folder / f"unfinished-{step:08}"
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        wait()
        engine.save(unfinished)
        wait()
        if rank() == 0:
            write_manifest(unfinished)
            shutil.rmtree(self.folder / f"{step:08}", ignore_errors=True)
            unfinished.rename(self.folder / f"{step:08}")
            for old in [path for path in self._finished() if int(path.name) <= step][:-2]:
                shutil.rmtree(old)

    def load_last(self, engine: Engine) -> int:
        """Loads the last state that is not damaged, if there is one; returns its number of steps.

        Raises:
            ValueError: If all are damaged.
        """
        wait()
        name = on_first(self._last)
        if name is None:
            return 0
        engine.load(self.folder / name)
        return int(name)

    def _last(self) -> str | None:
        finished = self._finished()
        for folder in reversed(finished):
            damage = find_damage(folder)
            if damage is None:
                return folder.name
            warnings.warn(f"{folder}: is damaged and left out: {damage}", stacklevel=2)
        if finished:
            raise ValueError(f"{self.folder}: all checkpoints are damaged: remove them to begin again")
        return None

    def _finished(self) -> list[Path]:
        folders = (path for path in self.folder.glob("*") if re.fullmatch("[0-9]{8,}", path.name) and path.is_dir())
        return sorted(folders, key=lambda path: int(path.name))


def write_manifest(folder: Path) -> None:
    """Writes the SHA-256 of each file in a folder beside them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=2))


def find_damage(folder: Path) -> str | None:
    """Returns what differs from a folder's manifest; None if all files are as they were written."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        changed = [name for name, digest in digests.items() if _sha256(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed" if changed else None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
