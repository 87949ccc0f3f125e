"""Weights in folders and on the Hugging Face Hub: saved whole, and loaded only if their every byte is what was saved.

A saved folder holds ``model.safetensors``, a ``config.json`` that timm and transformers read, and a model card. The
config has one key more than timm's, "rat_timm", with this package's version and the SHA-256 of the weights' file, whose
metadata hold a SHA-256 of the config. `checkpoints` compares both whenever a model of this package loads from
``hf-hub:``, ``local-dir:`` or an entry's ``hf_hub_id``.

    hub.save(model, "digits", spacing_range=(0.5, 2.0))  # pixel sizes in training and validation: others warn
    again = timm.create_model("local-dir:digits", pretrained=True)

    hub.push(model, "me/digits")  # private=True, token=..., label_names=[...], description="..."
    again = timm.create_model("hf-hub:me/digits", pretrained=True)  # or hf-hub:me/digits@revision
    overlay = {"hf_hub_id": "me/digits"}
    finer = timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)

Damaged files are errors that say which file to delete. What timm or transformers saved has no digest and loads with a
warning. A config that was edited by hand is refused: give keywords to ``create_model`` and save again. Only safetensors
are opened, never pickles. ``checkpoint_path=`` is timm's: it neither checks nor converts.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import safe_open
from timm.models import PretrainedCfg
from timm.models._hub import download_from_hf, load_cfg_from_json, save_config_for_hf
from timm.models._input import get_model_args
from torch import nn

from ..geometry.ranges import RangeLike, SpacingRange, describe_range, range_of_json, read_range
from .checkpoints import CONFIG, KEY, METADATA, WEIGHTS, Checkpoint, Place, read, replacing, write
from .state_dict import different_shapes

README = "README.md"


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    card_data: ModelCardData | None = None,
    description: str = "",
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    spacing_range: RangeLike = None,
    model_name: str | None = None,
) -> Path:
    """Saves a model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` makes it again.

    Args:
        model: From ``timm.create_model``, of this package.
        folder: Made if there is none. Weights and config in it are replaced, a README.md stays.
        card_data: Licence, datasets, results and so on for the model card's head; the licence is otherwise that of
            ``model.pretrained_cfg``.
        description: What the model card says of the model: data, recipe, results.
        label_names: Names of the classes.
        data_config: Preprocessing, where it is not that of ``model.pretrained_cfg``: any of timm's ``mean``, ``std``,
            ``input_size``, ``interpolation``, ``crop_pct``.
        spacing_range: Smallest and largest pixel size that the model was trained and validated at: a pair for all axes,
            or one per axis, in array-axis order. The loaded model warns of others (`rat_timm.geometry.ranges`).
            Default: ``model.spacing_range``.
        model_name: What the model card hands to ``create_model``. Default: "local-dir:FOLDER".

    Returns:
        The folder.

    Raises:
        ValueError: If the model is not one of this package's, or wrapped, or an argument does not fit it.
    """
    _check_model(model)
    _check_labels(label_names, model)
    known = _known_range(spacing_range, model)
    folder = Path(folder)
    with replacing(folder) as new:
        config = _describe(model, new / CONFIG, label_names, data_config, known)
        write(model, config, new)
        if not (folder / README).exists():
            _card(config, model_name or f"local-dir:{folder}", card_data, description).save(new / README)
    return folder


def _check_model(model: Any) -> None:
    if not hasattr(model, "model_args") or not hasattr(model, "pretrained_cfg") or hasattr(model, "_orig_mod"):
        raise ValueError(
            "model must be what timm.create_model returned for a model of rat_timm (not features_only, "
            f"DistributedDataParallel or compiled), got {type(model).__name__}"
        )
    args = get_model_args(model, _model_args(model))
    again = timm.create_model(model.pretrained_cfg["architecture"], device="meta", **args)
    changed = different_shapes(model, again)
    if changed:
        raise ValueError(f"model must be whole: what its keywords make differs from it in {changed} (is it pruned?)")


def _check_labels(label_names: Sequence[str] | None, model: Any) -> None:
    if label_names is None:
        return
    strings = isinstance(label_names, (list, tuple)) and all(isinstance(name, str) for name in label_names)
    if not strings or len(label_names) != model.num_classes:
        raise ValueError(f"label_names must be {model.num_classes} strings, one per class, got {label_names!r}")


def _known_range(spacing_range: RangeLike, model: Any) -> SpacingRange | None:
    return model.spacing_range if spacing_range is None else read_range(spacing_range, model.spatial_dims)


def _model_args(model: Any) -> dict[str, Any]:
    """Returns the model's keywords as JSON gives them back; NumPy's scalars are numbers."""
    return json.loads(json.dumps(model.model_args(), default=lambda value: value.item()))


def push(
    model: nn.Module,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add model",
    card_data: ModelCardData | None = None,
    description: str = "",
    label_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    spacing_range: RangeLike = None,
) -> CommitInfo:
    """Saves a model to a Hub repository, from which ``hf-hub:REPO_ID`` makes it again.

    Args:
        model: See `save`.
        repo_id: "owner/name"; made if there is none.
        token: Default: what ``hf auth login`` stored.
        private: Whether a new repository is private; None for the owner's default.
        revision: Branch.
        create_pr: Whether to open a pull request instead of committing.
        commit_message: First line of the commit's message.
        card_data: See `save`. A README.md that is in the repository stays.
        description: See `save`.
        label_names: See `save`.
        data_config: See `save`.
        spacing_range: See `save`.

    Raises:
        ValueError: See `save`.
    """
    api = HfApi(token=token, library_name="rat_timm")
    with TemporaryDirectory() as folder:
        save(
            model,
            folder,
            card_data=card_data,
            description=description,
            label_names=label_names,
            data_config=data_config,
            spacing_range=spacing_range,
            model_name=f"hf-hub:{repo_id}",
        )
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if api.file_exists(repo_id, README, revision=revision):
            (Path(folder) / README).unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def find(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Checkpoint | None:
    """Finds the weights that ``cfg`` names in a folder or on the Hub, downloads them if need be, and checks them.

    Returns:
        The checkpoint, or None if ``cfg`` names another source (a URL, a state dict, a file that `save` did not
        write) or none.

    Raises:
        ValueError: If weights or config are not what was saved, or not safetensors.
        FileNotFoundError: If there are none. Hub errors pass as they are.
    """
    if cfg.source == "local-dir":
        return read(_folder(Path(str(cfg.file))))
    if cfg.file and not cfg.state_dict and _is_saved(Path(cfg.file)):
        return read(_folder(Path(cfg.file).parent))
    named_elsewhere = cfg.state_dict or cfg.file
    repo = cfg.hf_hub_id
    if not repo or (named_elsewhere and cfg.source != "hf-hub"):
        return None
    return read(Place(repo, lambda name: _download(repo, name, cache_dir)), cfg.hf_hub_filename or WEIGHTS)


def _folder(folder: Path) -> Place:
    return Place(str(folder), lambda name: folder / name if (folder / name).is_file() else None)


def _is_saved(file: Path) -> bool:
    if file.name != WEIGHTS or not file.is_file():
        return False
    config = file.with_name(CONFIG)
    if config.is_file() and KEY in load_cfg_from_json(config):
        return True
    with safe_open(file, "pt") as opened:
        return METADATA in (opened.metadata() or {})


def _download(repo: str, name: str, cache_dir: str | Path | None) -> Path | None:
    try:
        return Path(download_from_hf(repo, name, cache_dir=cache_dir))
    except RemoteEntryNotFoundError:
        return None  # the Hub says that there is no such file; that it could not say is another error


def _describe(
    model: Any,
    config_file: Path,
    label_names: Sequence[str] | None,
    data_config: Mapping[str, Any] | None,
    spacing_range: SpacingRange | None,
) -> dict[str, Any]:
    from .. import __version__  # at the end of the package's import

    model_config = {"label_names": list(label_names)} if label_names else {}
    data = dict(data_config or {})
    size = tuple(data.get("input_size", model.pretrained_cfg["input_size"]))[1:]
    if "input_size" in data:
        data["input_size"] = data["input_size"][:3]  # timm knows sizes of two axes
    args = {**_model_args(model), "spacing_range": range_of_json(spacing_range)}
    save_config_for_hf(model, str(config_file), model_config, model_args=args, data_config=data)
    config = load_cfg_from_json(config_file)
    # at the root only: transformers hands it over beside model_args
    config["model_args"].pop("num_classes", None)
    for name in ("tag", "description", "notes"):  # of the entry that training started from
        config["pretrained_cfg"].pop(name, None)
    axes = model.spatial_dims
    config["pretrained_cfg"]["input_size"] = [model.in_chans, *size[:1] * (axes - len(size)), *size[-axes:]]
    config["pretrained_cfg"]["first_conv"] = model.pretrained_cfg["first_conv"]
    if axes == 3:  # transformers' own takes images alone
        config["image_processor_type"] = "RatImageProcessor"
    config[KEY] = {"version": __version__}
    return config


_CARD = """\
---
{{ card_data }}
---

# {{ name.split("/")[-1] }}

{{ description or "A Resolution Aware Transformer." }}

## Model

- **Architecture:** `{{ architecture }}` of the package `rat_timm`, {{ size | length }}D, input channels: {{ channels }}
- **Classes:** {{ num_classes or "none, pooled features" }}
- **Reference spacing:** {{ model_args.spacing }}, the pixel size in array-axis order that an image has whose spacing is
  not given
- **Pixel sizes in training and validation:** {{ known_range }}
- **Preprocessing:** size {{ size | join(" x ") }}, mean {{ pretrained_cfg.mean }}, std {{ pretrained_cfg.std }},
  {{ pretrained_cfg.interpolation }} interpolation, crop {{ pretrained_cfg.crop_pct }}
- **Licence:** {{ license or "not stated" }}

## Use

```python
import timm
import torch

import rat_timm  # registers the model

model = timm.create_model("{{ name }}", pretrained=True).eval()
image = torch.randn(1, {{ channels }}, {{ size | join(", ") }})
output = model(image, spacing={{ model_args.spacing }})
```

"""


def _card(config: dict[str, Any], name: str, card_data: ModelCardData | None, description: str) -> ModelCard:
    pretrained = config["pretrained_cfg"]
    channels, *size = pretrained["input_size"]
    data = copy.deepcopy(card_data) or ModelCardData()
    data.license = data.license or pretrained.get("license")
    data.library_name = "timm"
    data.pipeline_tag = data.pipeline_tag or ("image-classification" if config["num_classes"] else None)
    data.tags = data.tags or ["timm", "rat_timm", *(["transformers"] if len(size) == 2 else [])]
    spacing_range = read_range(config["model_args"]["spacing_range"], len(size))
    known_range = describe_range(spacing_range) if spacing_range else "not stated"
    words = {"name": name, "description": description, "known_range": known_range}
    return ModelCard.from_template(data, template_str=_CARD, channels=channels, size=size, **words, **config)
