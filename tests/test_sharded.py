"""Sharded over processes whose batches have other numbers of pixel sizes, models give what they give in one process."""

import pytest
import timm
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import together
from rat_timm.adapters import WithGeometry
from rat_timm.dense import Segmenter
from rat_timm.layers.sharded import run_parts, tie

SPACINGS = ([[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [0.5, 2.0]])  # one part, and two


def create(kind):
    torch.manual_seed(0)
    small = {"embed_dim": 32, "depths": (1, 1), "num_classes": 3}
    if kind == "segmenter":
        return Segmenter("test_rat", width=16, **small)
    if kind == "adapter":
        return WithGeometry(Enlarged(timm.create_model("test_rat", features_only=True, out_indices=(0,), **small)))
    return timm.create_model("test_rat", **small)


class Enlarged(torch.nn.Module):
    """The first map of a backbone, as large as the image, as networks around a backbone give."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return torch.nn.functional.interpolate(self.backbone(x)[0], x.shape[2:])


def batch(place):
    torch.manual_seed(1 + place)
    return torch.randn(2, 3, 24, 20), torch.tensor(SPACINGS[place])


KINDS = ("classifier", "segmenter", "adapter")


def work(place, folder):
    for kind in KINDS:
        torch.save(sharded(place, kind), folder / f"{kind}-{place}.pt")


def sharded(place, kind):
    """What a process gets: its outputs, and the gradients, which are those of both."""
    model = create(kind).train()
    for module in model.modules():
        if module.__class__.__name__ == "Block":
            fully_shard(module)
    fully_shard(model)
    x, spacing = batch(place)
    out = model(x, spacing=spacing)
    out.square().mean().backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(x, spacing=spacing), out, rtol=1e-5, atol=1e-6)
    return out.detach(), grads


def test_other_numbers_of_parts_per_process(tmp_path):
    together(work, tmp_path)
    for kind in KINDS:
        model = create(kind).train()
        for place in range(2):
            x, spacing = batch(place)
            out = model(x, spacing=spacing)
            (out.square().mean() / 2).backward()  # processes average
            there, grads = torch.load(tmp_path / f"{kind}-{place}.pt")
            torch.testing.assert_close(there, out.detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_in_one_process_each_part_passes_once():
    module, seen = torch.nn.Linear(2, 2), []
    assert run_parts(module, lambda part: seen.append(part) or part, [3, 4], lambda a, b: pytest.fail("tied")) == [3, 4]
    assert seen == [3, 4]


def test_tied_results_change_nothing():
    x, other = torch.randn(3), torch.randn(3, requires_grad=True)
    assert torch.equal(tie(x, other), x)
    tie(x, other).sum().backward()
    assert torch.equal(other.grad, torch.zeros(3))
