import pytest
import torch

from rat_timm.layers.head import average
from rat_timm.models.rat.stage import Head


def test_average_over_valid_places_of_all_levels():
    features = [torch.randn(2, 4, 5, 3), torch.randn(2, 2, 2, 3)]
    masks = [torch.rand(2, 4, 5) > 0.5, None]
    masks[0][1] = False
    expected = [torch.cat([features[0][b][masks[0][b]], features[1][b].flatten(0, 1)]).mean(0) for b in range(2)]
    torch.testing.assert_close(average(features, masks), torch.stack(expected))


def test_no_valid_place_gives_zeros():
    assert average([torch.randn(1, 4, 5, 3)], [torch.zeros(1, 4, 5, dtype=torch.bool)]).abs().max() == 0


def test_full_masks_are_no_masks():
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(average([x], [torch.ones(2, 4, 5, dtype=torch.bool)]), average([x], [None]))


def test_pools():
    x, prefix = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 6)
    mask = torch.rand(2, 4, 5) > 0.5
    head = Head(6, 7, "token")
    torch.testing.assert_close(head([x], [None], prefix), head.fc(prefix[:, 0]))
    assert torch.equal(head(x, prefix=prefix, pre_logits=True), prefix[:, 0])
    with pytest.raises(ValueError, match="needs prefix tokens"):
        head(x)
    head = Head(6, 7, "")
    torch.nn.init.ones_(head.fc.bias)
    (maps,) = head([x], [mask])
    torch.testing.assert_close(maps.movedim(1, -1)[mask], head.fc(x.movedim(1, -1)[mask]))
    assert maps.movedim(1, -1)[~mask].abs().max() == 0
    assert head(x).shape == (2, 7, 4, 5)


def test_wrong_masks_are_named():
    head, x = Head(6, 7), torch.randn(2, 6, 4, 5)
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 4, 5\]"):
        head(x, [torch.ones(2, 16, 20, dtype=torch.bool)])
    with pytest.raises(ValueError, match="mask of level 1 must be bool"):
        head([x, x], [None, torch.ones(2, 4, 5)])
    with pytest.raises(ValueError, match=r"one entry per map \(2\), got 1"):
        head([x, x], [torch.ones(2, 4, 5, dtype=torch.bool)])
