import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import rat_timm
import references
from rat_timm.layers import neighborhood_attention
from rat_timm.ops import neighborhood


@pytest.fixture(autouse=True)
def _restore():
    yield
    rat_timm.set_attention_backend("auto")


def inputs(grid, width=16):
    return [torch.randn(2, *grid, 2, width) for _ in range(3)]


def test_an_unknown_backend_is_named():
    names = re.escape(str(("auto", *neighborhood.BACKENDS)))
    with pytest.raises(ValueError, match=f"name must be one of {names}, got 'cuda'"):
        rat_timm.set_attention_backend("cuda")
    assert rat_timm.attention_backend() == "auto"


@pytest.mark.slow
def test_the_environment_variable_chooses():
    code = """
        import os
        try:
            import rat_timm
        except ValueError as error:
            print(error)
        os.environ["RAT_TIMM_ATTENTION"] = "flex"
        import rat_timm
        print(rat_timm.attention_backend())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=os.environ | {"RAT_TIMM_ATTENTION": "fast"}, capture_output=True, text=True)
    error, chosen = done.stdout.splitlines()
    assert error.startswith("RAT_TIMM_ATTENTION must be one of")
    assert chosen == "flex"


@pytest.mark.parametrize("grid", [(9, 12), (4, 5, 6)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", neighborhood.BACKENDS)
def test_backends_agree(backend, masked, biased, grid, monkeypatch):
    """Without compilation, which changes how FlexAttention is run and not what it is told; see the next test."""
    monkeypatch.setattr(neighborhood.flex, "_compiled_flex_attention", lambda: neighborhood.flex.flex_attention)
    tensors, mask = inputs(grid), torch.rand(2, *grid) > 0.5 if masked else None
    if masked:
        mask[1] = False
    kernel = (3, 5, 3)[: len(grid)]
    bias = torch.randn(2, *(2 * k - 1 for k in kernel)) if biased else None
    obstacle = neighborhood.BACKENDS[backend].obstacle(neighborhood.Call(*tensors, kernel, mask, 0.0, bias))
    if obstacle and backend not in ("torch", "flex"):  # which run everywhere
        pytest.skip(obstacle)
    expected = references.neighborhood_attention(
        *(t.double() for t in tensors), kernel, mask, None if bias is None else bias.double()
    )
    rat_timm.set_attention_backend(backend)
    out = neighborhood_attention(*tensors, kernel, mask, bias=bias)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_is_compiled():
    torch._dynamo.reset()
    tensors = inputs((9, 12))
    expected = neighborhood_attention(*tensors, 3)
    rat_timm.set_attention_backend("flex")
    torch.testing.assert_close(neighborhood_attention(*tensors, 3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ("flex", {"dropout_p": 0.1}, "it has no dropout"),
        ("flex", {"grad": 0}, "it has no gradient on the CPU"),
        ("flex", {"grad": 1}, "it has no gradient on the CPU"),
        ("natten", {"mask": torch.ones(2, 9, 12, dtype=torch.bool)}, "it has no masks"),
        ("natten", {"dropout_p": 0.1}, "it has no dropout"),
        ("natten", {"bias": torch.ones(2, 5, 5)}, "it has no bias per relative position"),
        ("natten", {"kernel_size": (1, 3)}, "it needs windows and axes longer than 1"),
    ],
)
def test_what_cannot_run_says_why(backend, change, reason):
    if backend == "natten":
        pytest.importorskip("natten")
    query, key, value = tensors = inputs((9, 12))
    change = dict(change)
    if "grad" in change:
        tensors[change.pop("grad")].requires_grad_()
    rat_timm.set_attention_backend(backend)
    with pytest.raises(ValueError, match=f"'{backend}' cannot run here: {reason}.*RAT_TIMM_ATTENTION"):
        neighborhood_attention(query, key, value, **({"kernel_size": 3} | change))


def test_natten_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(neighborhood.backend, "is_installed", lambda name: False)
    rat_timm.set_attention_backend("natten")
    with pytest.raises(ValueError, match=r"natten is not installed: pip install 'rat-timm\[natten\]'"):
        neighborhood_attention(*inputs((9, 12)), 3)


def test_a_backend_is_one_line_of_the_table(monkeypatch):
    """Another one can be chosen by name, says what it cannot do, and is asked by "auto" in the table's order."""
    ones = neighborhood.Backend(
        attend=lambda call: torch.ones_like(call.query),
        obstacle=lambda call: "it has no masks" if call.mask is not None else None,
        best_on=("cpu",),
    )
    monkeypatch.setattr(neighborhood, "BACKENDS", {"ones": ones, **neighborhood.BACKENDS})
    tensors, mask = inputs((9, 12)), torch.ones(2, 9, 12, dtype=torch.bool)
    assert neighborhood_attention(*tensors, 3).unique().tolist() == [1]
    assert len(neighborhood_attention(*tensors, 3, mask).unique()) > 1
    rat_timm.set_attention_backend("ones")
    with pytest.raises(ValueError, match="'ones' cannot run here: it has no masks"):
        neighborhood_attention(*tensors, 3, mask)
