"""Weights: what is pushed is what is loaded, or an error says why not."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import pickle
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rat_timm
from hub_client import run
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
    return json.loads(run(PRELUDE + code, variables).splitlines()[-1])


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


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def load(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


def same(model, weights):
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], value) for name, value in weights.items())


def write(folder, config, weights, kind):
    """Writes a folder as `hub.save` does now or did before its config was covered, or as transformers or timm do.

    Digests go with what is written: nothing is damaged.
    """
    folder.mkdir(exist_ok=True)
    config = {name: value for name, value in copy.deepcopy(config).items() if name != "rat_timm"}
    metadata = {"format": "pt"}
    if kind == "now":
        config["rat_timm"] = {"version": "0.1.0"}
        metadata["rat_timm.config_sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    save_file(weights, folder / "model.safetensors", metadata=metadata)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if kind in ("now", "before"):
        config["rat_timm"] = {"version": "0.1.0", "sha256": digest}
    if kind == "transformers":  # which keeps the digest of the weights that it started from
        config |= {"rat_timm": {"version": "0.1.0", "sha256": "0" * 64}, "model_type": "timm_wrapper"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KINDS = ("now", "before", "transformers", "timm")


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


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d", "apvit_tiny_patch16_224", "rat_eva02_tiny_patch14_224"])
def test_the_range_of_pixel_sizes_is_saved_and_known_again(tmp_path, name):
    model = timm.create_model(name, num_classes=2, **({} if name.startswith("test") else {"depth": 1}))
    axes = model.spatial_dims
    pairs = [[1.0, 4.0], [0.25, 0.5], [0.25, 0.75]][-axes:]
    hub.save(model, tmp_path / "a", spacing_range=pairs)
    assert model.spacing_range is None
    config = config_of(tmp_path / "a")
    assert config["model_args"]["spacing_range"] == pairs
    words = "1 to 4 along z, " * (axes == 3) + "0.25 to 0.5 along y, 0.25 to 0.75 along x"
    assert f"**Pixel sizes in training and validation:** {words}\n" in (tmp_path / "a" / "README.md").read_text()
    first = load(tmp_path / "a")
    assert first.spacing_range == tuple(map(tuple, pairs))
    hub.save(first, tmp_path / "b")  # a model's own range, unless another is said
    assert load(tmp_path / "b").spacing_range == first.spacing_range
    hub.save(first, tmp_path / "c", spacing_range=(1.0, 1.0))
    assert config_of(tmp_path / "c")["model_args"]["spacing_range"] == [1.0, 1.0]
    assert load(tmp_path / "c").spacing_range == ((1.0, 1.0),) * axes
    assert load(tmp_path / "a", spacing_range=(2, 3)).spacing_range == ((2.0, 3.0),) * axes
    first.spacing_range = None
    hub.save(first, tmp_path / "d")
    assert load(tmp_path / "d").spacing_range is None
    assert "training and validation:** not stated" in (tmp_path / "d" / "README.md").read_text()
    for wrong in ((2, 1), (0, 1), [[1, 2]] * (axes + 1), 1.0):
        with pytest.raises(ValueError, match="spacing_range must be two positive numbers"):
            hub.save(model, tmp_path / "e", spacing_range=wrong)
    assert not (tmp_path / "e").exists()


@pytest.mark.filterwarnings("ignore:nothing vouches")
@pytest.mark.parametrize("kind", KINDS)
def test_a_range_that_cannot_be_is_refused_and_a_changed_one_is_damage(saved, tmp_path, kind):
    weights, config = load_file(saved / "model.safetensors"), config_of(saved)
    for wrong in ([2.0, 1.0], [0.0, 1.0], [[1.0, 2.0]] * 3, "wide", {"low": 1}):
        config["model_args"]["spacing_range"] = wrong
        with pytest.raises(ValueError, match="spacing_range must be two positive numbers"):
            load(write(tmp_path / "wrong", config, weights, kind))
    config["model_args"]["spacing_range"] = [0.5, 2.0]
    folder = write(tmp_path / "right", config, weights, kind)
    assert load(folder).spacing_range == ((0.5, 2.0), (0.5, 2.0))
    if kind == "now":
        changed = config_of(folder)
        changed["model_args"]["spacing_range"] = [0.05, 20.0]
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"is damaged: its config\.json is not the one that was saved"):
            load(folder)


def test_folders_without_a_range_load(saved, tmp_path):
    weights, config = load_file(saved / "model.safetensors"), config_of(saved)
    del config["model_args"]["spacing_range"]
    assert load(write(tmp_path / "old", config, weights, "now")).spacing_range is None


def test_volumes_of_images_keep_a_range_that_axes_share(tmp_path):
    hub.save(timm.create_model("test_rat"), tmp_path, spacing_range=(0.5, 2.0))
    assert load(tmp_path, spatial_dims=3).spacing_range == ((0.5, 2.0),) * 3


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


EVENTS = {"open": 0, "socket.connect": 1, "socket.getaddrinfo": 0, "urllib.Request": 0}
RECORDS = []


def audit(event, args):
    if event in EVENTS and RECORDS:
        RECORDS[-1].append(args[EVENTS[event]])


sys.addaudithook(audit)


@contextlib.contextmanager
def recorded():
    """Gives the files that Python opens and the addresses that it asks meanwhile."""
    RECORDS.append([])
    try:
        yield RECORDS[-1]
    finally:
        RECORDS.pop()


def attempt(folder, weights, **kwargs):
    """Returns what is wrong with a folder, or "loaded" if its weights are those; nothing outside it may be opened."""
    with recorded() as opened:
        try:
            result = "loaded" if same(load(folder, **kwargs), weights) else "other weights"
        except (ValueError, TypeError, KeyError, FileNotFoundError, RuntimeError) as error:
            result = f"{type(error).__name__}: {error}"
    assert opened
    outside = [path for path in opened if not Path(path).resolve().is_relative_to(folder.resolve())]
    assert not outside, result
    return result


def dicts_of(config):
    """The dicts in a config and what they are called."""
    return {name: config[name] if name else config for name in ("", "model_args", "pretrained_cfg", "rat_timm")}


def changed(value):
    """Returns something near to a value."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("a" if value[-1:] != "a" else "b")
    if isinstance(value, list):
        return [changed(value[0]), *value[1:]] if value else [1]
    return {}


def test_every_key_of_a_config_is_covered(saved, tmp_path):
    """Changed, removed, added and written otherwise: loading is refused, or right."""
    weights, files, whole = load_file(saved / "model.safetensors"), files_of(saved), config_of(saved)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert attempt(tmp_path, weights) == "loaded"
    tried = 0
    for name, entries in dicts_of(whole).items():
        for key in [*entries, "unheard_of"]:
            for way in ("changed", "removed"):
                config = copy.deepcopy(whole)
                target = dicts_of(config)[name]
                if way == "changed":
                    target[key] = changed(target.get(key, "value"))
                elif target.pop(key, None) is None and key not in entries:
                    continue
                (tmp_path / "config.json").write_text(json.dumps(config))
                result = attempt(tmp_path, weights)
                assert result.split(":")[0] in ("ValueError", "TypeError", "KeyError", "RuntimeError"), (name, key, way)
                tried += 1
    assert tried == 2 * sum(len(entries) for entries in dicts_of(whole).values()) + 4
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(whole.items())), indent=8))
    assert attempt(tmp_path, weights) == "loaded"


def test_every_tensor_of_a_header_is_covered(saved, tmp_path):
    """Renamed, retyped, reshaped, removed and added, as are the metadata: refused."""
    data, weights = (saved / "model.safetensors").read_bytes(), load_file(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert set(header) == {*weights, "__metadata__"}
    changes = []
    for name, entry in header.items():
        rest = {key: value for key, value in header.items() if key != name}
        changes.append(rest)
        if name != "__metadata__":
            changes += [
                {**rest, f"{name}_": entry},
                {**rest, name: {**entry, "shape": [1, *entry["shape"]]}},
                {**rest, name: {**entry, "dtype": "I32"}},
            ]
    changes += [{**header, "new": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}]
    changes += [{**header, "__metadata__": {"format": "pt", "rat_timm.config_sha256": value}} for value in ("", "0")]
    for change in changes:
        head = json.dumps(change).encode()
        head += b" " * (-len(head) % 8)
        file = len(head).to_bytes(8, "little") + head + data[8 + length :]
        (tmp_path / "model.safetensors").write_bytes(file)
        assert re.match("ValueError: .*model.safetensors is damaged", attempt(tmp_path, weights))
    assert len(changes) == 4 * len(weights) + 4


REDIRECTIONS = {
    "model_args": {
        "pretrained_cfg_overlay": {"url": "http://127.0.0.1:9/evil.pth"},
        "pretrained_cfg": {"file": "evil.safetensors"},
        "pretrained": True,
        "features_only": True,
        "feature_cls": "hook",
        "out_indices": [0],
        "kwargs_filter": ["spacing"],
        "pruned": True,
        "device": "meta",
        "dtype": "float64",
        "num_classes": 3,
        "checkpoint_path": "evil.pth",
        "cache_dir": "elsewhere",
        "pretrained_strict": False,
        "pretrained_model_args": {"spacing": 2.0},
        "like": "resnet18",
        "defaults": {"iters": 1},
        "cfg": None,
    },
    "pretrained_cfg": {
        "file": "evil.safetensors",
        "url": "http://127.0.0.1:9/evil.pth",
        "state_dict": {"a": 1},
        "hf_hub_id": "me/evil",
        "hf_hub_filename": "evil.safetensors",
        "source": "hf-hub",
        "architecture": "test_vit",
        "custom_load": True,
        "label_offset": 1,
        "classifier": "stages.0",
        "unheard_of": 1,
    },
}


@pytest.mark.filterwarnings("ignore:nothing vouches")
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_sends_nobody_elsewhere(saved, tmp_path, kind):
    """Whatever the digests say: only keywords of the model and preprocessing are taken from a config."""
    weights, config, trace = load_file(saved / "model.safetensors"), config_of(saved), tmp_path / "trace"
    plain = write(tmp_path / "plain", config, weights, kind)
    assert attempt(plain, weights) == "loaded"
    bad = write(tmp_path / "bad", config, weights, kind)
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, bad / "evil.safetensors")
    (bad / "evil.pth").write_bytes(pickle.dumps(Bomb(trace)))
    for part, redirections in REDIRECTIONS.items():
        for key, value in redirections.items():
            there = str(bad / value) if isinstance(value, str) and value.startswith("evil") else value
            config = config_of(saved)
            config[part][key] = there
            write(bad, config, weights, kind)
            result = attempt(bad, weights)
            assert re.match(f"(ValueError|TypeError): .*{key}", result), (key, result)
            for pretrained in (False, True):
                overlay = {"pretrained_cfg_overlay": {"file": str(bad / "model.safetensors")}} if pretrained else {}
                name = "test_rat" if pretrained else f"local-dir:{bad}"
                if pretrained and kind == "timm":
                    continue  # timm reads a file that nobody has described
                if not pretrained and key in ("file", "source"):
                    continue  # timm puts there where it has read the config; nothing is loaded
                with pytest.raises((ValueError, TypeError), match=key):
                    timm.create_model(name, pretrained=pretrained, **overlay)
    assert not trace.exists()


def outcome(folder, weights):
    try:
        return "loaded" if same(load(folder), weights) else "other weights"
    except ValueError as error:
        return "damaged" if "is damaged" in str(error) else str(error)


def test_what_is_hashed_is_what_is_loaded(saved, tmp_path):
    """While another process exchanges the weights and exchanges them back."""
    good, weights = (saved / "model.safetensors").read_bytes(), load_file(saved / "model.safetensors")
    evil = tmp_path / "evil"
    save_file({name: value + 1 for name, value in weights.items()}, evil, metadata={"format": "pt"})
    other, folder, done = evil.read_bytes(), tmp_path / "model", threading.Event()
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    (folder / "model.safetensors").write_bytes(good)

    def exchange():
        while not done.is_set():
            for data in (other, good):
                (tmp_path / "next").write_bytes(data)
                (tmp_path / "next").replace(folder / "model.safetensors")
                done.wait(0.01)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        results = [outcome(folder, weights) for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert set(results) <= {"loaded", "damaged"}


@pytest.mark.filterwarnings("ignore:nothing vouches")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depths", [10**6, 1, 1, 1], "asks for 1000003 layers"),
        ("depths", [1] * 40, "asks for .* channels"),
        ("stem_kernel_size", [3] * 10**5, "asks for 100000 layers"),
        ("embed_dim", [10**6, 64, 64, 128], "asks for 1000000 channels"),
        ("embed_dim", 10**18, "asks for .* channels"),
        ("mlp_ratio", 1e6, "differ in the shapes of"),
        ("reg_tokens", 10**8, "numbers, its weights hold"),
        ("in_chans", 10**6, "differ in the shapes of"),
    ],
)
def test_a_config_makes_no_more_than_its_weights_hold(saved, tmp_path, kind, key, value, message):
    config = config_of(saved)
    config["model_args"][key] = value
    if key == "depths" and len(value) > 4:
        config["model_args"]["embed_dim"] = 32  # which doubles from stage to stage
    write(tmp_path / "large", config, load_file(saved / "model.safetensors"), kind)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "large")


@pytest.mark.filterwarnings("ignore:nothing vouches")
def test_a_config_of_a_vit_makes_no_more_than_its_weights_hold(tmp_path):
    hub.save(timm.create_model("apvit_tiny_patch16_224", depth=1, num_classes=2), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for key, value in {"depth": 10**6, "embed_dim": 3 * 10**6, "img_size": [10**5, 10**5]}.items():
        config = config_of(tmp_path)
        config["model_args"][key] = value
        write(tmp_path / "large", config, weights, "timm")
        with pytest.raises(ValueError, match=r"is damaged: its config\.json"):
            load(tmp_path / "large")


def test_folders_from_before_the_config_was_covered_load(saved, tmp_path):
    """Written here as `hub.save` wrote them: the config has a digest of the weights, and these none of the config."""
    weights = load_file(saved / "model.safetensors")
    folder = write(tmp_path / "before", config_of(saved), weights, "before")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert config_of(folder)["rat_timm"].keys() == {"version", "sha256"}
    assert attempt(folder, weights) == "loaded"
    data = (folder / "model.safetensors").read_bytes()
    for place in places_of_tensors(folder / "model.safetensors")[::10]:
        (folder / "model.safetensors").write_bytes(flip(data, place))
        assert "is damaged" in attempt(folder, weights)
    (folder / "model.safetensors").write_bytes(data)
    for emptied in ({}, None, [], {"version": "0.1.0"}, {"sha256": ""}):
        (folder / "config.json").write_text(json.dumps(config_of(folder) | {"rat_timm": emptied}))
        assert "is damaged" in attempt(folder, weights)
    for missing in ({}, {"rat_timm": {"sha256": "0" * 64}}):  # neither does one mend the other
        rest = {key: value for key, value in config_of(saved).items() if key != "rat_timm"}
        config = rest | missing
        (saved_copy := tmp_path / "copy").mkdir(exist_ok=True)
        (saved_copy / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
        (saved_copy / "config.json").write_text(json.dumps(config))
        assert "is damaged" in attempt(saved_copy, weights)
        overlay = {"file": str(saved_copy / "model.safetensors")}
        with pytest.raises(ValueError, match="is damaged"):
            timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay)
    (saved_copy / "config.json").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        timm.create_model("test_rat", pretrained=True, pretrained_cfg_overlay=overlay)


def test_what_transformers_trained_loads_and_a_flipped_byte_of_ours_does_not(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForImageClassification.from_pretrained(saved)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 10} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    trained = model.timm_model.state_dict()
    assert not same(load(saved), trained)
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "final"):
        assert "rat_timm" in config_of(folder)
        with pytest.warns(UserWarning, match="nothing vouches for the weights in .*transformers"):
            assert same(load(folder), trained)
    ours = files_of(saved)
    weights = ours["model.safetensors"]
    for file, data in {**ours, "model.safetensors": flip(weights, len(weights) - 5)}.items():
        (tmp_path / "final" / file).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path / "final")


@pytest.fixture
def sharded(saved, tmp_path):
    """What transformers writes of large models."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(saved)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    return tmp_path / "sharded"


def test_shards_load(saved, sharded):
    weights = load_file(saved / "model.safetensors")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    with pytest.warns(UserWarning, match="nothing vouches"):
        assert attempt(sharded, weights) == "loaded"


@pytest.mark.filterwarnings("ignore:nothing vouches")
def test_an_index_names_what_lies_beside_it(saved, sharded, tmp_path):
    weights = load_file(saved / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensor, shard = next(iter(index["weight_map"].items()))
    (tmp_path / "outside.safetensors").write_bytes((sharded / shard).read_bytes())
    (sharded / "in").mkdir()
    (sharded / "in" / "side.safetensors").write_bytes((sharded / shard).read_bytes())
    other = next(name for name in index["weight_map"].values() if name != shard)
    places = ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "in/side.safetensors"]
    for name in (*places, "in\\side.safetensors", "pytorch_model.bin", "missing.safetensors", "", None, 3, other):
        moved = {key: name if value == shard else value for key, value in index["weight_map"].items()}
        for weight_map in (moved, index["weight_map"] | {tensor: name}):
            (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
            assert re.match("(ValueError|FileNotFoundError): ", attempt(sharded, weights)), name
    lacking = {key: value for key, value in index["weight_map"].items() if key != tensor}
    for content in ({}, [], {"weight_map": {}}, {"weight_map": [shard]}, {"weight_map": lacking}):
        (sharded / "model.safetensors.index.json").write_text(json.dumps(content))
        assert "is damaged" in attempt(sharded, weights)


def test_an_index_does_not_stand_in_for_weights_with_a_digest(saved, sharded):
    (sharded / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load(sharded)


ELSEWHERE = """
import warnings
warnings.simplefilter("ignore")
opened, asked = [], []
def audit(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(args[0]))
    elif event == "socket.connect":
        asked.append(args[1])
    elif event == "socket.getaddrinfo":
        asked.append(args[:2])
sys.addaudithook(audit)
results = {"plain": attempt("hf-hub:me/plain-again")}
opened.clear()
for name in json.loads(os.environ["NAMES"]):
    results[name] = attempt(f"hf-hub:me/{name}")
    overlay = {"hf_hub_id": f"me/{name}"}
    results[f"{name}, overlay"] = attempt("test_rat", pretrained_cfg_overlay=overlay)
files = [path for path in opened if path.endswith((".safetensors", ".pth", ".bin", ".json"))]
print(json.dumps([results, files, sorted({str(address) for address in asked})]))
"""


def test_a_repository_sends_nobody_elsewhere(server, saved, sharded, tmp_path):
    """Nothing but the Hub is asked, and of it nothing but config and weights."""
    weights, whole = load_file(saved / "model.safetensors"), config_of(saved)
    evil = tmp_path / "evil.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, evil)
    put(server, "me/plain-again", files_of(saved))
    bad = {"me/sharded": files_of(sharded)}
    shards = [name for name in bad["me/sharded"] if name.endswith(".safetensors")]
    bad["me/flipped"] = bad["me/sharded"]
    server.tampered["me/flipped", shards[0]] = flip(bad["me/sharded"][shards[0]], 2000)
    keys = {("pretrained_cfg", key) for key in ("file", "url", "hf_hub_id", "hf_hub_filename", "label_offset")}
    keys |= {("model_args", key) for key in ("pretrained_cfg_overlay", "features_only")}
    for part, key in keys:
        for kind in ("now", "transformers"):
            config = copy.deepcopy(whole)
            config[part][key] = REDIRECTIONS[part][key]
            if key == "file":
                config[part][key] = str(evil)
            folder = write(tmp_path / f"{kind}-{key}", config, weights, kind)
            bad[f"me/{kind}-{key}"] = files_of(folder) | {"evil.safetensors": evil.read_bytes()}
    for name, files in bad.items():
        put(server, name, files)
    before = len(server.requests)
    names = [name.removeprefix("me/") for name in bad]
    results, files, asked = client(server, tmp_path, ELSEWHERE, NAMES=json.dumps(names))
    assert results.pop("plain") == results.pop("sharded") == results.pop("sharded, overlay") == "loaded"
    assert "is damaged" in results.pop("flipped")
    assert "is damaged" in results.pop("flipped, overlay")
    assert len(results) == 2 * 2 * len(keys)
    for name, error in results.items():
        key = re.search("(?:now|transformers)-([a-z_]+)", name)[1]
        assert re.match(f"(ValueError|TypeError): .*{key}", error), name
    assert files
    assert all(Path(path).resolve().is_relative_to(tmp_path / "home") for path in files)
    port = server.url.rsplit(":", 1)[1]
    assert asked
    assert all("127.0.0.1" in address and port in address for address in asked)
    assert not [request for request in server.requests[before:] if "evil" in request]
