import pytest
import timm
import torch
from torch import nn

from rat_timm.cost import count_macs


def test_products_and_convolutions_are_counted():
    layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(20, 5), nn.LayerNorm(5))
    assert count_macs(layer, torch.empty(2, 3, 4, 5)) == 2 * (4 * 5 * 3 * 9 * 8 + 8 * 20 * 5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted_and_nothing_is_run(device):
    with torch.device(device):
        model = timm.create_model("vit_tiny_patch16_224").train()
    macs = count_macs(model, torch.full((1, 3, 224, 224), torch.nan))
    assert macs == pytest.approx(1.26e9, rel=0.01)  # timm's own figure, with attention
    assert model.training
    assert next(model.parameters()).device.type == device


def test_a_pyramid_costs_more_than_its_first_level():
    model = timm.create_model("test_rat")
    levels = [torch.empty(1, 3, 64, 64), torch.empty(1, 3, 32, 32)]
    assert count_macs(model, levels) > count_macs(model, levels[0])
