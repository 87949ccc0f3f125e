"""The rotary architectures of the installed timm, read out of its entry points.

    python tests/rotary_architectures.py

writes them to ``rat_timm/models/rope_vit/architectures.json``, one a line.
"""

import functools
import json
import unittest.mock
from pathlib import Path

import timm
from timm.models import eva

import rat_timm

TABLE = Path(rat_timm.__file__).parent / "models/rope_vit/architectures.json"
MAX_PARAMETERS = 2e9
EMBEDDINGS = ("RotaryEmbeddingCat", "RotaryEmbeddingMixed", "RotaryEmbeddingDinoV3")
NOT_OF_ARCHITECTURES = ("pretrained_filter_fn", "feature_cfg")


def architectures():
    """Returns the keywords of every architecture of `Eva` that has weights, as JSON has them, by timm's name."""
    names = sorted({name.split(".")[0] for name in timm.list_models(module="eva", pretrained=True)})
    return {name: arguments(name) for name in names if is_taken(name)}


@functools.cache
def meta_model(name):
    """Makes a model without values; those that ``init_weights`` would draw take most of the time."""
    with unittest.mock.patch.object(eva.Eva, "init_weights"):
        return timm.create_model(name, device="meta")


def is_taken(name):
    model = meta_model(name)
    return type(model.rope).__name__ in EMBEDDINGS and sum(p.numel() for p in model.parameters()) < MAX_PARAMETERS


def arguments(name):
    """Returns what timm's entry point makes its model with."""
    with unittest.mock.patch.object(eva, "build_model_with_cfg") as build:
        timm.model_entrypoint(name)(use_naflex=False)
    kwargs = {key: value for key, value in build.call_args.kwargs.items() if key not in NOT_OF_ARCHITECTURES}
    return json.loads(json.dumps(kwargs, default=describe_norm))


def describe_norm(layer):
    """A normalisation is a class of `timm.layers` with an epsilon."""
    assert isinstance(layer, functools.partial)
    assert layer.func is getattr(timm.layers, layer.func.__name__)
    assert not layer.args
    assert set(layer.keywords) == {"eps"}
    return {"name": layer.func.__name__, **layer.keywords}


def as_text(table):
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)) + "\n}\n"


if __name__ == "__main__":
    TABLE.write_text(as_text(architectures()))
