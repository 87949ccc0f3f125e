import pytest
import timm
import torch
from torch.utils.data import Dataset
from transformers import AutoBackbone, AutoConfig, Trainer, TrainingArguments

from rat_timm import hub
from rat_timm.huggingface import RatBackbone, RatBackboneConfig, RatForImageClassification
from recording import record_images


class Rows(Dataset):
    """A data set with columns, as Trainer looks for them."""

    column_names = ("pixel_values", "labels", "spacing", "mask")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {
            "pixel_values": torch.full((3, 32, 32), float(index)),
            "labels": index % 2,
            "spacing": torch.tensor([0.5, 2.0]),
            "mask": torch.ones(32, 32, dtype=torch.bool),
        }


@pytest.fixture
def folder(tmp_path):
    return hub.save(timm.create_model("test_rat", num_classes=2), tmp_path / "model")


def test_trainer_keeps_the_geometry(folder, tmp_path, monkeypatch):
    model, seen = RatForImageClassification.from_pretrained(folder), record_images(monkeypatch)
    arguments = TrainingArguments(
        tmp_path / "out", per_device_train_batch_size=2, max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer._set_signature_columns_if_needed()
    assert {"spacing", "mask", "origin"} <= set(trainer._signature_columns)
    trainer.train()
    (image,) = seen[0].levels
    assert image.grid.spacing.tolist() == [[0.5, 2.0]] * 2
    assert image.mask.all()


def test_the_classifier_gives_what_the_model_gives(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    wrapped = RatForImageClassification.from_pretrained(folder).eval()
    x, mask = torch.randn(2, 3, 32, 40), torch.rand(2, 32, 40) < 0.5
    out = wrapped(x, spacing=2.0, mask=mask, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(out.logits, model(x, spacing=2.0, mask=mask))
    assert out.loss.isfinite()


def test_a_backbones_config_keeps_its_keywords(tmp_path):
    config = RatBackboneConfig(
        backbone="test_rat", num_channels=1, out_indices=[1, 3], model_args={"spacing": 0.5, "physical_stem": True}
    )
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, RatBackbone)
    backbone.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_args == config.model_args
    again = RatBackbone.from_pretrained(tmp_path).eval()
    assert again._backbone.model.reference_spacing == (0.5, 0.5)
    x = torch.randn(1, 1, 32, 40)
    for call in (backbone, again):
        assert [tuple(m.shape) for m in call(x, spacing=0.25).feature_maps] == [(1, 64, 2, 3), (1, 128, 1, 1)]
    for a, b in zip(backbone(x).feature_maps, again(x).feature_maps, strict=True):
        torch.testing.assert_close(a, b)
