"""Weights: what is pushed is what is loaded, or an error says why not."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData

import rat_timm
from hub_server import Hub, Repo, environment, serving
from rat_timm import hub

MODELS = {
    "me/plain": ("test_rat", {"num_classes": 10}),
    "me/volume": ("test_rat_3d", {"num_classes": 3}),
    "me/special": (
        "test_rat",
        {"num_classes": 7, "spacing": [0.5, 0.25], "in_chans": 5, "stem_stride": 2, "reg_tokens": 2},
    ),
}
PRELUDE = """
import json, os, pathlib, sys, timm, torch
import rat_timm
from rat_timm import hub
folder = pathlib.Path(os.environ["FOLDER"])
models = json.loads(os.environ["MODELS"])
def attempt(name, **kwargs):
    try:
        timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"
"""


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def client(server, folder, code, **variables):
    """Runs code in a process of its own, whose cache is ``folder / "home"``; returns what it prints as JSON."""
    variables = environment(server, str(folder / "home"), FOLDER=str(folder), MODELS=json.dumps(MODELS), **variables)
    command = [sys.executable, "-c", PRELUDE + code]
    result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def put(server: Hub, name: str, files: dict[str, bytes]) -> None:
    """Makes a repository without a client."""
    server.repos[name] = Repo()
    server.repos[name].commit(files)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved test_rat."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    hub.save(timm.create_model("test_rat"), folder)
    return folder


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


PUSH = """
from safetensors.torch import save_file
shas = {}
for name, (variant, kwargs) in models.items():
    model = timm.create_model(variant, **kwargs).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    shas[name] = hub.push(model, name, private=name == "me/special").oid
    target = folder / name.replace("/", "_")
    hub.save(model, target)
    x = torch.randn(2, model.in_chans, *model.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        save_file({"x": x, "y": model(x, spacing=0.7)}, f"{target}.safetensors")
print(json.dumps(shas))
"""
PULL = """
from safetensors.torch import load_file
shas = json.loads(os.environ["SHAS"])
found = []
for name, (variant, kwargs) in models.items():
    target = folder / name.replace("/", "_")
    state, io = load_file(target / "model.safetensors"), load_file(f"{target}.safetensors")
    overlay = {"pretrained_cfg_overlay": {"hf_hub_id": name}}
    ways = {f"hf-hub:{name}": {}, f"hf-hub:{name}@{shas[name]}": {}, f"local-dir:{target}": {}, variant: overlay}
    for way, more in ways.items():
        for given in ({}, kwargs):
            model = timm.create_model(way, pretrained=True, **more, **given).eval()
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), way
            with torch.no_grad():
                assert torch.equal(model(io["x"], spacing=0.7), io["y"]), way
            assert list(model.pretrained_cfg["input_size"]) == list(model.default_cfg["input_size"])
            assert model.pretrained_cfg["input_size"][0] == model.in_chans
            found.append(way)
print(json.dumps(found))
"""


def test_what_is_pushed_is_what_is_loaded(server, tmp_path):
    shas = client(server, tmp_path, PUSH, HF_TOKEN=server.token)
    assert {name: server.repos[name].commits[-1][0] for name in MODELS} == shas
    assert all(
        sorted(server.repos[name].commits[-1][1]) == ["README.md", "config.json", "model.safetensors"]
        for name in MODELS
    )
    home = {"HF_TOKEN": server.token, "SHAS": json.dumps(shas), "HF_HOME": str(tmp_path / "empty")}
    ways = client(server, tmp_path, PULL, **home)
    assert len(ways) == 4 * 2 * len(MODELS)
    asked = len(server.requests)
    assert client(server, tmp_path, PULL, HF_HUB_OFFLINE="1", **home) == ways
    assert len(server.requests) == asked


def test_private_repositories_need_a_token(tmp_path):
    with serving() as other:
        other.repos["me/hidden"] = Repo(private=True)
        error = client(other, tmp_path, 'print(json.dumps(attempt("hf-hub:me/hidden")))')
        assert "RepositoryNotFoundError" in error


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d"])
def test_what_is_written(tmp_path, name):
    model = timm.create_model(name, num_classes=2, spacing=0.5, drop_path_rate=0.1)
    data = ModelCardData(license="cc-by-4.0", datasets="mine")
    names = ["cell", "debris"]
    folder = hub.save(
        model, tmp_path, card_data=data, description="Cells.", label_names=names, model_name="hf-hub:me/cells"
    )
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == names
    assert config["model_args"]["spacing"] == 0.5
    assert set(rat_timm.RatConfig.__dataclass_fields__) < set(config["model_args"])
    assert "num_classes" not in config["model_args"]
    assert tuple(config["pretrained_cfg"]["input_size"]) == model.pretrained_cfg["input_size"]
    assert config["pretrained_cfg"]["first_conv"] == "stem.convs.0"
    assert "digits" not in json.dumps(config)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == "mine"
    for expected in ("Cells.", "Reference spacing:** 0.5", 'create_model("hf-hub:me/cells"', "mean [", "# cells"):
        assert expected in card.text
    (folder / "README.md").write_text("mine")
    hub.save(model, folder)
    assert (folder / "README.md").read_text() == "mine"


def test_preprocessing_can_be_stated(tmp_path):
    model = timm.create_model("test_rat_3d")
    stated = {"mean": [0.5], "std": [0.1], "input_size": (1, 8, 64, 64), "crop_pct": 0.8}
    hub.save(model, tmp_path, data_config=stated)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert {key: loaded.pretrained_cfg[key] for key in stated} == stated


def test_volumes_from_images_are_described_as_volumes(tmp_path):
    hub.save(timm.create_model("test_rat", spatial_dims=3), tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.pretrained_cfg["input_size"] == (3, 32, 32, 32)


def test_transformers_opens_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = timm.create_model("test_rat", num_classes=7, spacing=0.5, stem_stride=2).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    hub.save(model, tmp_path)
    x = torch.randn(2, 3, 40, 50)
    with torch.no_grad():
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(theirs(x).logits, model(x))
        torch.testing.assert_close(theirs(x, spacing=0.9).logits, model(x, spacing=0.9))
        features = transformers.AutoModel.from_pretrained(tmp_path).eval()(x)
    torch.testing.assert_close(features.last_hidden_state, model.forward_features(x))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.data_config["input_size"] == (3, 32, 32)


def test_only_whole_models_are_saved(tmp_path):
    backbone = timm.create_model("test_rat", features_only=True)
    for model in (torch.nn.DataParallel(timm.create_model("test_rat")), timm.create_model("test_vit"), backbone):
        with pytest.raises(ValueError, match="model must be what"):
            hub.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    hub.save(timm.create_model("test_rat", num_classes=2), tmp_path)
    before = files_of(tmp_path)
    pruned = timm.create_model("test_rat")
    pruned.prune_intermediate_layers([1])
    with pytest.raises(ValueError, match="is it pruned"):
        hub.save(pruned, tmp_path)
    with pytest.raises(ValueError, match="compiled"):
        hub.save(torch.compile(timm.create_model("test_rat")), tmp_path)
    with pytest.raises(ValueError, match="label_names must be 10 strings"):
        hub.save(timm.create_model("test_rat"), tmp_path, label_names=["cell"])
    with pytest.raises(ValueError, match="channels"):
        hub.save(timm.create_model("test_rat"), tmp_path, data_config={"input_size": (1, 32, 32)})
    assert files_of(tmp_path) == before


def test_numbers_of_numpy_are_saved(tmp_path):
    model = timm.create_model("test_rat", spacing=np.float32(0.5), stem_stride=np.int64(2), num_classes=np.int64(3))
    hub.save(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.cfg.reference == (0.5, 0.5)
    assert loaded.cfg.stem_strides == (2, 2)


def test_saved_keywords_come_back_however_a_model_is_named(tmp_path):
    """By folder, by the loaded model's cfg, by its file, and once more saved."""
    model = timm.create_model("test_rat", iters=1, spacing=0.5, num_classes=4).eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    hub.save(model, tmp_path / "a", label_names=list("abcd"))
    first = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True).eval()
    overlay = {"file": str(tmp_path / "a" / "model.safetensors")}
    models = [
        first,
        timm.create_model("test_rat", pretrained=True, pretrained_cfg=first.pretrained_cfg).eval(),
        timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay).eval(),
    ]
    hub.save(models[2], tmp_path / "b")
    models.append(timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval())
    state = {"state_dict": model.state_dict()}
    models.append(
        timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, pretrained_cfg_overlay=state).eval()
    )
    x = torch.randn(2, 3, 40, 30)
    with torch.no_grad():
        for loaded in models:
            assert torch.equal(loaded(x, spacing=0.7), model(x, spacing=0.7))
    assert models[2].pretrained_cfg["label_names"] == list("abcd")
    assert "description" not in models[2].pretrained_cfg
    data = bytearray((tmp_path / "a" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "a" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay)


def test_an_invalid_push_makes_no_repository(monkeypatch):
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("made a repository"))
    with pytest.raises(ValueError, match="model must be"):
        hub.push(torch.nn.Linear(2, 2), "me/invalid")


def places_of_tensors(file):
    """The position of a byte in the middle of each tensor."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    return [8 + length + (start + end) // 2 for start, end in spans]


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_a_flipped_byte_in_a_folder_is_refused(saved, tmp_path):
    files = files_of(saved)
    places = places_of_tensors(saved / "model.safetensors")
    assert len(places) == len(timm.create_model("test_rat").state_dict())
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for place in places:
        (tmp_path / "model.safetensors").write_bytes(flip(files["model.safetensors"], place))
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*Delete .* and load again"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


FLIPPED = """
first = [attempt(f"hf-hub:me/flipped{i}") for i in range(int(os.environ["COUNT"]))]
cached = [attempt(f"hf-hub:me/flipped{i}") for i in range(int(os.environ["COUNT"]))]
found = [attempt("hf-hub:me/good")]
blob = max((folder / "home/hub/models--me--good/blobs").iterdir(), key=lambda file: file.stat().st_size)
good = blob.read_bytes()
for place in json.loads(os.environ["PLACES"]):
    blob.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    found.append(attempt("hf-hub:me/good"))
blob.unlink()
found.append(attempt("hf-hub:me/good"))
print(json.dumps([first, cached, found]))
"""


def test_a_flipped_byte_on_the_hub_or_in_the_cache_is_refused(server, saved, tmp_path):
    files, places = files_of(saved), places_of_tensors(saved / "model.safetensors")
    put(server, "me/good", files)
    for i, place in enumerate(places):
        put(server, f"me/flipped{i}", files)
        server.tampered[f"me/flipped{i}", "model.safetensors"] = flip(files["model.safetensors"], place)
    first, cached, found = client(server, tmp_path, FLIPPED, COUNT=str(len(places)), PLACES=json.dumps(places))
    assert len(first) == len(cached) == len(found) - 2 == len(places)
    assert found[0] == found[-1] == "loaded"
    for error in (*first, *cached, *found[1:-1]):
        assert error.startswith("ValueError")
        assert "damaged" in error
        assert "blobs" in error


class Bomb:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_what_cannot_be_had_is_an_error_and_no_pickle_is_opened(server, saved, tmp_path):
    files, trace = files_of(saved), tmp_path / "trace"
    pickled = {"pytorch_model.bin": pickle.dumps(Bomb(trace))}
    weights, config = files["model.safetensors"], {"config.json": files["config.json"]}
    for name in ("gated", "dropped", "truncated", "header", "revision"):
        put(server, f"me/{name}", files | pickled)
    put(server, "me/missing", config | pickled)
    server.faults["me/gated", "model.safetensors"] = "gated"
    server.faults["me/dropped", "model.safetensors"] = "drop"
    server.tampered["me/truncated", "model.safetensors"] = weights[:-1000]
    server.tampered["me/header", "model.safetensors"] = flip(weights, 20)
    undescribed = json.loads(files["config.json"])
    del undescribed["rat_timm"]
    put(server, "me/undescribed", files | {"config.json": json.dumps(undescribed).encode()})
    server.tampered["me/undescribed", "model.safetensors"] = flip(weights, len(weights) - 100)
    overlay = {"hf_hub_id": "me/revision", "hf_hub_filename": "pytorch_model.bin"}
    code = f"""
names = ["gated", "dropped", "truncated", "header", "missing", "undescribed"]
errors = {{name: attempt(f"hf-hub:me/{{name}}") for name in names}}
errors["revision"] = attempt("hf-hub:me/revision@{"a" * 40}")
errors["nowhere"] = attempt("hf-hub:me/nowhere")
errors["pickle"] = attempt("test_rat", pretrained_cfg_overlay={overlay!r})
errors["other"] = attempt("test_rat_3d", pretrained_cfg_overlay={{"hf_hub_id": "me/revision"}})
print(json.dumps(errors))
"""
    errors = client(server, tmp_path, code)
    expected = {
        "gated": "GatedRepoError",
        "dropped": "Error",
        "truncated": "ValueError: .*damaged|Consistency check failed",
        "header": "ValueError: .*damaged",
        "missing": "FileNotFoundError: me/missing has no model.safetensors; pickled",
        "undescribed": "ValueError: .*damaged",
        "revision": "RevisionNotFoundError",
        "nowhere": "RepositoryNotFoundError",
        "pickle": "ValueError: hf_hub_filename must name a safetensors file",
        "other": "ValueError: me/revision holds weights of test_rat, not of test_rat_3d",
    }
    assert errors.keys() == expected.keys()
    for name, pattern in expected.items():
        assert errors[name] != "loaded"
        assert re.search(pattern, errors[name]), name
    assert not trace.exists()


def test_a_server_error_is_an_error_and_no_pickle_is_opened(server, saved, tmp_path):
    trace = tmp_path / "trace"
    put(server, "me/busy", files_of(saved) | {"pytorch_model.bin": pickle.dumps(Bomb(trace))})
    server.faults["me/busy", "model.safetensors"] = "503"
    impatient = "import time; time.sleep = lambda seconds: None; "  # it is asked for again and again
    error = client(server, tmp_path, impatient + 'print(json.dumps(attempt("hf-hub:me/busy")))')
    assert "Error" in error
    assert not trace.exists()


def test_folders_without_weights_or_with_pickles_are_refused(saved, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert not trace.exists()


def test_folders_of_timm_load_too(tmp_path):
    """What timm's own push writes has no digest; everything else holds."""
    model = timm.create_model("test_rat", num_classes=4)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_one_hub_id_in_an_entry_is_enough(tmp_path, monkeypatch):
    """What publishing the weights of a registered name takes."""
    model = timm.create_model("rat_tiny_3d", num_classes=3, in_chans=2, spacing=(2.0, 1.0, 1.0))
    hub.save(model, tmp_path)
    entry = timm.models.get_pretrained_cfg("rat_tiny_3d")
    published = dataclasses.replace(entry, hf_hub_id="me/published")
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, "rat_tiny_3d", published)
    monkeypatch.setattr(hub, "_download", lambda repo, name, cache_dir: tmp_path / name)
    loaded = timm.create_model("rat_tiny_3d", pretrained=True)
    assert json.dumps(loaded.model_args()) == json.dumps(model.model_args())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.pretrained_cfg["hf_hub_id"] == "me/published"
