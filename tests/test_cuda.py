"""On a GPU: layers against float64 references, models against themselves on the CPU in float64, timm's contract.

    python -m pytest tests/test_cuda.py
    RAT_TIMM_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py

The second runs the same on the CPU, where it tests nothing that the other files do not, except this file.
"""

import copy
import functools
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once; deterministic algorithms ask for it

import pytest
import timm
import torch
from test_grouping import coarse_shape, flat, local_inputs, local_reference, tiled  # noqa: F401, a fixture
from test_rat import lively
from test_rose import positions

import rat_timm
import references
from rat_timm.geometry.grid import Grid
from rat_timm.layers import (
    RotarySpatialEmbedding,
    grouping_attention,
    local_grouping_attention,
    neighborhood_attention,
)
from test_neighborhood import gradients, inputs, per_axis

DEVICE = os.environ.get("RAT_TIMM_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

MODELS = {
    "test_rat": {"reg_tokens": 1},
    "test_rat_3d": {},
    "rat_vit_small_patch16_rope_mixed_224": {"img_size": 48, "depth": 2, "spacing": 1.0},
}
TRAINED = {  # a model's parameters all get a gradient: without prefix tokens that the pooling leaves out
    "test_rat": {},
    "test_rat_3d": {},
    "rat_vit_small_patch16_rope_mixed_224": {"img_size": 48, "depth": 2},
}
SIZES = {2: [(48, 40), (24, 32)], 3: [(16, 24, 20), (12, 12, 16)]}
BACKENDS = ("torch", "flex", "natten")
GRIDS = [((9, 12), (3, 5)), ((14, 10), (7, 7)), ((5, 6, 7), (3, 3, 3))]
models = pytest.mark.parametrize("name", MODELS)
trained = pytest.mark.parametrize("name", TRAINED)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Convolutions in float32 are exact, not TF32; each test starts from the default backend, compiled to nothing."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    yield
    rat_timm.set_attention_backend("auto")


def choose(backend, grad=True):
    """Chooses a backend, or skips what it cannot do here."""
    if backend == "natten":
        pytest.importorskip("natten")
    if backend == "flex" and grad and DEVICE == "cpu":
        pytest.skip("FlexAttention has no gradient on the CPU")
    rat_timm.set_attention_backend(backend)


def put(value, device=DEVICE, dtype=None):
    """Moves tensors, and lists of them; floating-point ones to a dtype as well."""
    if isinstance(value, dict):
        return {name: put(each, device, dtype) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [put(each, device, dtype) for each in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def on_the_gpu(function, *options):
    """Moves what a function takes to the device and what it gives back to the CPU, in float64."""

    def run(*tensors):
        return function(*(put(t) for t in tensors), *(put(o) for o in options)).cpu()

    return run


def assert_agree(ours, expected, atol):
    (out, grads), (reference, reference_grads) = ours, expected
    torch.testing.assert_close(out.double(), reference, rtol=0, atol=atol)
    for grad, other in zip(grads, reference_grads, strict=True):
        torch.testing.assert_close(grad.double(), other, rtol=10 * atol, atol=20 * atol)


def error(found, expected):
    """Relative to the expected norm."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


# layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("grid", "kernel"), GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_neighbourhood_attention_follows_its_definition(backend, grid, kernel, masked):
    choose(backend)
    if backend == "natten" and masked:
        pytest.skip("NATTEN has no masks")
    tensors, mask = inputs(grid, heads=2, width=32), torch.rand(2, *grid) > 0.6 if masked else None
    if masked:
        mask[1] = False
    tensors = [t.float().double() for t in tensors]
    expected = gradients(references.neighborhood_attention, tensors, per_axis(kernel, grid), mask)
    exact = [torch.float64] if backend == "torch" else []
    for dtype, atol in [*((d, 1e-10) for d in exact), (torch.float32, 2e-5)]:
        run = on_the_gpu(neighborhood_attention, kernel, mask)
        assert_agree(gradients(run, [t.to(dtype) for t in tensors]), expected, atol)


@pytest.mark.parametrize("backend", ["torch", "flex"])
@pytest.mark.parametrize(("grid", "kernel"), GRIDS)
@pytest.mark.parametrize("masked", [False, True])
def test_biases_of_relative_positions_follow_their_definition(backend, grid, kernel, masked):
    choose(backend)
    tensors = [*inputs(grid, heads=2, width=32), torch.randn(2, *(2 * k - 1 for k in kernel))]
    mask = torch.rand(2, *grid) > 0.6 if masked else None

    def attend(query, key, value, bias, mask):
        return neighborhood_attention(query, key, value, kernel, mask, bias=bias)

    def by_definition(query, key, value, bias):
        return references.neighborhood_attention(query, key, value, kernel, mask, bias)

    tensors = [t.float().double() for t in tensors]
    ours = gradients(on_the_gpu(attend, mask), [t.float() for t in tensors])
    assert_agree(ours, gradients(by_definition, tensors), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_neighbourhood_attention_in_half_precision(backend, dtype, atol):
    choose(backend)
    tensors = [t.to(dtype) for t in inputs((12, 12), width=32)]
    expected, expected_grads = gradients(
        references.neighborhood_attention, [t.double() for t in tensors], per_axis(5, (12, 12))
    )
    out, grads = gradients(on_the_gpu(neighborhood_attention, 5), tensors)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert error(grad, other) < 3 * atol


@pytest.mark.parametrize("backend", ["torch", "flex"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_keys_may_hold_anything(backend, poison):
    choose(backend, grad=False)
    query, key, value = (put(t.float()) for t in inputs((9, 20), width=16))
    mask = put(torch.rand(2, 9, 20) > 0.4)
    clean = neighborhood_attention(query, key, value, 5, mask)
    key[~mask], value[~mask] = poison, poison
    assert torch.equal(neighborhood_attention(query, key, value, 5, mask), clean)


def test_a_large_grid_equals_its_inside():
    """More tiles and parts than the small cases have; windows in the middle do not see the border."""
    tensors = [put(t.float()) for t in inputs((130, 150), batch=1, width=32)]
    part = [t[:, 30:90, 40:110] for t in tensors]
    for grad in (False, True):
        whole = neighborhood_attention(*(t.clone().requires_grad_(grad) for t in tensors), 7)
        inside = neighborhood_attention(*part, 7)[:, 3:-3, 3:-3]
        torch.testing.assert_close(whole[:, 33:87, 43:107], inside, rtol=0, atol=1e-5)


def test_many_samples_are_attended_to():
    """More rows than one dimension of a CUDA grid takes, 65535."""
    tensors = [put(t.float()) for t in inputs((8, 8), batch=1, heads=2, width=8)]
    many = [t.expand(40_000 if DEVICE == "cuda" else 400, -1, -1, -1, -1).clone() for t in tensors]
    expected = neighborhood_attention(*tensors, 3)
    torch.testing.assert_close(neighborhood_attention(*many, 3)[-1:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("fine", "stride", "window"), [((7, 9), 2, 3), ((11, 6), (3, 2), 3), ((5, 7, 4), 2, 3)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("tiled")
def test_local_grouping_follows_its_definition(fine, stride, window, masked, dtype, atol):
    tensors = [t.float().double() for t in local_inputs(fine, stride)]
    mask = torch.rand(2, *fine) > 0.4 if masked else None
    group_mask = torch.rand(2, *coarse_shape(fine, stride)) > 0.4 if masked else None
    expected = gradients(local_reference, tensors, stride, window, mask, group_mask)
    run = on_the_gpu(local_grouping_attention, stride, window, mask, group_mask)
    assert_agree(gradients(run, [t.to(dtype) for t in tensors]), expected, atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_grouping_follows_its_definition(chunk_size, masked, dtype, atol):
    tensors = [torch.randn(2, 3, n, 4).double() for n in (7, 23, 23)]
    mask = torch.rand(2, 23) > 0.4 if masked else None
    group_mask = torch.rand(2, 7) > 0.4 if masked else None
    allowed = torch.ones(2, 7, 23, dtype=torch.bool)
    if masked:
        allowed = mask[:, None] & group_mask[..., None]
    expected = gradients(references.grouping_attention, tensors, allowed)
    run = on_the_gpu(grouping_attention, mask, group_mask, chunk_size)
    assert_agree(gradients(run, [t.to(dtype) for t in tensors]), expected, atol)


@low_precision
def test_grouping_in_half_precision(dtype):
    tensors = [put(t.to(dtype) / 2) for t in local_inputs((12, 12), 2, width=32)]
    expected = local_reference(*(t.double().cpu() for t in tensors), 2, 3)
    assert error(local_grouping_attention(*tensors, 2, 3), expected) < 2e-2
    whole = local_grouping_attention(*tensors, 2, 99)
    assert error(grouping_attention(*map(flat, tensors)), flat(whole)) < 2e-2


def test_masked_tokens_may_hold_anything():
    query, key, value = (put(t.float()) for t in local_inputs((9, 12), 2))
    mask = put(torch.rand(2, 9, 12) > 0.4)

    def both():
        dense = grouping_attention(flat(query), flat(key), flat(value), mask.flatten(1))
        return local_grouping_attention(query, key, value, 2, 3, mask), dense

    clean = both()
    key[~mask], value[~mask] = float("nan"), float("nan")
    assert all(torch.equal(a, b) for a, b in zip(both(), clean, strict=True))


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 4)])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 3e-6), (torch.bfloat16, 6e-2), (torch.float16, 6e-3)]
)
def test_rotary_spatial_embeddings_follow_their_formula(shape, dtype, atol):
    rose = RotarySpatialEmbedding(24, 4, len(shape))
    where = positions(Grid.create(shape, 0.7))
    x = torch.randn(1, *shape, 4, 6).to(dtype)
    offset = torch.stack(where.dense().offset, dim=-1)[0]
    expected = torch.stack(
        [references.rotate(x[(0, *p)].double(), offset[p], rose.freqs) for p in references.places(shape)]
    )
    there = where._replace(offset=tuple(put(list(where.offset))))
    out = rose.to(DEVICE)(put(x), there)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double().cpu(), expected.view_as(x), rtol=0, atol=atol)


# models


@functools.cache
def build(name, **changed):
    torch.manual_seed(0)
    return lively(timm.create_model(name, **{"num_classes": 5, **MODELS[name], **changed}).eval())


def here(model):
    return copy.deepcopy(model).to(DEVICE)


def images(model, batch=2, levels=1):
    sizes = SIZES[model.spatial_dims][:levels]
    found = [torch.randn(batch, model.in_chans, *size) for size in sizes]
    return found[0] if levels == 1 else found


def pyramid(model, batch=2, masked=True):
    """A pyramid of two levels, with what is said of them per sample."""
    axes, x = model.spatial_dims, images(model, batch, 2)
    told = {
        "spacing": [0.5 + torch.rand(batch, axes), 1 + 2 * torch.rand(batch, axes)],
        "origin": [3 * torch.randn(batch, axes) for _ in x],
    }
    if masked:
        told["mask"] = [torch.rand(batch, *level.shape[2:]) < 0.7 for level in x]
    return x, told


def step(run, model, x, **told):
    """Logits and all gradients of a training step."""
    model.zero_grad()
    out = run(x, **told)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32).view_as(out)
    (out.float() * weight).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_steps_agree(ours, expected, tolerance):
    assert error(ours[0], expected[0]) < tolerance
    assert len(ours[1]) == len(expected[1])
    norm = torch.stack([g.double().norm().cpu() for g in expected[1]]).norm()
    for grad, other in zip(ours[1], expected[1], strict=True):
        difference = (grad.double().cpu() - other.double().cpu()).norm()
        assert difference < tolerance * (other.double().norm().cpu() + 0.01 * norm)


@models
@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_an_image_gives_what_it_gives_on_the_cpu(name, backend):
    choose(backend)
    model = build(name)
    x = images(model)
    rat_timm.set_attention_backend("torch")
    expected = step(exact := copy.deepcopy(model).double(), exact, x.double())
    rat_timm.set_attention_backend(backend)
    other = here(model)
    assert_steps_agree(step(other, other, put(x)), expected, 1e-4)


@models
def test_a_masked_pyramid_gives_what_it_gives_on_the_cpu(name):
    model = build(name)
    x, told = pyramid(model)
    expected = step(exact := copy.deepcopy(model).double(), exact, put(x, "cpu", torch.float64), **told)
    other = here(model)
    assert_steps_agree(step(other, other, put(x), **put(told)), expected, 1e-4)
    # what is said of the images may stay on the CPU
    assert_steps_agree(step(other, other, put(x), **told), expected, 1e-4)


@models
@torch.no_grad()
def test_masked_pixels_change_no_bit(name):
    model = here(build(name))
    x, told = put(list(pyramid(model)))
    expected = model(x, **told)
    assert torch.isfinite(expected).all()
    for fill in (float("nan"), float("inf")):
        dirty = [torch.where(m.unsqueeze(1), level, fill) for level, m in zip(x, told["mask"], strict=True)]
        assert torch.equal(model(dirty, **told), expected)


@models
@torch.no_grad()
def test_the_order_of_levels_and_a_common_shift_do_not_matter(name):
    model = here(build(name))
    x, told = put(list(pyramid(model)))
    expected = model(x, **told)
    swapped = {key: value[::-1] for key, value in told.items()}
    torch.testing.assert_close(model(x[::-1], **swapped), expected, rtol=0, atol=1e-4)
    shifted = told | {"origin": [o.double() + 1e4 for o in told["origin"]]}
    torch.testing.assert_close(model(x, **shifted), expected, rtol=0, atol=1e-4)


@models
@torch.no_grad()
def test_a_batch_equals_its_items(name):
    model = here(build(name))
    x, told = put(list(pyramid(model, 3)))
    together = model(x, **told)
    for i in range(3):
        part = slice(i, i + 1)
        alone = model([level[part] for level in x], **{k: [v[part] for v in vs] for k, vs in told.items()})
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d"])
def test_a_physical_stem_takes_several_spacings(name):
    model = build(name, physical_stem=True)
    x, spacing = images(model, 3), 0.6 + torch.rand(3, model.spatial_dims)
    expected = step(exact := copy.deepcopy(model).double(), exact, x.double(), spacing=spacing)
    other = here(model)
    assert_steps_agree(step(other, other, put(x), spacing=spacing), expected, 1e-4)
    together = other(put(x), spacing=put(spacing))
    for i in range(3):
        alone = other(put(x[i : i + 1]), spacing=spacing[i])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-4)


@models
def test_deterministic_algorithms_give_the_same_bits(name):
    model = here(build(name))
    x, told = put(list(pyramid(model)))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (step(model, model, x, **told) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@models
@torch.no_grad()
def test_threads_and_streams_of_several_sizes(name):
    """Plans are kept from one stream to the next."""
    model = here(build(name))
    axes = model.spatial_dims
    batches = [put(torch.randn(1, model.in_chans, *(24 + 8 * i,) * axes)) for i in range(3)]
    expected = [model(x) for x in batches]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in batches]
        found = []
        for stream, x in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(x))
        torch.cuda.synchronize()
    else:
        found = [model(x) for x in batches]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# timm's contract


@trained
def test_every_parameter_gets_a_gradient(name):
    model = timm.create_model(name, num_classes=5, **TRAINED[name]).to(DEVICE).train()
    out = model(put(images(model)))
    assert out.shape == (2, 5)
    out.float().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@trained
def test_models_are_made_on_the_device(name):
    model = timm.create_model(name, device=DEVICE, dtype=torch.bfloat16, **TRAINED[name]).eval()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {DEVICE}
    with torch.no_grad():
        out = model(put(images(model)).bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@trained
@torch.no_grad()
def test_features_only(name):
    kwargs = {"out_indices": (0, 1)} if "vit" in name else {}
    backbone = timm.create_model(name, features_only=True, **TRAINED[name], **kwargs).eval()
    x = torch.randn(2, backbone.model.in_chans, *SIZES[backbone.model.spatial_dims][0])
    if "vit" in name:
        x = torch.randn(2, 3, 48, 48)
    expected = copy.deepcopy(backbone).double()(x.double())
    for maps, other in zip(backbone.to(DEVICE)(put(x)), expected, strict=True):
        assert maps.device.type == DEVICE
        assert error(maps, other) < 1e-4


@models
@low_precision
def test_automatic_mixed_precision(name, dtype):
    model = build(name)
    x, told = pyramid(model)
    expected = step(exact := copy.deepcopy(model).double(), exact, put(x, "cpu", torch.float64), **told)
    other, x, told = here(model), put(x), put(told)

    def run(x, **told):
        with torch.autocast(DEVICE, dtype):
            return other(x, **told)

    out, grads = step(run, other, x, **told)
    assert error(out, expected[0]) < {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert all(torch.isfinite(grad).all() for grad in grads)
    whole, expected_whole = (torch.cat([g.flatten().double().cpu() for g in gs]) for gs in (grads, expected[1]))
    assert torch.nn.functional.cosine_similarity(whole, expected_whole, dim=0) > 0.99


@trained
@torch.no_grad()
def test_channels_last(name):
    model = here(build(name))
    x = put(images(model))
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    expected = model(x)
    torch.testing.assert_close(model(x.to(memory_format=layout)), expected, rtol=0, atol=1e-4)
    model = model.to(memory_format=layout)
    torch.testing.assert_close(model(x.to(memory_format=layout)), expected, rtol=0, atol=1e-4)


@models
def test_gradient_checkpointing_changes_no_gradient(name):
    model = here(build(name)).train()
    x, told = put(list(pyramid(model)))
    expected = step(model, model, x, **told)
    model.set_grad_checkpointing()
    assert_steps_agree(step(model, model, x, **told), expected, 1e-5)


def test_training_learns():
    """Two colours under noise, in mixed precision with a scaler, as a user trains."""
    torch.manual_seed(0)
    model = timm.create_model("test_rat", num_classes=2).to(DEVICE).train()
    labels = put(torch.arange(16) % 2)
    x = put(torch.randn(16, 3, 32, 32)) + (2.0 * labels - 1).view(-1, 1, 1, 1)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler(DEVICE)
    losses = []
    for _ in range(12):
        with torch.autocast(DEVICE, torch.float16):
            loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# compilers


@trained
@pytest.mark.parametrize("backend", ["torch", "flex"])
def test_compiled_inference(name, backend):
    if "vit" in name and backend == "flex":
        pytest.skip("it has no neighbourhood attention")
    choose(backend, grad=False)
    model = here(build(name))
    x = put(images(model))
    with torch.no_grad():
        expected = model(x)
        assert error(torch.compile(model, fullgraph=True)(x), expected) < 1e-4


@pytest.mark.parametrize("name", ["test_rat", "test_rat_3d"])
def test_a_compiled_training_step(name):
    model = here(build(name)).train()
    x = put(images(model))
    expected = step(model, model, x)
    assert_steps_agree(step(torch.compile(model, fullgraph=True), model, x), expected, 1e-4)


def test_a_compiled_training_step_in_mixed_precision_on_a_masked_pyramid():
    model = here(build("test_rat")).train()
    x, told = put(list(pyramid(model)))

    def run(x, **told):
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(x, **told)

    exact = step(model, model, x, **told)
    (eager, eager_grads), (out, grads) = step(run, model, x, **told), step(torch.compile(run), model, x, **told)
    assert error(out, exact[0]) < max(0.02, 2 * error(eager, exact[0]))
    whole, expected = (torch.cat([g.flatten().double() for g in gs]) for gs in (grads, exact[1]))
    assert torch.nn.functional.cosine_similarity(whole, expected, dim=0) > 0.99
    assert len(grads) == len(eager_grads)


@torch.no_grad()
def test_cuda_graphs():
    model = here(build("test_rat"))
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warms up, records, replays
        x = put(images(model))
        torch.compiler.cudagraph_mark_step_begin()
        assert error(compiled(x), model(x)) < 1e-4


@torch.no_grad()
def test_a_recorded_graph():
    """`torch.cuda.graph` takes an eager model whose plans are made: nothing waits for the GPU."""
    if DEVICE == "cpu":
        pytest.skip("graphs are CUDA's")
    model = here(build("test_rat"))
    static = put(images(model))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(static)
    x = put(images(model))
    static.copy_(x)
    graph.replay()
    torch.testing.assert_close(out, model(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_inference_does_not_wait_for_the_gpu():
    if DEVICE == "cpu":
        pytest.skip("nothing to wait for")
    model = here(build("test_rat"))
    x = put(images(model))
    model(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
