import json
import warnings

import pytest
import timm
import torch

import rat_timm
from helpers import lively
from rat_timm import Grid, RatVit, ResolutionAwareTransformer
from rat_timm.dense import Segmenter, at_grid
from rat_timm.geometry.grid import channels_first, channels_last
from rat_timm.geometry.parts import parts_at_reference
from rat_timm.geometry.read import Told, read_images
from rat_timm.timm_api.checkpoints import write
from studies.layouts import FORMER

SIZES = {"test_rat": (3, 45, 62), "test_rat_3d": (1, 11, 33, 18)}
VIT = "rat_eva02_tiny_patch14_224"
SMALL_VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 56}
NAMES = [*SIZES, VIT]
KINDS = [(name, decoder) for name in SIZES for decoder in ("groups", "fpn")] + [(VIT, "fpn")]


def segmenter(name, decoder="fpn", num_classes=3, **kwargs):
    kwargs = {**(SMALL_VIT if name == VIT else {}), **kwargs}
    model = lively(Segmenter(name, num_classes, decoder, width=32, **kwargs)).eval()
    torch.nn.init.normal_(model.classifier.bias)  # what is zero is zero on purpose
    return model


def image_of(name, batch=1):
    return torch.randn(batch, *SIZES.get(name, (3, 45, 62)))


def mask_of(x):
    mask = torch.rand(len(x), *x.shape[2:]) > 0.3
    mask[:, : x.shape[2] // 3] = False
    return mask


def steps(name, first=0.7):
    """A spacing of its own along each axis."""
    return tuple(first + 0.3 * i for i in range(len(SIZES.get(name, (3, 45, 62))) - 1))


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("spacing", [None, 1.0, 0.77, 1.9])
@torch.no_grad()
def test_every_pixel_gets_logits(name, decoder, detail, spacing):
    model, x = segmenter(name, decoder, detail=detail), image_of(name)
    logits = model(x, spacing=spacing)
    assert logits.shape == (1, 3, *x.shape[2:])
    assert (logits != 0).all()  # at the far ends too, where maps end before the image does


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@torch.no_grad()
def test_masked_pixels_change_no_bit(name, decoder, detail, told, poison):
    model, x = segmenter(name, decoder, detail=detail), image_of(name, 2)
    mask, spacing = mask_of(x), steps(name) if told else None
    clean = model(x, mask=mask, spacing=spacing)
    assert torch.equal(model(torch.where(mask[:, None], x, poison), mask=mask, spacing=spacing), clean)
    assert clean.isfinite().all()
    assert ((clean != 0).all(1) == mask).all()
    features = model.forward_features(torch.where(mask[:, None], x, poison), mask=mask, spacing=spacing)
    assert features.x.isfinite().all()
    assert (features.x[~features.mask] == 0).all()


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_a_batch_gives_what_its_items_give(name, decoder, masked):
    model, x = segmenter(name, decoder), image_of(name, 3)
    mask = mask_of(x) if masked else None
    if masked:
        mask[1] = True
    spacing = torch.tensor([steps(name, first) for first in (0.5, 1.3, 0.5)])
    origin = torch.randn_like(spacing)
    batch = model(x, spacing=spacing, mask=mask, origin=origin)
    for i in range(3):
        one = None if mask is None else mask[i : i + 1]
        alone = model(x[i : i + 1], spacing=spacing[i], mask=one, origin=origin[i])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("spacing", [None, 0.8])
@torch.no_grad()
def test_a_pyramid_of_one_is_the_image(name, decoder, spacing):
    model, x = segmenter(name, decoder), image_of(name)
    mask = mask_of(x)
    expected = model(x, spacing=spacing, mask=mask)
    assert torch.equal(model([x], spacing=None if spacing is None else [spacing], mask=[mask]), expected)


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@torch.no_grad()
def test_other_levels_are_context(name, decoder):
    model, x = segmenter(name, decoder), image_of(name)
    overview, spacing = torch.randn_like(x), steps(name)
    wide = tuple(4 * s for s in spacing)
    origin = [tuple(s / 2 for s in spacing), tuple(-9.0 * s for s in spacing)]
    logits = model([x, overview], spacing=[spacing, wide], origin=origin)
    assert logits.shape == (1, 3, *x.shape[2:])
    other = model([x, overview + torch.randn_like(x)], spacing=[spacing, wide], origin=origin)
    assert (logits - other).abs().amax() > 1e-6
    masks = [None, torch.zeros(1, *x.shape[2:], dtype=torch.bool)]
    dirty = [
        model([x, o], spacing=[spacing, wide], origin=origin, mask=masks) for o in (overview, overview * torch.nan)
    ]
    assert torch.equal(*dirty)


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("told", [False, True])
@torch.no_grad()
def test_the_native_grid_asked_for_is_the_default(name, decoder, detail, told):
    model, x = segmenter(name, decoder, detail=detail), image_of(name)
    mask, spacing = mask_of(x), steps(name) if told else model.reference_spacing
    expected = model(x, spacing=spacing, mask=mask)
    for out in (spacing, list(spacing), torch.tensor(spacing), Grid.create(x.shape[2:], spacing)):
        torch.testing.assert_close(model(x, spacing=spacing, mask=mask, out=out), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@torch.no_grad()
def test_an_isotropic_grid_agrees_where_centres_coincide(name, decoder):
    model, x = segmenter(name, decoder), image_of(name)
    axes = x.ndim - 2
    spacing, origin = (1.5, *[0.5] * (axes - 1)), (2.0, *[-1.0] * (axes - 1))
    grid = Grid.create((3 * x.shape[2] - 2, *x.shape[3:]), 0.5, origin)
    mask = mask_of(x)
    native = model(x, spacing=spacing, origin=origin, mask=mask)
    isotropic = model(x, spacing=spacing, origin=origin, mask=mask, out=grid)
    assert isotropic.shape == (1, 3, *grid.shape)
    torch.testing.assert_close(isotropic[:, :, ::3], native, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_pixel_size_asked_for_covers_the_field_of_view(name):
    model, x = segmenter(name), image_of(name, 2)
    axes = x.ndim - 2
    for out, shape in ((0.5, [2 * n for n in x.shape[2:]]), (2.0, [n // 2 + n % 2 for n in x.shape[2:]])):
        logits = model(x, out=out)
        assert list(logits.shape) == [2, 3, *shape]
        assert (logits != 0).all()
    rows = torch.tensor([[0.5] * axes, [1.0] * axes])  # of samples of two extents the larger, the other's end is zero
    logits = model(x, spacing=rows, out=0.5)
    assert list(logits.shape) == [2, 3, *(2 * n for n in x.shape[2:])]
    inside = (0, slice(None), *(slice(n) for n in x.shape[2:]))
    assert (logits[inside] != 0).all()
    assert (logits[1] != 0).all()
    outside = logits.clone()
    outside[inside] = 0
    assert (outside[0] == 0).all()


@torch.no_grad()
def test_places_outside_are_zero():
    model, x = segmenter("test_rat"), image_of("test_rat")
    logits = model(x, out=Grid.create((60, 80), 1.0, (-5.5, 10.5)))
    valid = torch.zeros(60, 80, dtype=torch.bool)
    valid[6:51, :52] = True
    assert ((logits[0] != 0).all(0) == valid).all()
    assert ((logits[0] != 0).any(0) == valid).all()
    torch.testing.assert_close(logits[:, :, 6:51, :52], model(x)[..., 10:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", list(SIZES))
@pytest.mark.parametrize("levels", [1, 2])
@torch.no_grad()
def test_images_at_the_reference_are_not_resampled_again(name, levels):
    backbone, x = lively(timm.create_model(name, spacing=0.6)).eval(), [image_of(name, 2) for _ in range(levels)]
    spacing, masks = [steps(name, 0.9 * (i + 1)) for i in range(levels)], [mask_of(i) for i in x]
    told = backbone.forward_intermediates(
        x, norm=True, output_dict=True, return_assignments=True, spacing=spacing, mask=masks
    )
    images = read_images(x, Told(spacing, masks), backbone.reference_spacing, x[0].shape[1], (1,) * (x[0].ndim - 2))
    (part,) = parts_at_reference(images, backbone.reference_spacing)
    run = backbone.run_on_grids(part.images, return_assignments=True)
    for stage, maps, grids in zip(run.stages, told["image_intermediates"], told["grids"], strict=True):
        for tokens, expected, grid in zip(stage.levels, maps, grids, strict=True):
            assert torch.equal(tokens.x.movedim(-1, 1), expected)
            assert torch.equal(tokens.grid.origin, grid.origin)
    for ours, expected in zip(run.assignments, told["assignments"], strict=True):
        assert all(torch.equal(a.attn_q, b.attn_q) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("name", list(SIZES))
@torch.no_grad()
def test_a_pixel_stem_sees_pixels(name):
    model, x = segmenter(name, physical_stem=False), image_of(name, 2)
    mask, rows = mask_of(x), torch.tensor([steps(name), steps(name, 1.4)])
    logits = model(x, spacing=rows, mask=mask)
    assert ((logits != 0).all(1) == mask).all()
    assert model.forward_features(x, spacing=rows).grid.shape == x.shape[2:]
    for i in range(2):
        alone = model(x[i : i + 1], spacing=rows[i], mask=mask[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_heads_of_ones_own_come_to_pixels(name):
    model, x = segmenter(name), image_of(name, 2)
    spacing = torch.tensor([steps(name), steps(name, 1.1)])
    tokens = model.forward_features(x, spacing=spacing)
    assert tokens.x.shape == (2, *tokens.grid.shape, model.num_features)
    images = read_images(x, Told(spacing), model.reference_spacing, model.in_chans, (1,) * model.spatial_dims)
    image = images.levels[0]
    made = channels_last(model.classifier(channels_first(tokens.x)))
    logits = at_grid(tokens._replace(x=made), image, image.grid)
    torch.testing.assert_close(logits.movedim(-1, 1), model(x, spacing=spacing), rtol=0, atol=1e-4)  # sampled, or not


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@pytest.mark.parametrize("detail", [False, True])
def test_gradients_reach_all_parameters(name, decoder, detail):
    model = Segmenter(name, 2, decoder, detail=detail, **(SMALL_VIT if name == VIT else {})).train()
    torch.nn.init.normal_(model.classifier.weight)
    x = image_of(name, 2)
    mask = mask_of(x)
    logits = model(x, spacing=steps(name), mask=mask)
    (logits * torch.randn_like(logits)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    still = [n for n, p in model.named_parameters() if p.grad.abs().amax() == 0]
    assert [n for n in still if "k_bias" not in n] == []


PLAIN = {
    "rat_vit_medium_patch16_rope_reg1_gap_256": {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 64},
    "rat_vit_pe_core_tiny_patch16_384": {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 64},
    "rat_vit_small_patch16_dinov3": {"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 64},
    "rat_vit_small_patch16_rope_mixed_224": {
        **{"embed_dim": 64, "depth": 1, "num_heads": 2, "img_size": 64},
        **{"spatial_dims": 3, "patch_depth": 2, "in_chans": 1},
    },
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_plain_transformers_of_all_kinds(name, tmp_path):
    model = Segmenter(name, 2, **PLAIN[name]).train()
    torch.nn.init.normal_(model.classifier.weight)
    x = torch.randn(1, model.in_chans, *(5, 40, 70)[-model.spatial_dims :])
    logits = model(x, spacing=0.8)
    assert logits.shape == (1, 2, *x.shape[2:])
    (logits * torch.randn_like(logits)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        again = Segmenter.load(model.eval().save(tmp_path))
        assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_a_sample_without_a_valid_pixel_is_zero():
    model, x = segmenter("test_rat"), image_of("test_rat", 2) * torch.tensor([torch.nan, 1]).view(2, 1, 1, 1)
    mask = torch.ones(2, *x.shape[2:], dtype=torch.bool)
    mask[0] = False
    logits = model(x, spacing=0.9, mask=mask)
    assert (logits[0] == 0).all()
    torch.testing.assert_close(logits[1:], model(x[1:], spacing=0.9), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_training_starts_from_no_opinion(name):
    model, x = Segmenter(name, 5, **(SMALL_VIT if name == VIT else {})), image_of(name)
    assert model.classifier.bias.eq(0).all()
    assert model(x).softmax(dim=1).amax() < 0.6


@torch.no_grad()
def test_the_context_tells_what_keywords_tell():
    model, x = segmenter("test_rat"), image_of("test_rat")
    mask = mask_of(x)
    expected = model(x, spacing=0.6, mask=mask, origin=4.0)
    with rat_timm.geometry(spacing=0.6, mask=mask, origin=4.0):
        assert torch.equal(model(x), expected)


def test_pixel_sizes_outside_of_the_known_range_warn():
    model, x = segmenter("test_rat", spacing_range=(0.2, 0.5)), image_of("test_rat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, spacing=0.4)  # although it is brought to the reference spacing, 1
    with pytest.warns(UserWarning, match="outside of what the model was trained"):
        model(x, spacing=0.8)


@torch.no_grad()
def test_half_precision_runs():
    model, x = segmenter("test_rat"), image_of("test_rat")
    expected = model(x, spacing=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, spacing=0.8)
    assert (mixed - expected).abs().mean() < 0.1 * expected.std()
    assert model.bfloat16()(x.bfloat16(), spacing=0.8).dtype == torch.bfloat16


def test_backbones_that_are_given():
    backbone = timm.create_model("test_rat", num_classes=7)
    model = Segmenter(backbone, 2)
    assert model.backbone is backbone
    assert isinstance(backbone, ResolutionAwareTransformer)
    assert backbone.num_classes == 0
    assert model.decoder_name == "fpn"
    vit = Segmenter(timm.create_model(VIT, **SMALL_VIT), 2)
    assert isinstance(vit.backbone, RatVit)
    assert vit.decoder_name == "fpn"
    assert Segmenter("test_rat", 2, in_chans=5)(torch.randn(1, 5, 32, 32)).shape == (1, 2, 32, 32)


def test_strided_convolutions_have_no_groups():
    kinds = ("sparse", "none", "sparse")
    for kind in ("none", kinds):
        with pytest.raises(ValueError, match=r"decoder 'groups' needs .*'none'.* choose decoder='fpn'"):
            Segmenter("test_rat", 2, "groups", sga_attention_type=kind)
        assert Segmenter("test_rat", 2, sga_attention_type=kind).decoder_name == "fpn"
    with pytest.raises(ValueError, match="a plain transformer has none: choose decoder='fpn'"):
        Segmenter(VIT, 2, "groups", **SMALL_VIT)


@torch.no_grad()
def test_other_groupings_stems_and_numbers_of_axes():
    x = torch.randn(1, 3, 33, 40)
    volumes = segmenter("test_rat_3d", stem_stride=(1, 4, 4), spacing=(1.0, 0.2, 0.2), in_chans=1)
    assert (volumes(torch.randn(1, 1, 5, 40, 36), spacing=(1.0, 0.25, 0.25)) != 0).all()
    assert (segmenter("test_rat", spatial_dims=1)(torch.randn(2, 3, 50), spacing=0.7) != 0).all()
    small = {"embed_dim": [32] * 4, "num_heads": 2}
    assert segmenter("rat_classic", "groups", **small)(x, spacing=0.9).shape == (1, 3, 33, 40)
    for kwargs in ({"sga_attention_type": "dense"}, {"group_first": True}, {"output_stride": 8}, {"reg_tokens": 2}):
        model = segmenter("test_rat", "groups", **kwargs)
        assert (model(x, spacing=0.9) != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes and width must be positive, got 0"),
        ({"decoder": "unet"}, r"decoder must be one of \('fpn', 'groups'\), got 'unet'"),
        ({"class_names": ["one"]}, "class_names must be 2 strings"),
        ({"backbone": "resnet18"}, "backbone must be a ResolutionAwareTransformer or a RatVit .* got ResNet"),
        ({"backbone": timm.create_model("test_rat"), "in_chans": 1}, "in_chans must be the backbone's 3, got 1"),
        ({"backbone": timm.create_model("test_rat"), "iters": 2}, r"backbone_kwargs go with a name .*\['iters'\]"),
    ],
)
def test_constructors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**{"backbone": "test_rat", "num_classes": 2, **arguments})


def test_calls_say_what_is_wrong():
    model, x = segmenter("test_rat"), image_of("test_rat")
    with pytest.raises(ValueError, match=r"out must be a Grid of 2 axes .* got shape \(4, 4, 4\)"):
        model(x, out=Grid.create((4, 4, 4)))
    with pytest.raises(ValueError, match="out must be positive"):
        model(x, out=-1.0)
    with pytest.raises(ValueError, match="out must be a number, 2 values"):
        model(x, out=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="x must have 3 channels"):
        model(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize(("name", "decoder"), KINDS)
@torch.no_grad()
def test_a_saved_segmenter_comes_back(name, decoder, tmp_path):
    names = ["background", "nucleus", "border"]
    model = segmenter(name, decoder, spacing=0.5, spacing_range=(0.2, 1.0), class_names=names, drop_path_rate=0.1)
    assert model.save(tmp_path / "model") == tmp_path / "model"
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    again, x = Segmenter.load(tmp_path / "model"), image_of(name)
    assert torch.equal(again(x, spacing=0.4), model(x, spacing=0.4))
    assert again.class_names == names
    assert again.decoder_name == decoder
    assert again.reference_spacing == model.reference_spacing
    assert again.backbone.spacing_range == model.backbone.spacing_range
    other = segmenter(name, decoder, spacing=0.5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, spacing=0.4), model(x, spacing=0.4))


@torch.no_grad()
def test_a_folder_of_the_former_layout_opens(tmp_path):
    """As it was saved: `stem_pool` did not exist, None stood for windows of 7, and True for detail of pixels."""
    model = Segmenter("rat_tiny", 2, detail="pixels", embed_dim=32, depths=(1, 1, 1, 1), **FORMER).eval()
    config = json.loads((model.save(tmp_path / "now") / "config.json").read_text())
    del config["model_args"]["stem_pool"]
    config["model_args"]["attn_kernel_size"] = None
    config["segmenter"]["detail"] = True
    (tmp_path / "then").mkdir()
    write(model, config, tmp_path / "then")
    again, x = Segmenter.load(tmp_path / "then"), torch.randn(1, 3, 64, 80)
    assert torch.equal(again(x), model(x))


def test_damaged_folders_are_refused(tmp_path):
    model = segmenter("test_rat")
    model.save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, data = config.read_text(), weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: its SHA-256"):
        Segmenter.load(tmp_path)
    weights.write_bytes(data)
    config.write_text(good.replace('"width": 32', '"width": 16'))
    with pytest.raises(ValueError, match=r"is damaged: its config\.json is not the one"):
        Segmenter.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        Segmenter.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_args"].update(pretrained_cfg_overlay={}), "must hold keywords of .*pretrained_cfg_overlay"),
        (lambda c: c["segmenter"].update(backbone="x"), "must hold keywords of .*backbone"),
        (lambda c: c.update(architecture="resnet18"), "architecture in .* must be a name of rat_timm"),
        (lambda c: c.pop("segmenter"), "must hold what Segmenter.save wrote"),
    ],
)
def test_configs_hold_keywords_alone(change, message, tmp_path, monkeypatch):
    from rat_timm.dense import saving

    describe = saving._describe

    def changed(model):
        config = describe(model)
        change(config)
        return config

    monkeypatch.setattr(saving, "_describe", changed)
    segmenter("test_rat").save(tmp_path)
    with pytest.raises(ValueError, match=message):
        Segmenter.load(tmp_path)


def test_what_cannot_be_made_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"backbone must be from timm\.create_model to be saved"):
        Segmenter(ResolutionAwareTransformer(embed_dim=32, depths=(1, 1), num_classes=0), 2).save(tmp_path)
    model = segmenter("test_rat")
    model.classifier = torch.nn.Linear(model.num_features, 9)
    with pytest.raises(ValueError, match="must be what its keywords make to be saved, but differs from it in"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())
    segmenter("test_rat").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["segmenter"] == {
        "num_classes": 3,
        "decoder": "fpn",
        "width": 32,
        "detail": "contrast",
        "context": False,
        "class_names": None,
    }


def test_context_reaches_a_pixel_by_its_position():
    """Levels that do not attend to each other: what an overview shows matters where it lies."""
    torch.manual_seed(0)
    model = lively(Segmenter("test_rat", 2, in_chans=1, joint_attention=False, context=True)).eval().double()
    image, around = torch.randn(1, 1, 64, 64, dtype=torch.float64), torch.randn(1, 1, 320, 320, dtype=torch.float64)
    told = {"spacing": [(1.0, 1.0), (2.0, 2.0)], "origin": [(0.5, 0.5), (0.5, 0.5)]}
    with torch.no_grad():
        plain = model([image, around], **told)
        there, far = around.clone(), around.clone()
        there[..., 4:8, 4:8] += 3  # about 12 of level 0
        far[..., 310:, 310:] += 3
        near, away = (float((model([image, each], **told) - plain).abs().max()) for each in (there, far))
    assert near > 1e-3
    assert near > 1000 * away
