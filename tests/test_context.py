import threading

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import rat_timm
from rat_timm import RatConfig, ResolutionAwareTransformer

CASES = {
    "test_rat": ({}, (3, 40, 56)),
    "test_rat_3d": ({}, (1, 12, 20, 28)),
    "rat_vit_small_patch16_rope_mixed_224": ({"depth": 2}, (3, 40, 56)),
    "apvit_tiny_patch16_224": ({"depth": 2}, (3, 48, 64)),
}


@pytest.fixture(params=CASES)
def model_and_image(request):
    kwargs, size = CASES[request.param]
    return timm.create_model(request.param, num_classes=5, **kwargs).eval(), torch.randn(2, *size)


def told_of(x):
    axes = x.ndim - 2
    mask = torch.rand(2, *x.shape[2:]) < 0.8
    return {"spacing": [0.5, 1.5, 2.0][:axes], "mask": mask, "origin": [3.0] * axes}


def test_it_is_the_arguments(model_and_image):
    model, x = model_and_image
    told = told_of(x)
    expected, features = model(x, **told), model.forward_features(x, **told)
    with rat_timm.geometry(**told):
        assert torch.equal(model(x), expected)
        assert torch.equal(model.forward_features(x), features)
        assert torch.equal(model.forward_intermediates(x, output_fmt=maps_of(model))[0], features)
    assert not torch.equal(model(x), expected)


def maps_of(model):
    return "NLC" if isinstance(model, rat_timm.AdaptiveVit) else "NCHW"


def test_arguments_come_first_and_contexts_nest(model_and_image):
    model, x = model_and_image
    told = told_of(x)
    with rat_timm.geometry(spacing=told["spacing"], origin=told["origin"]):
        with rat_timm.geometry(mask=told["mask"]):
            assert torch.equal(model(x), model(x, **told))
            assert torch.equal(model(x, spacing=1.0), model(x, **told | {"spacing": 1.0}))
        with rat_timm.geometry(spacing=1.0):
            assert torch.equal(model(x), model(x, spacing=1.0, origin=told["origin"]))
        assert torch.equal(model(x), model(x, spacing=told["spacing"], origin=told["origin"]))


def test_it_ends_with_an_error(model_and_image):
    model, x = model_and_image
    expected = model(x)
    with pytest.raises(RuntimeError, match="inside"), rat_timm.geometry(spacing=2.0):
        raise RuntimeError("inside")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"mask": torch.ones(3, 40, 56, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 40, 55, dtype=torch.bool)}, "mask must be"),
        ({"spacing": torch.ones(3, 2)}, "spacing must be"),
        ({"origin": torch.ones(3, 2)}, "origin must be"),
    ],
)
def test_what_does_not_fit_the_batch_is_an_error(told, message):
    model = timm.create_model("test_rat").eval()
    with rat_timm.geometry(**told), pytest.raises(ValueError, match=message):
        model(torch.randn(2, 3, 40, 56))


def test_each_thread_has_its_own():
    model, x = timm.create_model("test_rat").eval(), torch.randn(1, 3, 40, 56)
    spacings = [0.5, 1.0, 2.0, 4.0]
    expected = [model(x, spacing=s) for s in spacings]
    everybody, outs = threading.Barrier(len(spacings)), {}

    def work(index):
        with rat_timm.geometry(spacing=spacings[index]):
            everybody.wait()
            outs[index] = model(x)
            everybody.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(spacings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(outs[i], expected[i]) for i in range(len(spacings)))


@pytest.mark.slow
def test_compiled_models_follow_it():
    torch.compiler.reset()
    cfg = RatConfig(embed_dim=32, depths=(1,), physical_stem=False)  # what follows is the model's door
    model = ResolutionAwareTransformer(cfg, num_classes=3).eval()
    wrapped = torch.nn.Sequential(model, torch.nn.Identity())
    compiled = torch.compile(wrapped, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    mask = torch.rand(2, 32, 32) < 0.7
    for told in ({}, {"spacing": 2.0}, {"spacing": torch.tensor([[1.0, 2.0], [0.5, 3.0]])}, {"mask": mask}, {}):
        with rat_timm.geometry(**told):
            torch.testing.assert_close(compiled(x), model(x, **told), rtol=1e-5, atol=1e-6)


def test_graphs_follow_it():
    model, x = timm.create_model("test_rat").eval(), torch.randn(1, 3, 40, 56)
    graph = timm.models.create_feature_extractor(model, {"head": "out"})
    with rat_timm.geometry(spacing=3.0):
        torch.testing.assert_close(graph(x)["out"], model(x, spacing=3.0))


def test_graphs_of_one_argument_follow_it():
    model, x = timm.create_model("test_rat").eval(), torch.randn(1, 3, 40, 56)
    graph = torch.fx.symbolic_trace(model, concrete_args={"spacing": None, "mask": None, "origin": None})
    with rat_timm.geometry(spacing=3.0):
        torch.testing.assert_close(graph(x, None, None, None), model(x))


def test_graphs_of_plain_models_refuse_it():
    model = timm.create_model("rat_vit_small_patch16_rope_mixed_224", depth=1, use_abs_pos_emb=False).eval()
    graph, x = torch.fx.symbolic_trace, torch.randn(1, 3, 32, 32)
    graph = timm.models.create_feature_extractor(model, {"head": "out"})
    torch.testing.assert_close(graph(x)["out"], model(x))
    with rat_timm.geometry(spacing=3.0), pytest.raises(ValueError, match="no effect on a symbolically traced model"):
        graph(x)


def test_features_only_and_a_segmentation_network():
    x, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    mask[:, :, 40:] = False
    backbone = timm.create_model("test_rat", features_only=True).eval()
    with rat_timm.geometry(spacing=0.5, mask=mask):
        found = backbone(x)
    for a, b in zip(found, backbone(x, spacing=0.5, mask=mask), strict=True):
        assert torch.equal(a, b)
    unet = smp.Unet("tu-test_rat", encoder_weights=None, classes=2).eval()
    other = torch.where(mask[:, None], x, 1e4)
    with rat_timm.geometry(spacing=0.5, mask=mask):
        assert all(torch.equal(a, b) for a, b in zip(unet.encoder(x)[2:], unet.encoder(other)[2:], strict=True))
        told = unet(x)
    assert not torch.allclose(told, unet(x))
