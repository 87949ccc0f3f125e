"""Saved weights, read once: bytes are compared with the digests stated of them, and only then made tensors.

`rat_timm.hub.save` states two: ``config.json`` holds the SHA-256 of the weights' file, and the metadata of that file
holds `config_digest`. So neither can change without the other telling. A file without that metadata is of an older
version of this package, whose config was not covered, or another library's, for whose weights only the Hub vouches.
Digests find damage and mix-ups. They are no signatures: whoever writes both files can write anything.
"""

import contextlib
import copy
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import safetensors.torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from timm.models._hub import _parse_model_cfg, load_cfg_from_json
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
KEY = "rat_timm"
"""What `save` adds to a config: {"version", "sha256"}."""
METADATA = "rat_timm.config_sha256"
"""Under which the metadata of the weights' file holds `config_digest`."""


class Checkpoint(NamedTuple):
    """Weights that are what is stated of them, and what their config.json says.

    Attributes:
        where: The folder or repository.
        state_dict: The tensors.
        architecture: Name of the model; None if nothing tells.
        pretrained_cfg: Of timm's `PretrainedCfg`, as timm reads it.
        model_args: The model's keywords.
    """

    where: str
    state_dict: dict[str, Tensor]
    architecture: str | None
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]


class Place(NamedTuple):
    """A folder or repository.

    Attributes:
        where: Its name.
        get: What gives the path of one of its files, None if there is no such file.
    """

    where: str
    get: Callable[[str], Path | None]


class _File(NamedTuple):
    """The content of a safetensors file.

    Attributes:
        tensors: By name.
        config_digest: What its metadata states of the config; None if nothing.
        vouched: Whether its digest was stated anywhere.
    """

    tensors: dict[str, Tensor]
    config_digest: str | None
    vouched: bool


def config_digest(config: dict[str, Any]) -> str:
    """Returns the SHA-256 of a config but for the weights' own, whatever the order of its keys."""
    statement = config.get(KEY)
    if isinstance(statement, dict):
        config = {**config, KEY: {name: value for name, value in statement.items() if name != "sha256"}}
    return sha256(json.dumps(config, sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes in hexadecimal digits, as the Hub states it of files."""
    return sha_fileobj(io.BytesIO(data)).hex()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields a new folder, whose files come to ``folder`` once all are written: if that fails, it stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as temporary:
        new = Path(temporary)
        yield new
        for file in new.iterdir():
            file.replace(folder / file.name)


def write(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Writes a model's weights and its config, each with the digest of the other; the config gets that of the weights.

    Args:
        model: Whose state dict is written.
        config: With a dict under `KEY`.
        folder: Where to.
    """
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    metadata = {"format": "pt", METADATA: config_digest(config)}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=metadata)
    with (folder / WEIGHTS).open("rb") as stream:
        config[KEY]["sha256"] = sha_fileobj(stream).hex()
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(place: Place, name: str = WEIGHTS) -> Checkpoint:
    """Reads and checks the weights in a folder or repository: a file, or the shards that transformers writes.

    Raises:
        ValueError: If weights or config are not what was saved, or not safetensors.
        FileNotFoundError: If there are none.
    """
    if not name.endswith(".safetensors"):
        raise ValueError(f"hf_hub_filename must name a safetensors file, got {name!r}: pickles are not opened")
    config_file = place.get(CONFIG)
    config = _read_object(config_file) if config_file else {}
    stated = _stated(config, place.where)
    if stated and name != WEIGHTS:
        raise ValueError(f"hf_hub_filename must be {WEIGHTS!r}, whose digest {place.where} states, got {name!r}")
    files = _read_all(place, name, stated)
    _compare_config(config, files, place.where)
    if not all(file.vouched for file in files.values()):
        warnings.warn(
            f"nothing vouches for the weights in {place.where}: no digest is stated of them (transformers and timm "
            "write none; rat_timm.hub.save does)",
            stacklevel=3,
        )
    state_dict = {name: value for file in files.values() for name, value in file.tensors.items()}
    if "architecture" not in config:
        return Checkpoint(place.where, state_dict, None, {}, {})
    pretrained_cfg, architecture, model_args = _parse_model_cfg(copy.deepcopy(config), {})
    return Checkpoint(place.where, state_dict, architecture, pretrained_cfg, model_args)


def _read_object(file: Path) -> dict[str, Any]:
    content = load_cfg_from_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it must hold a JSON object, got {content!r}")
    return content


def _compare_config(config: dict[str, Any], files: dict[str, _File], where: str) -> None:
    for name, file in files.items():
        if file.config_digest not in (None, config_digest(config)):
            raise ValueError(
                f"{where} is damaged: its {CONFIG} is not the one that was saved with {name}. Load or copy both again. "
                "What is to be changed on purpose is given to timm.create_model, and the model saved with "
                "rat_timm.hub.save."
            )


def _stated(config: dict[str, Any], where: str) -> str | None:
    """Returns the digest that a config states of the weights, None if it is not one of this package's."""
    # transformers keeps what it finds in a config that it writes anew, beside weights that it has trained
    if KEY not in config or config.get("model_type") == "timm_wrapper":
        return None
    statement = config[KEY]
    digest = statement.get("sha256") if isinstance(statement, dict) else None
    if not isinstance(digest, str) or not digest or "architecture" not in config:
        raise ValueError(f"{where} is damaged: {CONFIG} states no architecture or, in {KEY!r}, no sha256: {statement}")
    return digest


def _read_all(place: Place, name: str, stated: str | None) -> dict[str, _File]:
    path = place.get(name)
    if path is not None:
        return {name: _read(path, place.where, stated)}
    index = place.get(INDEX) if name == WEIGHTS and not stated else None
    if index is None:
        raise FileNotFoundError(f"{place.where} has no {name}; pickled weights are not opened, save with rat_timm.hub")
    return _read_shards(place, _shards(_read_object(index), place.where))


def _shards(index: dict[str, Any], where: str) -> dict[str, set[str]]:
    """Returns the tensors' names per file of transformers' index."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{where} is damaged: {INDEX} must have a weight_map, got {weight_map!r}")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{INDEX} must name safetensors files beside it in {where}, got {name!r}")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _read_shards(place: Place, shards: dict[str, set[str]]) -> dict[str, _File]:
    paths = {name: place.get(name) for name in shards}
    files = {}
    for name, path in paths.items():
        if path is None:
            raise FileNotFoundError(f"{place.where} has no {name}, which {INDEX} names")
        files[name] = _read(path, place.where, None)
        if files[name].tensors.keys() != shards[name]:
            different = sorted(files[name].tensors.keys() ^ shards[name])
            raise ValueError(f"{place.where} is damaged: {name} and {INDEX} differ in {different}")
    return files


def _read(path: Path, where: str, stated: str | None) -> _File:
    path = path.resolve()
    data = path.read_bytes()  # once: what is hashed is what is loaded, whatever becomes of the file
    found = sha256(data)
    # the Hub's cache names large files by the SHA-256 that their repository states
    of_hub = path.name if re.fullmatch("[0-9a-f]{64}", path.name) else None
    for expected in (stated, of_hub):
        if expected not in (None, found):
            raise ValueError(
                f"{path} is damaged: its SHA-256 is {found}, but {where} states {expected}. Delete {path} and load "
                "again (or copy the folder again). Weights that were changed on purpose have to be saved with "
                "rat_timm.hub.save."
            )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not tensors:
        raise ValueError(f"{path} must hold tensors, got none")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # safetensors tells metadata of files only
    metadata = header.get("__metadata__") or {}
    return _File(tensors, metadata.get(METADATA), vouched=bool(stated or of_hub))
