import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from rat_timm.layers import neighborhood_attention
from rat_timm.ops import windows

CASES = [
    ((11,), 5),
    ((7, 9), 3),
    ((9, 20), (3, 7)),
    ((17, 8), 7),
    ((5, 3), 7),
    ((1, 1), 7),
    ((13, 6), 4),
    ((3, 7, 4), 3),
    ((11, 2, 5), (3, 5, 3)),
]


def inputs(grid, batch=2, heads=3, width=4):
    return [torch.randn(batch, *grid, heads, width, dtype=torch.float64) for _ in range(3)]


def per_axis(kernel, grid):
    return kernel if isinstance(kernel, tuple) else (kernel,) * len(grid)


def gradients(function, tensors, *args, **kwargs):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors, *args, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * weight).sum(), tensors)


@pytest.mark.parametrize(("grid", "kernel"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_brute_force(grid, kernel, masked):
    tensors = inputs(grid)
    mask = torch.rand(2, *grid) > 0.6 if masked else None
    out, grads = gradients(neighborhood_attention, tensors, kernel, mask)
    expected, expected_grads = gradients(references.neighborhood_attention, tensors, per_axis(kernel, grid), mask)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("grid", "kernel"), CASES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_of_every_relative_position(grid, kernel, masked):
    kernel = per_axis(kernel, grid)
    tensors = [*inputs(grid), torch.randn(3, *(2 * k - 1 for k in kernel), dtype=torch.float64)]
    mask = torch.rand(2, *grid) > 0.6 if masked else None

    def ours(query, key, value, bias):
        return neighborhood_attention(query, key, value, kernel, mask, bias=bias)

    def theirs(query, key, value, bias):
        return references.neighborhood_attention(query, key, value, kernel, mask, bias)

    out, grads = gradients(ours, tensors)
    expected, expected_grads = gradients(theirs, tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=0, atol=1e-8)
    per_sample = torch.func.vmap(lambda *t: ours(*(x[None] for x in t), tensors[3])[0]) if not masked else None
    if per_sample:
        torch.testing.assert_close(per_sample(*tensors[:3]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_bias_in_parts(batch, monkeypatch):
    """Without gradients few tiles are held at a time."""
    monkeypatch.setattr(windows, "_NUMBERS_CPU", 1 << 12)
    tensors = inputs((23, 17), batch)
    bias = torch.randn(3, 5, 5, dtype=torch.float64)
    expected = references.neighborhood_attention(*tensors, (3, 3), None, bias)
    torch.testing.assert_close(neighborhood_attention(*tensors, 3, bias=bias), expected, rtol=0, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=2), st.integers(1, 9), st.integers(0, 2**31))
def test_any_grid_and_kernel(grid, kernel, seed):
    torch.manual_seed(seed)
    tensors = inputs(grid, batch=1, heads=1, width=2)
    expected = references.neighborhood_attention(*tensors, per_axis(kernel, grid))
    torch.testing.assert_close(neighborhood_attention(*tensors, kernel), expected, rtol=0, atol=1e-10)


def test_a_window_over_the_grid_is_global_attention():
    query, key, value = inputs((6, 5))
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*flat).transpose(1, 2).view_as(query)
    torch.testing.assert_close(neighborhood_attention(query, key, value, 99), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_keys_may_hold_anything(poison):
    query, key, value = inputs((9, 20))
    mask = torch.rand(2, 9, 20) > 0.4
    clean = neighborhood_attention(query, key, value, 5, mask)
    key[~mask], value[~mask] = poison, poison
    assert torch.equal(neighborhood_attention(query, key, value, 5, mask), clean)


def test_a_query_without_valid_keys_gives_zeros_and_finite_gradients():
    mask = torch.ones(2, 12, 20, dtype=torch.bool)
    mask[0, :, :10] = False
    mask[1] = False
    out, grads = gradients(neighborhood_attention, inputs((12, 20)), 3, mask)
    assert out[0, :, :9].abs().max() == 0
    assert out[1].abs().max() == 0
    assert out[0, :, 10:].abs().min() > 0
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_dropout_drops_weights():
    query, key, value = inputs((9, 20))
    value = torch.ones_like(value)
    dropped = neighborhood_attention(query, key, value, 5, dropout_p=0.5)
    assert dropped.std() > 0.01
    assert abs(dropped.mean() - 1) < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("scale", [1, 4])
def test_training_in_half_precision_is_as_exact_as_inference(dtype, tolerance, scale):
    query, key, value = (t.to(dtype) for t in inputs((12, 12), width=32))
    query, key = scale * query, scale * key
    expected = references.neighborhood_attention(*(t.double() for t in (query, key, value)), (5, 5))
    for grad in (False, True):
        out = neighborhood_attention(query.clone().requires_grad_(grad), key, value, 5)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    large = torch.full((1, 8, 1, 64), 100.0, dtype=dtype, requires_grad=True)
    assert torch.isfinite(neighborhood_attention(large, large, large, 3)).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_batch_may_be_dynamic_in_an_export(masked, biased):
    bias = torch.randn(3, 5, 5) if biased else None

    class Layer(torch.nn.Module):
        def forward(self, query, key, value, mask=None):
            return neighborhood_attention(query, key, value, 3, mask, bias=bias)

    def tensors(batch):
        mask = [torch.rand(batch, 9, 4) > 0.3] if masked else []
        return [*(t.float() for t in inputs((9, 4), batch)), *mask]

    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = [{0: batch}] * len(tensors(2)) + ([] if masked else [None])
    arguments = tuple(tensors(2)) + (() if masked else (None,))
    program = torch.export.export(Layer(), arguments, dynamic_shapes=tuple(shapes), strict=False).module()
    for count in (1, 5):
        given = tensors(count) + ([] if masked else [None])
        torch.testing.assert_close(program(*given), Layer()(*given), rtol=0, atol=1e-5)


def test_function_transforms():
    tensors = [t[0] for t in inputs((7, 5))]
    stacked = [torch.stack([t, 2 * t, -t])[:, None] for t in tensors]

    def loss(query, key, value):
        return neighborhood_attention(query, key, value, 3).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(*stacked)
    for i, grad in enumerate(per_sample):
        query, key, value = (t[i].clone().requires_grad_() for t in stacked)
        (expected,) = torch.autograd.grad(loss(query, key, value), query)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(("grid", "kernel"), [((14, 10), 7), ((6, 9), 3), ((5, 6, 7), 3)])
def test_agrees_with_natten(grid, kernel):
    natten = pytest.importorskip("natten")
    function = {2: natten.na2d, 3: natten.na3d}[len(grid)]
    query, key, value = (t.float() for t in inputs(grid, batch=1, width=32))
    expected = function(query, key, value, kernel_size=kernel)
    torch.testing.assert_close(neighborhood_attention(query, key, value, kernel), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 4, 5, 3, 4)}, "one shape"),
        ({"kernel_size": 0}, "kernel_size must be a positive"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be a positive number or 2"),
        ({"bias": torch.ones(3, 3, 3)}, r"bias must be \[3, 5, 5\].*got \[3, 3, 3\]"),
        ({"mask": torch.ones(2, 4, 4)}, "mask must be bool"),
        ({"mask": torch.ones(2, 4, 5, dtype=torch.bool)}, r"mask must be bool \[2, 4, 4\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, key, value = inputs((4, 4))
    arguments = {"query": query, "key": key, "value": value, "kernel_size": 3} | change
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


@pytest.mark.parametrize("grids", [[(6, 9), (8, 5)], [(4, 5, 6), (5, 3, 4)]])
@pytest.mark.parametrize("biased", [False, True])
def test_a_compiled_layer_takes_another_size(grids, biased):
    """The second size makes sizes symbolic: plans are constants of each program all the same."""
    torch._dynamo.reset()
    compiled = torch.compile(neighborhood_attention, fullgraph=True, backend="eager")
    bias = torch.randn(3, *[5] * len(grids[0]), dtype=torch.float64) if biased else None
    for grid in grids:
        tensors = inputs(grid)
        expected = neighborhood_attention(*tensors, 3, bias=bias)
        torch.testing.assert_close(compiled(*tensors, 3, bias=bias), expected, rtol=0, atol=1e-10)
