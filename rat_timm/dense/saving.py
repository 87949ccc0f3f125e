"""Segmenters in folders: safetensors and a config.json, each with a digest of the other, as `rat_timm.hub` has them."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import load_cfg_from_json
from timm.models._input import get_model_args
from torch import nn

from ..timm_api.build import keywords_of
from ..timm_api.checkpoints import CONFIG, KEY, Checkpoint, Place, read, replacing, write
from ..timm_api.families import FAMILIES, upgrade
from ..timm_api.state_dict import different_shapes

OPTIONS = "segmenter"
"""The key of a config.json under which a segmenter's own options stand; what makes its backbone stands where timm has
it, under "architecture" and "model_args"."""
OPTION_NAMES = ("num_classes", "decoder", "width", "detail", "class_names", "context")


def save_segmenter(model: nn.Module, folder: str | Path) -> Path:
    """Saves a segmenter; see `rat_timm.dense.Segmenter.save`."""
    from .. import __version__  # at the end of the package's import

    config = {**_describe(model), KEY: {"version": __version__}}
    folder = Path(folder)
    with replacing(folder) as new:
        write(model, config, new)
    return folder


def load_segmenter(folder: str | Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Reads and checks what `save_segmenter` wrote.

    Returns:
        The checkpoint, with the backbone's name and keywords, and the segmenter's own keywords.

    Raises:
        ValueError: If weights or config are damaged, or no segmenter's.
        FileNotFoundError: If there are none.
    """
    folder = Path(folder)
    found = read(Place(str(folder), lambda name: folder / name if (folder / name).is_file() else None))
    options = load_cfg_from_json(folder / CONFIG).get(OPTIONS) if found.architecture else None
    if not isinstance(options, dict):
        raise ValueError(f"{folder} must hold what Segmenter.save wrote: its {CONFIG} has no {OPTIONS!r}")
    if not any(found.architecture in family.variants for family in FAMILIES.values()):
        raise ValueError(f"architecture in {folder}/{CONFIG} must be a name of rat_timm, got {found.architecture!r}")
    # keywords that tell where weights are, or anything but the model, are not taken from a file
    backbone: Any = timm.create_model(str(found.architecture), device="meta", num_classes=0)
    unknown = sorted(found.model_args.keys() - keywords_of(type(backbone), getattr(backbone, "cfg", None)))
    if unknown or not options.keys() <= set(OPTION_NAMES):
        raise ValueError(
            f"{CONFIG} in {folder} must hold keywords of {type(backbone).__name__} and of Segmenter {OPTION_NAMES}, "
            f"got {unknown} and {sorted(options)}"
        )
    if options.get("detail") is True:  # before there were two kinds
        options = options | {"detail": "pixels"}
    return found._replace(model_args=upgrade(str(found.architecture), found.model_args)), options


def _describe(model: Any) -> dict[str, Any]:
    backbone = model.backbone
    if not hasattr(backbone, "pretrained_cfg"):
        raise ValueError(f"backbone must be from timm.create_model to be saved, got a {type(backbone).__name__}")
    architecture, args = backbone.pretrained_cfg["architecture"], _keywords(backbone)
    values = (
        model.num_classes,
        model.decoder_name,
        model.width,
        False if model.detail is None else model.detail.sees,
        model.class_names,
        model.context,
    )
    options = dict(zip(OPTION_NAMES, values, strict=True))
    with torch.device("meta"):
        again = type(model)(architecture, **options, **args)
    changed = different_shapes(model, again)
    if changed:
        raise ValueError(f"model must be what its keywords make to be saved, but differs from it in {changed}")
    return {"architecture": architecture, "pretrained_cfg": {}, "model_args": args, OPTIONS: options}


def _keywords(backbone: Any) -> dict[str, Any]:
    """Returns the keywords that make a backbone again, as JSON gives them back."""
    args = get_model_args(backbone, backbone.model_args())
    args.pop("num_classes", None)
    return json.loads(json.dumps(args, default=lambda value: value.item()))
