"""Weights that others have published, as a folder that `hub.save` wrote.

Entries whose weights are elsewhere and of another form name their address (timm's ``origin_url``); `convert` turns what
was downloaded from there, or a folder of the library transformers, into safetensors with a config and a model card.
Of a pickle only tensors are read (PyTorch's ``weights_only``), and parameters that are left over are an error.

    folder = convert(Path("nat_tiny.pth"), "rat_nat_tiny", Path("rat_nat_tiny.in1k"))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
"""

import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData

from . import hub
from .checkpoints import WEIGHTS
from .families import FAMILIES

_FILES = (WEIGHTS, "pytorch_model.bin")


def convert(source: Path, like: str, folder: Path) -> Path:
    """Converts published weights.

    What the variant has and the weights do not is drawn from a fixed seed, so that one file always gives the same.

    Args:
        source: A file of safetensors, a pickle, or a folder of transformers with one of these.
        like: Name of a variant whose registered entry tells where its weights are published.
        folder: Where `hub.save` writes.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no such variant, the file holds more than tensors, or parameters are missing or left
            over.
        FileNotFoundError: If there is no such file.
    """
    known = convertible()
    if like not in known:
        raise ValueError(f"like must be one of {known}, got {like!r}")
    overlay = {"state_dict": read_weights(source)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = timm.create_model(like, pretrained=True, pretrained_cfg_overlay=overlay)
        model.pretrained_cfg.pop("state_dict")
        entry: Any = timm.get_pretrained_cfg(like)
        origin = f"Converted from {source.name}; its authors publish it at {entry.origin_url}."
        description = "\n\n".join([f"{entry.description} {origin}", *(entry.notes or ())])
        return hub.save(model, folder, description=description, card_data=ModelCardData(license=entry.license))


def convertible() -> list[str]:
    """Returns the variants whose weights are published elsewhere."""
    names = [name for family in FAMILIES.values() for name in family.variants]
    entries = {name: timm.get_pretrained_cfg(name) for name in names}
    return [name for name, entry in entries.items() if entry and entry.origin_url and not entry.has_weights]


def read_weights(source: Path) -> dict[str, Any]:
    """Reads a file of safetensors, a pickle of tensors, or a folder of transformers with one of these.

    Raises:
        ValueError: If the file holds more than tensors.
        FileNotFoundError: If there is no such file.
    """
    if source.is_dir():
        found = [source / name for name in _FILES if (source / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{source} has none of {_FILES}")
        source = found[0]
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if source.suffix == ".safetensors":
        return safetensors.torch.load_file(source)
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{source} must be a pickle of tensors alone: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict):
        raise ValueError(f"{source} must hold a dict of tensors, got {type(weights).__name__}")
    return weights
