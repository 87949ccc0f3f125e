import itertools
import math

import pytest
import torch
from monai.metrics.panoptic_quality import compute_panoptic_quality

from rat_timm.dense import THRESHOLDS, Matches, match_instances
from test_instances import blobs


def pairs_of(predicted, true, threshold):
    """All pairings of few objects, one by one: the most pairs, then the largest sum of IoU."""
    sets = [
        [{tuple(p) for p in (labels == i).nonzero().tolist()} for i in labels.unique() if i]
        for labels in (predicted, true)
    ]
    few, many = sorted(sets, key=len)
    best = (0, 0.0)
    for chosen in itertools.permutations(many, len(few)):
        ious = [len(a & b) / len(a | b) for a, b in zip(few, chosen, strict=True)]
        ious = [iou for iou in ious if iou >= threshold]
        best = max(best, (len(ious), sum(ious)))
    return best, len(sets[0]), len(sets[1])


@pytest.mark.parametrize("size", [(12, 15), (6, 7, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_matches_are_the_best_of_all_pairings(size, seed):
    thresholds = (0.05, 0.2, 0.5, 0.7, 1.0)
    true, predicted = blobs(size, 5, seed), 3 * blobs(size, 4 + seed % 3, seed + (seed > 1))
    predicted[3:] = true[3:]
    found = match_instances(predicted, true, thresholds)
    for t, threshold in enumerate(thresholds):
        (count, iou), of_predicted, of_true = pairs_of(predicted, true, threshold)
        assert int(found.true_positives[t]) == count
        assert int(found.false_positives[t]) == of_predicted - count
        assert int(found.false_negatives[t]) == of_true - count
        assert float(found.iou[t]) == pytest.approx(iou)
        precision = count / (of_predicted + of_true - count)
        assert float(found.average_precision[t]) == pytest.approx(precision)
        quality = iou / (count + (of_predicted - count + of_true - count) / 2)
        assert float(found.panoptic_quality[t]) == pytest.approx(quality)


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_monais(seed):
    true, predicted = blobs((40, 50), 12, seed), blobs((40, 50), 12, seed)
    predicted = torch.roll(predicted, 2, 0)
    found = match_instances(predicted, true)
    assert found.thresholds.tolist() == list(THRESHOLDS)
    for t, threshold in enumerate(THRESHOLDS):
        options = {"match_iou_threshold": threshold - 1e-6, "smooth_numerator": 0.0}  # MONAI's must be exceeded
        quality = compute_panoptic_quality(predicted, true, **options)
        counts = compute_panoptic_quality(predicted, true, **options, output_confusion_matrix=True)
        expected = [found.true_positives[t], found.false_positives[t], found.false_negatives[t], found.iou[t]]
        torch.testing.assert_close(torch.stack([e.double() for e in expected]), counts.double(), rtol=1e-5, atol=1e-5)
        assert float(found.panoptic_quality[t]) == pytest.approx(float(quality), rel=1e-5)


def test_more_pairs_are_better_than_one_good_pair():
    true = torch.tensor([1] * 10 + [2] * 10)
    predicted = torch.tensor([1] * 4 + [2] * 6 + [2] * 4 + [3] * 6)
    found = match_instances(predicted, true, (0.3, 0.45))
    assert found.true_positives.tolist() == [2, 1]


def test_counts_of_images_are_added():
    images = [(blobs((20, 20), 5, seed), blobs((20, 20), 5, seed + 1)) for seed in range(3)]
    total = sum((match_instances(*image) for image in images[1:]), match_instances(*images[0]))
    assert isinstance(total, Matches)
    assert total.true_positives.tolist() == sum(match_instances(*image).true_positives for image in images).tolist()
    with pytest.raises(ValueError, match="same thresholds"):
        _ = total + match_instances(*images[0], thresholds=(0.5,))


def test_empty_images_are_right_and_missing_objects_are_wrong():
    nothing, one = torch.zeros(4, 4).int(), torch.ones(4, 4).int()
    for predicted, true, expected in ((nothing, nothing, 1), (one, nothing, 0), (nothing, one, 0), (one, one, 1)):
        found = match_instances(predicted, true)
        assert set(found.average_precision.tolist()) == set(found.panoptic_quality.tolist()) == {expected}


def test_masked_places_do_not_count():
    true, predicted = torch.tensor([[1, 1, 0, 2]]), torch.tensor([[1, 1, 5, 0]])
    mask = torch.tensor([[True, True, False, False]])
    assert match_instances(predicted, true, mask=mask).average_precision.tolist() == [1.0] * 10
    assert match_instances(predicted, torch.where(mask, true, -1)).average_precision.tolist() == [1.0] * 10
    assert math.isclose(float(match_instances(predicted, true).average_precision[0]), 1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3).int(), torch.zeros(4).int()), "predicted must be"),
        ((torch.zeros(4).int(), torch.zeros(4)), "true must be"),
        ((-torch.ones(4).int(), torch.zeros(4).int()), "predicted must not be negative"),
        ((torch.zeros(4).int(), torch.zeros(4).int(), ()), "thresholds must be"),
        ((torch.zeros(4).int(), torch.zeros(4).int(), (0.0,)), "thresholds must be"),
        ((torch.zeros(4).int(), torch.zeros(4).int(), (0.5,), torch.ones(4)), "mask must be"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        match_instances(*arguments)
