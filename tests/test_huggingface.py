import numpy as np
import pytest
import timm
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch.utils.data import Dataset
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TimmBackbone,
    Trainer,
    TrainingArguments,
    pipeline,
)

from helpers import record_images
from rat_timm import hub
from rat_timm.huggingface import (
    RatBackbone,
    RatBackboneConfig,
    RatForImageClassification,
    RatImageProcessor,
    RatPipeline,
)
from rat_timm.huggingface_training import GeometryCheck, RatTrainer

SIZES = {"test_rat": (3, 20, 24), "test_rat_3d": (1, 6, 10, 12)}


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
    return hub.save(timm.create_model("test_rat", num_classes=2, physical_stem=False), tmp_path / "model")


@pytest.fixture(params=SIZES)
def saved(request, tmp_path):
    """A saved model and random pixels of its channels, of values that are whole numbers."""
    stated = {"mean": [0.3] * SIZES[request.param][0], "std": [0.2] * SIZES[request.param][0]}
    folder = hub.save(
        timm.create_model(request.param, num_classes=2, spacing=0.5), tmp_path / "model", data_config=stated
    )
    return folder, np.random.default_rng(0).integers(0, 256, SIZES[request.param], dtype=np.uint8)


def train(model, folder, monkeypatch, **more):
    """Runs one step of Trainer; returns the images that the model read."""
    seen = record_images(monkeypatch)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", **more
    )
    Trainer(model, arguments, train_dataset=Rows()).train()
    (image,) = seen[0].levels
    return image


@pytest.mark.parametrize(
    ("model_class", "more"),
    [(RatForImageClassification, {}), (AutoModelForImageClassification, {"remove_unused_columns": False})],
)
def test_trainer_keeps_the_geometry(folder, tmp_path, monkeypatch, model_class, more):
    image = train(model_class.from_pretrained(folder), tmp_path / "out", monkeypatch, **more)
    assert image.grid.spacing.tolist() == [[0.5, 2.0]] * 2
    assert image.mask.all()


@pytest.mark.parametrize("model_class", [RatForImageClassification, AutoModelForImageClassification])
def test_our_trainer_keeps_the_geometry_of_any_model(model_class, folder, tmp_path, monkeypatch):
    model = model_class.from_pretrained(folder)
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = RatTrainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    seen = record_images(monkeypatch)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    logits = trainer.predict(Rows()).predictions
    assert all(image.levels[0].grid.spacing.unique(dim=0).tolist() == [[0.5, 2.0]] for image in seen)
    assert all(image.levels[0].mask.all() for image in seen)
    rows = [Rows()[index] for index in range(4)]
    x, labels = torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    expected = model.timm_model.eval()(x, spacing=[0.5, 2.0], mask=torch.ones(4, 32, 32, dtype=torch.bool)).detach()
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(expected, labels)), rel=1e-4)


def test_a_check_warns_of_columns_that_trainer_drops(folder, tmp_path, recwarn):
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    for model_class, warned in ((RatForImageClassification, 0), (AutoModelForImageClassification, 1)):
        model = model_class.from_pretrained(folder)
        Trainer(model, arguments, train_dataset=Rows(), callbacks=[GeometryCheck()]).train()
        told = [str(each.message) for each in recwarn if "Trainer drops the columns" in str(each.message)]
        assert len(told) == warned
    assert "['spacing', 'mask'], which TimmWrapperForImageClassification.forward does not name" in told[0]


def test_trainer_drops_what_transformers_class_does_not_name(folder, tmp_path, monkeypatch):
    """Why `RatForImageClassification` exists: should this fail, it may go."""
    image = train(AutoModelForImageClassification.from_pretrained(folder), tmp_path / "out", monkeypatch)
    assert image.grid.spacing.unique().tolist() == [1.0]
    assert image.mask is None


def expected_pixels(image):
    return torch.from_numpy(((image / 255 - 0.3) / 0.2).astype(np.float32))


def test_the_processor_normalizes_and_carries_the_spacing(saved):
    folder, image = saved
    axes = image.ndim - 1
    processor = RatImageProcessor.from_pretrained(folder)
    for spacing, rows in ((0.25, [[0.25] * axes]), ([1.0, 2.0, 3.0][:axes], [[1.0, 2.0, 3.0][:axes]])):
        features = processor(image, spacing=spacing)
        assert sorted(features) == ["pixel_values", "spacing"]
        torch.testing.assert_close(features["pixel_values"], expected_pixels(image)[None])
        assert features["spacing"].tolist() == rows
    assert list(processor(image)) == ["pixel_values"]
    torch.testing.assert_close(
        processor(torch.from_numpy(image / 255).float())["pixel_values"], expected_pixels(image)[None]
    )


def test_images_of_different_sizes_keep_their_own_geometry(saved):
    folder, image = saved
    processor, model = RatImageProcessor.from_pretrained(folder), RatForImageClassification.from_pretrained(folder)
    smaller = image[..., :-4]
    spacing = [[0.5] * (image.ndim - 1), [0.25] * (image.ndim - 1)]
    features = processor([image, smaller], spacing=spacing)
    assert features["spacing"].tolist() == spacing
    assert features["mask"][0].all()
    assert torch.equal(features["mask"][1], torch.arange(image.shape[-1]).expand(image.shape[1:]) < image.shape[-1] - 4)
    torch.testing.assert_close(features["pixel_values"][1, ..., :-4], expected_pixels(smaller))
    logits = model.eval()(**features).logits
    torch.testing.assert_close(logits[:1], model(**processor(image, spacing=spacing[0])).logits)


def test_a_pipeline_carries_the_spacing(saved):
    folder, image = saved
    model = RatForImageClassification.from_pretrained(folder)
    # larger logits would show in their scores that pixels are rounded to float32
    torch.nn.init.normal_(model.timm_model.get_classifier().weight, std=0.1)
    processor = RatImageProcessor(RatImageProcessor.from_pretrained(folder).pretrained_cfg, spacing=0.2)
    scores = pipeline("image-classification", model=model, image_processor=processor)
    logits = model.timm_model.eval()(expected_pixels(image)[None], spacing=0.2)
    expected = logits.softmax(-1)[0].sort(descending=True).values.tolist()
    takes_arrays = Version(transformers.__version__) >= Version("5.13")  # its own pipelines; `RatPipeline` always
    given = [image, torch.from_numpy(image)] if takes_arrays else []
    if len(image) == 3:
        given.append(Image.fromarray(image.transpose(1, 2, 0)))
    for one in given:
        assert [row["score"] for row in scores(one)] == pytest.approx(expected, rel=1e-5)


def test_a_pipelines_call_takes_the_spacing(saved):
    folder, image = saved
    model = RatForImageClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.timm_model.get_classifier().weight)
    processor = RatImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=model, image_processor=processor, pipeline_class=RatPipeline)
    sharp = [0.2, 0.3, 0.4][: image.ndim - 1]
    for given in ({}, {"spacing": 0.25}, {"spacing": sharp, "top_k": 1}):
        told = {name: value for name, value in given.items() if name == "spacing"}
        scores = model.timm_model.eval()(expected_pixels(image)[None], **told).softmax(-1)[0]
        expected = scores.sort(descending=True).values.tolist()[: given.get("top_k", 2)]
        assert [row["score"] for row in classify(image, **given)] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_pipeline_of_ours_does_not_list_all_others(folder, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.pipelines.base.logger.error", said.append)
    model, processor = RatForImageClassification.from_pretrained(folder), RatImageProcessor.from_pretrained(folder)
    pipeline("image-classification", model=model, image_processor=processor, pipeline_class=RatPipeline)
    assert said == []


def test_a_pipeline_in_half_precision_keeps_the_spacing_exact(folder, monkeypatch):
    seen = record_images(monkeypatch)
    model = RatForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    processor = RatImageProcessor.from_pretrained(folder)
    classify = pipeline("image-classification", model=model, image_processor=processor, pipeline_class=RatPipeline)
    classify(torch.rand(3, 32, 32), spacing=0.1234567)
    image = seen[-1].levels[0]
    assert image.x.dtype == torch.bfloat16
    assert image.grid.spacing.flatten().tolist() == pytest.approx([0.1234567] * 2, rel=1e-6)


def test_transformers_finds_the_processor_of_volumes(tmp_path):
    hub.save(timm.create_model("test_rat_3d"), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, RatImageProcessor)
    assert processor(torch.zeros(4, 6, 8))["pixel_values"].shape == (1, 1, 4, 6, 8)
    RatForImageClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path / "again"), RatImageProcessor)


def test_what_a_processor_cannot_take_is_an_error(saved):
    folder, image = saved
    processor = RatImageProcessor.from_pretrained(folder)
    for wrong in (image[None, None], image[0, 0], np.concatenate([image, image])):
        with pytest.raises(ValueError, match="images must be"):
            processor(wrong)
    with pytest.raises(ValueError, match="spacing must be"):
        processor(image, spacing=[1.0] * 5)
    with pytest.raises(ValueError, match="return_tensors must be 'pt'"):
        processor(image, return_tensors="np")
    with pytest.raises(ValueError, match="pretrained_cfg must have"):
        RatImageProcessor()


def test_transformers_backbone_opens_folders(tmp_path):
    hub.save(timm.create_model("test_rat", spacing=0.5, iters=1), tmp_path)
    backbone = TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", out_indices=[1, 3]).eval()
    assert backbone._backbone.model.reference_spacing == (0.5, 0.5)
    maps = backbone(torch.randn(1, 3, 64, 64), spacing=1.0).feature_maps
    assert [m.shape[1] for m in maps] == [64, 128]


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


@pytest.mark.parametrize("name", SIZES)
def test_backbones_open_saved_folders(name, tmp_path):
    model = timm.create_model(name, num_classes=3, spacing=0.5, iters=1).eval()
    hub.save(model, tmp_path / "hub")
    x = torch.randn(1, SIZES[name][0], *[32] * (len(SIZES[name]) - 1))
    expected = [model.forward_intermediates(x, [1, 3], intermediates_only=True, spacing=0.25)]
    for folder in (tmp_path / "hub", f"local-dir:{tmp_path / 'hub'}"):
        backbone = RatBackbone.from_pretrained(folder, out_indices=[1, 3])
        expected.append(backbone(x, spacing=0.25).feature_maps)
    backbone.save_pretrained(tmp_path / "own")
    expected.append(RatBackbone.from_pretrained(tmp_path / "own").eval()(x, spacing=0.25).feature_maps)
    for maps in expected[1:]:
        for one, other in zip(expected[0], maps, strict=True):
            torch.testing.assert_close(one, other)


def test_transformers_auto_class_opens_no_folders(tmp_path):
    """Why ``RatBackbone.from_pretrained`` opens them: should this fail, it may go."""
    RatBackbone(RatBackboneConfig(backbone="test_rat")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Repo id must"):
        AutoBackbone.from_pretrained(str(tmp_path))
