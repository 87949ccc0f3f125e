import pytest
import torch

from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.models.rope_vit.sequence import PyramidSequence
from rat_timm.models.vit.sequence import attention_mask, pool_valid


def test_samples_without_valid_tokens_may_look_anywhere():
    valid = torch.tensor([[True, False], [False, False]])
    assert attention_mask(valid, 0)[:, 0, 0].tolist() == [[True, False], [True, True]]
    assert attention_mask(valid, 1)[:, 0, 0].tolist() == [[True, True, False], [True, False, False]]


def test_a_sequence_splits_into_its_levels():
    levels = [Tokens(torch.randn(2, *shape, 3), Grid.create(shape)) for shape in ((2, 3), (1, 2))]
    levels[1] = levels[1]._replace(mask=torch.tensor([[[True, False]], [[True, True]]]))
    x = torch.cat([torch.randn(2, 4, 3), *(level.x.flatten(1, 2) for level in levels)], dim=1)
    sequence = PyramidSequence(x, 4, torch.empty(0), levels, single=False)
    first, second = sequence.split(x)
    assert torch.equal(first, levels[0].x)
    assert torch.equal(second, levels[1].filled())
    assert sequence.valid.sum(1).tolist() == [7, 8]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooling_sees_valid_patches_only(pool):
    patches, valid = torch.randn(3, 5, 2) - 3, torch.rand(3, 5) > 0.5
    valid[1], valid[0, 0] = False, True
    pooled = pool_valid(patches * valid[..., None], valid, pool)
    kept = patches[0][valid[0]]
    parts = {"avg": kept.mean(0), "max": kept.amax(0), "avgmax": (kept.mean(0) + kept.amax(0)) / 2}
    torch.testing.assert_close(pooled[0], parts[pool])
    assert pooled[1].abs().max() == 0
