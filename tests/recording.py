"""What reached a model: the images on their grids, as the stem is given them."""

import pytest

from rat_timm.models.rat import model as rat_model


def record_images(monkeypatch: pytest.MonkeyPatch) -> list:
    """Returns a list to which each run of a hierarchical RAT adds its images."""
    seen: list = []
    stage_inputs = rat_model.stage_inputs

    def record(cfg, images):
        seen.append(images)
        return stage_inputs(cfg, images)

    monkeypatch.setattr(rat_model, "stage_inputs", record)
    return seen
