"""What other libraries do with a backbone: hooks, symbolic tracing, class activation maps, summaries, counters."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import rat_timm

NAMES = ("test_rat", "test_rat_3d")
IMAGE = {"test_rat": (3, 40, 56), "test_rat_3d": (1, 12, 20, 28)}
STAGES = [f"stages.{i}" for i in range(4)]


def build(name, **kwargs):
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def expected_maps(model, x):
    """What ``features_only`` gives, from a model with the same weights."""
    backbone = timm.create_model(model.pretrained_cfg["architecture"], features_only=True).eval()
    backbone.model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, strict=False
    )
    return backbone(x)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_on_stages_meet_maps(name):
    model, x, seen = build(name), torch.randn(2, *IMAGE[name]), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    assert_same(seen, expected_maps(model, x))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_hook_returns_is_what_goes_on(name):
    model, x = build(name), torch.randn(2, *IMAGE[name])
    before = model(x)
    model.stages[1].register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("name", NAMES)
def test_timms_hook_features(name):
    model, x = build(name), torch.randn(2, *IMAGE[name])
    hooked = timm.models._features.FeatureHookNet(model, out_indices=(0, 1, 2, 3))
    assert_same(hooked(x), expected_maps(model, x))


def test_timm_makes_hook_features_by_name():
    hooked = timm.create_model("test_rat", features_only=True, feature_cls="hook").eval()
    assert [tuple(m.shape) for m in hooked(torch.randn(1, 3, 64, 64))] == [
        (1, 32, 16, 16),
        (1, 64, 8, 8),
        (1, 64, 4, 4),
        (1, 128, 2, 2),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("physical_stem", [False, True])
def test_torchvisions_feature_extractor(name, physical_stem):
    model, x = build(name, physical_stem=physical_stem), torch.randn(2, *IMAGE[name])
    for names in get_graph_node_names(model):
        assert set(STAGES) <= set(names)
    extractor = create_feature_extractor(model, {stage: stage for stage in [*STAGES, "head"]}).eval()
    out = extractor(x)
    assert_same([out[stage] for stage in STAGES], expected_maps(model, x))
    assert_same([out["head"]], [model(x)])


@pytest.mark.parametrize("name", NAMES)
def test_timms_feature_extractor(name):
    model, x = build(name), torch.randn(2, *IMAGE[name])
    extractor = timm.models.create_feature_extractor(model, {stage: stage for stage in STAGES}).eval()
    out = extractor(x)
    assert_same([out[stage] for stage in STAGES], expected_maps(model, x))


def test_torchvisions_pyramid_network():
    from torchvision.ops import FeaturePyramidNetwork

    model, x = build("test_rat"), torch.randn(1, 3, 64, 64)
    body = create_feature_extractor(model, {stage: str(i) for i, stage in enumerate(STAGES)})
    fpn = FeaturePyramidNetwork([info["num_chs"] for info in model.feature_info], 16)
    assert [tuple(m.shape[2:]) for m in fpn(body(x)).values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_grad_cam(name):
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x, seen = build(name), torch.randn(1, *IMAGE[name]), []
    handle = model.stages[2].register_forward_hook(lambda module, args, output: seen.append(output))
    (gradient,) = torch.autograd.grad(model(x)[0, 3], seen)
    handle.remove()
    with GradCAM(model, target_layers=[model.stages[2]]) as cam:
        image = cam(x, [ClassifierOutputTarget(3)])
        collected = cam.activations_and_grads
        assert_same([collected.activations[0], collected.gradients[0]], [expected_maps(model, x)[2], gradient])
    assert image.shape == (1, *x.shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_captums_layer_methods(name):
    from captum.attr import LayerActivation, LayerGradCam

    model, x = build(name), torch.randn(2, *IMAGE[name])
    assert_same([LayerActivation(model, model.stages[1]).attribute(x)], [expected_maps(model, x)[1]])
    cam = LayerGradCam(model, model.stages[1]).attribute(x, target=2)
    assert cam.shape == (2, 1, *expected_maps(model, x)[1].shape[2:])
    assert cam.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_torchinfo(name):
    from torchinfo import summary

    model = build(name)
    result = summary(model, input_size=(2, *IMAGE[name]), verbose=0)
    assert result.total_params == sum(p.numel() for p in model.parameters())
    found = [info.output_size for info in result.summary_list if info.class_name == "Stage"]
    assert found == [list(m.shape) for m in expected_maps(model, torch.randn(2, *IMAGE[name]))]


@pytest.mark.parametrize("name", NAMES)
def test_torchsummary(name, capsys):
    from torchsummary import summary

    model = build(name)
    summary(model, IMAGE[name], device="cpu")
    printed = capsys.readouterr().out  # its sum counts the layers of a grouping once per iteration
    maps = [str([-1, *m.shape[1:]]) for m in expected_maps(model, torch.randn(2, *IMAGE[name]))]
    assert [size for size in maps if size in printed] == maps


def test_every_module_attribute_that_summaries_read_is_a_size():
    for name in NAMES:
        for path, module in build(name).named_modules():
            if hasattr(module, "kernel_size"):
                assert isinstance(module.kernel_size, (int, tuple)), path


def test_stages_of_pyramids_give_lists():
    model, seen = build("test_rat"), []
    model.stages[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model([torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16)])
    assert [tuple(m.shape) for m in seen[0]] == [(1, 32, 8, 8), (1, 32, 4, 4)]


def test_pefts_adapters_on_every_projection():
    from peft import LoraConfig, get_peft_model

    for name in NAMES:  # test_rat has groupings that keep the width
        model = get_peft_model(build(name), LoraConfig(target_modules=["proj", "qkv"]))
        assert model(torch.randn(1, *IMAGE[name])).shape == (1, 5)


def test_wrapped_modules_train():
    model = nn.Sequential(build("test_rat"), nn.Linear(5, 2)).train()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", [*NAMES, "rat_vit_small_patch16_rope_mixed_224", "apvit_tiny_patch16_224"])
def test_what_is_pooled_knows_its_mask(name):
    plain = name not in NAMES
    model = build(name, **({"depth": 1} if plain else {}), **({"global_pool": "avg"} if plain else {}))
    x = torch.randn(2, *IMAGE.get(name, (3, 48, 64)))
    mask = torch.ones(2, *x.shape[2:], dtype=torch.bool)
    mask[..., x.shape[-1] // 2 :] = False
    expected = model(x, mask=mask)
    maps = "NLC" if name.startswith("apvit") else "NCHW"
    assert_same([model.forward_head(model.forward_features(x, mask=mask))], [expected])
    assert_same([model.forward_head(model.forward_intermediates(x, mask=mask, output_fmt=maps)[0])], [expected])


@pytest.mark.slow
def test_what_is_pooled_knows_its_mask_in_pyramids_and_compiled():
    torch.compiler.reset()
    model, x = build("test_rat", iters=1), torch.randn(1, 3, 32, 32)
    mask = torch.arange(32).expand(1, 32, 32) < 20
    images, masks = [x, x[..., ::2, ::2]], [mask, None]
    expected = model(images, mask=masks)
    assert_same([model.forward_head(model.forward_features(images, mask=masks))], [expected])
    pooled = torch.compile(lambda x, mask: model.forward_head(model.forward_features(x, mask=mask)), backend="eager")
    assert_same([pooled(x, mask)], [model(x, mask=mask)])


def test_transformers_pools_what_is_valid(tmp_path):
    from transformers import AutoModel, AutoModelForImageClassification

    from rat_timm import hub

    model, x = build("test_rat"), torch.randn(2, 3, 40, 56)
    mask = torch.rand(2, 40, 56) < 0.3
    mask[:, 20:] = False
    folder = hub.save(model, tmp_path / "model")
    expected = {"mask": mask, "spacing": 2.0}
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert_same([classifier(x, **expected).logits], [model(x, **expected)])
    assert_same([classifier(x, output_hidden_states=True, **expected).logits], [model(x, **expected)])
    pooled = AutoModel.from_pretrained(folder)(x, **expected).pooler_output
    assert_same([pooled], [model.forward_head(model.forward_features(x, **expected), pre_logits=True)])
    with rat_timm.geometry(**expected):
        assert_same([classifier(x).logits], [model(x)])


@pytest.mark.parametrize("decoder", ["PAN", "DeepLabV3", "DeepLabV3Plus"])
def test_segmentation_networks_that_want_denser_maps(decoder):
    import segmentation_models_pytorch as smp

    network = getattr(smp, decoder)("tu-test_rat", encoder_weights=None, classes=2).train()
    out = network(torch.randn(2, 3, 128, 192))
    assert out.shape == (2, 2, 128, 192)
    out.sum().backward()
    stages = [p for name, p in network.named_parameters() if name.startswith("encoder.model.model.stages")]
    assert stages
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stages)


def test_a_detectors_backbone_with_dilation():
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="test_rat", output_stride=16, out_indices=[1, 2, 3])
    maps = TimmBackbone(config).eval()(torch.randn(1, 3, 64, 96)).feature_maps
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 12), (4, 6), (4, 6)]


@pytest.mark.parametrize("name", NAMES)
def test_torchscript_traces(name):
    model, x = build(name), torch.randn(2, *IMAGE[name])
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-6, atol=1e-6)
        other = torch.randn_like(x)
        torch.testing.assert_close(traced(other), model(other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_fvcores_counter(name):
    from fvcore.nn import FlopCountAnalysis

    from rat_timm.cost import count_macs

    model, x = build(name), torch.randn(1, *IMAGE[name])
    counted = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert 0.5 * count_macs(model, x) < counted.total() < 1.5 * count_macs(model, x)


@pytest.mark.parametrize("name", [*NAMES, "rat_vit_small_patch16_rope_mixed_224"])
def test_self_distillation_with_a_moving_average(name):
    """What lightly's DINO does with a backbone: a copy without gradients follows it, views have two sizes."""
    student = timm.create_model(name, num_classes=0, **({"depth": 1} if "vit" in name else {})).train()
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    channels, *size = IMAGE.get(name, (3, 32, 48))
    views = [torch.randn(2, channels, *size), torch.randn(2, channels, *(n // 2 for n in size))]
    for ours, theirs in zip(student.parameters(), teacher.parameters(), strict=True):
        theirs.data = theirs.data.lerp(ours.data, 0.1)
    assert_same([teacher(views[0])], [student(views[0])])
    heads = [student(view).flatten(1) for view in views]
    assert [head.shape for head in heads] == [(2, student.num_features)] * 2
    sum((teacher(views[0]) * head).sum() for head in heads).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
