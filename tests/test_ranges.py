"""`rat_timm.geometry.ranges`: who is warned of which pixel sizes, and how often."""

import copy
import pickle
import warnings

import pytest
import timm
import torch

import rat_timm
from rat_timm.geometry import Grid, Pyramid, Tokens
from rat_timm.geometry.ranges import describe_range, range_of_json, read_range
from rat_timm.geometry.read import Told

NAMES = ("test_rat", "test_rat_3d", "rat_eva02_tiny_patch14_224", "apvit_tiny_patch16_224")
SMALL = {"rat_eva02_tiny_patch14_224": {"depth": 1}, "apvit_tiny_patch16_224": {"depth": 1}}


def create(name, **kwargs):
    return timm.create_model(name, num_classes=2, **SMALL.get(name, {}), **kwargs).eval()


@torch.no_grad()
def told(model, *args, **kwargs):
    """Returns the warnings about the range that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(*args, **kwargs)
    return [str(w.message) for w in caught if "trained and validated" in str(w.message)]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_warns_once_of_what_it_was_not_validated_at(name):
    model = create(name, spacing_range=(0.5, 2.0))
    axes = model.spatial_dims
    assert model.spacing_range == ((0.5, 2.0),) * axes
    image = torch.rand(2, model.in_chans, *(32,) * axes)
    inside = [None, 0.5, 2.0, [1.0] * axes, torch.full((2, axes), 0.5), torch.tensor([0.5] * axes)]
    assert [told(model, image, spacing=spacing) for spacing in inside] == [[]] * len(inside)
    (message,) = told(model, image, spacing=4.0)
    expected = tuple([4.0] * axes)
    assert f"spacing {expected} is outside of" in message
    assert "0.5 to 2 along each axis" in message
    assert told(model, image, spacing=4.0) == told(model, image, spacing=0.1) == []
    other = copy.deepcopy(create(name, spacing_range=(0.5, 2.0)))
    rows = torch.full((2, axes), 1.0)
    rows[1, -1] = 0.4
    assert len(told(other, image, spacing=rows)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_it_changes_no_result_and_is_not_known_by_default(name):
    torch.manual_seed(0)
    model = create(name)
    assert model.spacing_range is None
    image = torch.rand(1, model.in_chans, *(32,) * model.spatial_dims)
    with torch.no_grad():
        before = model(image, spacing=3.0)
        model.spacing_range = (0.5, 1.0)
        with pytest.warns(UserWarning, match=r"outside of what the model was trained and validated at: 0\.5 to 1 "):
            assert torch.equal(model(image, spacing=3.0), before)
        model.spacing_range = None
        assert told(model, image, spacing=3.0) == []


def test_axes_have_ranges_of_their_own():
    model = create("test_rat_3d", spacing_range=((1.0, 4.0), (0.2, 0.2), (0.2, 0.5)))
    image = torch.rand(1, 1, 16, 16, 16)
    float32 = torch.tensor([4.0, 0.2, 0.5])  # 0.2 is larger than 0.2 there
    assert told(model, image, spacing=(1.0, 0.2, 0.5)) == told(model, image, spacing=float32) == []
    (message,) = told(model, image, spacing=(1.0, 0.2, 0.6))
    assert "1 to 4 along z, 0.2 along y, 0.2 to 0.5 along x" in message


def test_of_a_pyramid_level_0_counts():
    model = create("test_rat", spacing_range=(0.5, 2.0))
    levels = [torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16)]
    assert told(model, levels, spacing=[(1.0, 1.0), (4.0, 4.0)]) == []
    assert len(told(model, levels, spacing=[(4.0, 4.0), (8.0, 8.0)])) == 1


def test_contexts_and_wrappers_tell_it_too():
    image = torch.rand(1, 3, 32, 32)
    model = create("test_rat", spacing_range=(0.5, 2.0))
    with rat_timm.geometry(spacing=4.0):
        assert len(told(model, image)) == 1
    features = timm.create_model("test_rat", spacing_range=(0.5, 2.0), features_only=True)
    assert len(told(features, image, spacing=4.0)) == 1
    model = create("test_rat", spacing_range=(0.5, 2.0))
    with torch.no_grad(), pytest.warns(UserWarning, match="outside"):
        model.forward_intermediates(image, spacing=4.0)
    assert told(model, image, spacing=4.0) == []


def test_replicas_warn_once_together():
    model = create("test_rat", spacing_range=(0.5, 2.0))
    images = Pyramid([Tokens(torch.rand(1, 8, 8, 3), Grid.create((8, 8), 4.0))])
    first, second = (model._replicate_for_data_parallel() for _ in range(2))  # as `nn.DataParallel` makes in each call
    with pytest.warns(UserWarning, match="A model warns once"):
        first._check_range(Told(spacing=4.0), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second._check_range(Told(spacing=4.0), images)
    assert pickle.loads(pickle.dumps(model)).spacing_range == model.spacing_range


@pytest.mark.parametrize("name", ["rat_eva02_tiny_patch14_224", "test_rat"])
def test_compiled_models_have_no_trace_of_it(name):
    """One graph, and no warning, which would break it."""
    options = {"features_only": True, "out_indices": (0,), "physical_stem": False} if name == "test_rat" else {}
    model = timm.create_model(name, spacing_range=(0.5, 2.0), **SMALL.get(name, {}), **options).eval()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=keep, fullgraph=True)
    assert told(compiled, torch.rand(1, 3, 32, 32), spacing=4.0) == []
    assert len(graphs) == 1


def test_a_spacing_that_is_mapped_over_has_no_value_to_look_at():
    model, image = create("rat_eva02_tiny_patch14_224", spacing_range=(0.5, 2.0)), torch.rand(1, 3, 28, 28)
    rows = torch.tensor([[[1.0, 1.0]], [[4.0, 4.0]]])
    assert told(torch.func.vmap(lambda row: model(image, spacing=row)), rows) == []


WRONG = [1.0, (2.0, 1.0), (0.0, 1.0), (-1, 1), (1, float("inf")), (float("nan"), 1), (1, 2, 3), "12", (1, "2"), []]


@pytest.mark.parametrize("value", [*WRONG, ((1, 2),), ((1, 2), (1, 2), (1, 2)), ((1, 2), (2, 1)), {"low": 1}])
def test_ranges_that_are_none(value):
    match = "spacing_range must be two positive numbers, the lower first, or 2 such pairs"
    with pytest.raises(ValueError, match=match):
        create("test_rat", spacing_range=value)
    model = create("test_rat", spacing_range=(1, 2))
    with pytest.raises(ValueError, match=match):
        model.spacing_range = value
    assert model.spacing_range == ((1.0, 2.0), (1.0, 2.0))


def test_ranges_as_json_and_in_words():
    for value, json, words in (
        ((1, 2), [1.0, 2.0], "1 to 2 along each axis"),
        (((1, 1), (2, 3)), [[1.0, 1.0], [2.0, 3.0]], "1 along y, 2 to 3 along x"),
    ):
        known = read_range(value, 2)
        assert range_of_json(known) == json
        assert read_range(json, 2) == known
        assert describe_range(known) == words
    assert read_range(None, 2) is None is range_of_json(None)
