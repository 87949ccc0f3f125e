import collections
import copy
import inspect
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import rat_timm
from helpers import lively
from rat_timm import RatConfig, ResolutionAwareTransformer
from rat_timm.models.rat import checkpoint_filter_fn

NAMES = ["test_rat", "test_rat_3d"]
IMAGE = {"test_rat": (3, 45, 70), "test_rat_3d": (1, 20, 33, 17)}


@pytest.fixture(params=NAMES)
def model(request):
    return lively(timm.create_model(request.param, num_classes=7).eval())


def image(model, batch=2):
    return torch.randn(batch, *IMAGE["test_rat" if model.cfg.spatial_dims == 2 else "test_rat_3d"])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("test_rat", [(224, 224), (97, 131), (33, 20), (512, 384), (32, 32), (4, 4)]),
        ("test_rat_3d", [(96, 96, 96), (20, 64, 48), (9, 33, 17), (4, 4, 4)]),
    ],
)
@torch.no_grad()
def test_any_size(name, sizes):
    backbone = timm.create_model(name, features_only=True).eval()
    for size in sizes:
        maps = backbone(torch.randn(1, backbone.in_chans, *size))
        for features, channels, stride in zip(maps, backbone.feature_info.channels(), (4, 8, 16, 32), strict=True):
            assert features.shape == (1, channels, *(-(-n // stride) for n in size))
            assert torch.isfinite(features).all()


@torch.no_grad()
def test_an_image_passes_few_functions_in_few_files():
    """What a reader has to follow from pixels to features, and what an eager forward spends outside of PyTorch."""
    model, x = timm.create_model("test_rat").eval(), torch.randn(1, 3, 224, 224)
    model(x)
    package, calls = str(Path(rat_timm.__file__).parent), collections.Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls[frame.f_code.co_filename] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        model(x)
    finally:
        sys.setprofile(before)
    assert 0 < calls.total() <= 350, calls
    assert len(calls) <= 8, calls


@torch.no_grad()
def test_spacing_changes_the_output_of_rat_tiny():
    model = lively(timm.create_model("rat_tiny").eval())
    x = torch.randn(1, 3, 64, 96)
    expected = model(x)
    assert torch.equal(model(x, spacing=1.0), expected)
    for spacing in (2.0, (1.0, 2.0), 0.5):
        assert (model(x, spacing=spacing) - expected).norm() / expected.norm() > 1e-2


@pytest.mark.parametrize("name", ["rat_tiny", "test_rat", "test_rat_3d", "rat_classic"])
@torch.no_grad()
def test_units_do_not_matter(name):
    """spacing=10 built, 5 given, equals 1 built, 0.5 given."""
    one = lively(timm.create_model(name, num_classes=10).eval())
    ten = timm.create_model(name, num_classes=10, spacing=10).eval()
    if name == "rat_classic":  # its scaling parameters are in units of the reference spacing
        assert one.cfg.learnable_rose_scaling
    ten.load_state_dict(one.state_dict())
    size = (48, 33) if one.cfg.spatial_dims == 2 else (16, 33, 20)
    x = torch.randn(2, one.in_chans, *size)
    torch.testing.assert_close(ten(x, spacing=5), one(x, spacing=0.5), rtol=0, atol=1e-4)
    assert (one(x, spacing=0.5) - one(x)).abs().max() > 1e-3


@torch.no_grad()
def test_numbers_of_numpy_are_numbers():
    spacing = np.array([2.2, 2.0, 2.0], dtype=np.float32)  # what nibabel's header.get_zooms() gives
    models = [timm.create_model("test_rat_3d", spacing=s).eval() for s in (spacing.tolist(), tuple(spacing))]
    models[1].load_state_dict(models[0].state_dict())
    x = image(models[0])
    expected = models[0](x, spacing=(1.0, 2.0, 3.0))
    for given in (np.array([1.0, 2.0, 3.0]), tuple(np.array([1.0, 2.0, 3.0])), [torch.tensor([1.0, 2.0, 3.0])]):
        assert torch.equal(models[1](x, spacing=given), expected)


@torch.no_grad()
def test_an_empty_batch_passes(model):
    assert model(image(model)[:0]).shape == (0, 7)


@torch.no_grad()
def test_spacing_per_sample_equals_samples_one_by_one(model):
    x = image(model, 3)
    spacing = torch.rand(3, model.cfg.spatial_dims) + 0.5
    both = model(x, spacing=spacing)
    for i in range(3):
        for given in (spacing[i], spacing[i : i + 1], tuple(spacing[i].tolist())):
            torch.testing.assert_close(model(x[i : i + 1], spacing=given), both[i : i + 1], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 3])
def test_spacing_as_pytorchs_collate_has_it(model, batch):
    x = image(model, batch)
    samples = [tuple(0.5 + i + axis / 4 for axis in range(model.spatial_dims)) for i in range(batch)]
    collated = torch.utils.data.default_collate(samples)
    assert torch.equal(model(x, spacing=collated), model(x, spacing=torch.tensor(samples, dtype=torch.float64)))
    assert torch.equal(model([x], spacing=[collated]), model(x, spacing=collated))


def test_spacing_per_sample_of_rat_tiny():
    model = lively(timm.create_model("rat_tiny").eval())
    x, spacing = torch.randn(2, 3, 64, 50), torch.tensor([[1.0, 1.0], [0.3, 2.0]])
    both = model(x, spacing=spacing)
    for i in range(2):
        torch.testing.assert_close(model(x[i : i + 1], spacing=spacing[i]), both[i : i + 1], rtol=0, atol=1e-4)


def test_3d_of_a_2d_variant_and_anisotropic_stems():
    model = timm.create_model("test_rat", spatial_dims=3, in_chans=1, stem_stride=(1, 4, 4), features_only=True)
    maps = model(torch.randn(1, 1, 12, 64, 40))
    assert [tuple(m.shape[2:]) for m in maps] == [(12, 16, 10), (6, 8, 5), (3, 4, 3), (2, 2, 2)]
    assert model.feature_info.get("stride") == [(1, 4, 4), (2, 8, 8), (4, 16, 16), (8, 32, 32)]
    assert model.feature_info.reduction() == [4, 8, 16, 32]


def test_nominal_spacing_is_told():
    model = timm.create_model("test_rat_3d", spacing=(2.2, 2.0, 2.0), features_only=True)
    assert model.feature_info.get("spacing")[0] == pytest.approx((8.8, 8.0, 8.0))


@pytest.mark.parametrize("kind", ["dense", "sparse", ("dense", "sparse", "sparse")])
def test_attention_types(kind):
    model = timm.create_model("test_rat", sga_attention_type=kind)
    kinds = (kind,) * 3 if isinstance(kind, str) else kind
    found = [type(stage.downsample.sga).__name__ for stage in model.stages[1:]]
    assert found == [f"{k.capitalize()}SpatialGroupingAttention" for k in kinds]
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 10)


def test_seed_keywords():
    model = timm.create_model(
        "test_rat",
        kernel_size=5,
        stride=2,
        iters=2,
        learnable_rose=False,
        rotary_ratio=0.5,
        mlp_ratio=1.5,
        num_heads=(2, 2, 4, 4),
        neighborhood_kernel=5,
        qkv_bias=False,
        base_theta=1e4,
        frequency_scaling="sqrt",
    )
    sga = model.stages[1].downsample.sga
    assert (sga.kernel_size, sga.iters, sga.num_heads, sga.neighborhood_kernel) == ((5, 5), 2, 2, 5)
    assert not any("freqs" in name for name, _ in model.named_parameters())
    model(torch.randn(1, 3, 40, 40)).sum().backward()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims must be"),
        ({"num_heads": 3}, "num_heads 3 does not divide"),
        ({"embed_dim": 33, "num_heads": 3}, "must be even"),
        ({"depths": (1, 1, 0, 1)}, "depths must be whole and above 0"),
        ({"mlp_ratio": (2.0, 2.0)}, "mlp_ratio must have one entry per stage"),
        ({"num_heads": (1, 2)}, "num_heads must have one entry per stage"),
        ({"embed_dim": (32, 64)}, "embed_dim must have one entry per stage"),
        ({"attn_kernel_size": (7, 7)}, "attn_kernel_size must be"),
        ({"sga_attention_type": "fancy"}, "sga_attention_type must be one of"),
        ({"sga_attention_type": ("dense",)}, "sga_attention_type must be one of"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"stem_stride": 5}, "stem_stride"),
        ({"stem_stride": (2, 2, 2)}, "stem_stride must be a positive number or 2"),
        ({"stem_kernel_size": (4, 4)}, "stem_kernel_size must be odd"),
        ({"spacing": 0.0}, "spacing must be a positive"),
        ({"spacing": (1.0, 1.0, 1.0)}, "spacing must be a positive number or 2"),
        ({"global_pool": "median"}, "global_pool must be one of"),
        ({"global_pool": "token"}, "global_pool 'token' needs reg_tokens"),
        ({"reg_tokens": 2, "leading_tokens": 2}, "two names"),
        ({"reg_tokens": 2, "joint_attention": False}, "reg_tokens 2 need a stage in which all tokens attend"),
        ({"iters": 0}, "iters must be whole and at least 1"),
        ({"iters": 1.5}, "iters must be whole"),
        ({"depths": 3}, "depths must be a list or tuple, one per stage"),
        ({"stem_kernel_size": 3}, "stem_kernel_size must be a list or tuple, one per convolution"),
        ({"sga_attention_type": 3}, "sga_attention_type must be a list or tuple"),
        ({"attn_kernel_size": 7.0}, "attn_kernel_size must be a number or one per stage"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be a positive number or 2"),
        ({"kernel_size": 3.5}, "kernel_size must be whole"),
        ({"neighborhood_kernel": 2}, "neighborhood_kernel must be odd"),
        ({"reg_tokens": -1}, "reg_tokens must be whole and at least 0"),
        ({"sga_mlp_ratio": 0}, "sga_mlp_ratio must be above 0"),
        ({"base_theta": -1.0}, "base_theta must be above 0"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate must be in \[0, 1\)"),
        ({"in_chans": 0}, "in_chans must be positive"),
        ({"num_classes": -3}, "num_classes not negative"),
        ({"rotary_ratio": 2.0}, "rotary_ratio must be"),
    ],
)
def test_bad_constructions_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_rat", **kwargs)


def test_unknown_keywords_are_type_errors():
    with pytest.raises(TypeError, match="not_a_field"):
        ResolutionAwareTransformer(RatConfig(depths=(1, 1)), not_a_field=1)


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.zeros(1, 3, 32), {}, r"x must be \[B, C, \*size\] with 2 spatial axes"),
        (torch.zeros(1, 3, 32, 32, 32), {}, "with 2 spatial axes"),
        (torch.zeros(1, 1, 32, 32), {}, r"x must have 3 channels \(in_chans\), got 1"),
        ([], {}, "x is an empty list"),
        ([1, 2], {}, r"level 0: x must be \[B, C"),
        (torch.tensor(1.0), {}, r"x must be \[B, C"),
        ("image", {}, "x must be an image or a list of images, got str"),
        (torch.zeros(1, 3, 32, 32), {"origin": (0, float("nan"))}, "origin must be finite"),
        (torch.zeros(1, 3, 32, 32), {"spacing": 0}, "spacing must be positive"),
        (torch.zeros(1, 3, 32, 32), {"spacing": (1, -1)}, "spacing must be positive"),
        (torch.zeros(1, 3, 32, 32), {"spacing": float("nan")}, "spacing must be positive"),
        (torch.zeros(1, 3, 32, 32), {"spacing": (1, 1, 1)}, "spacing must be a number, 2 values"),
        (torch.zeros(2, 3, 32, 32), {"spacing": torch.ones(3, 2)}, "spacing must be"),
        (torch.zeros(1, 3, 32, 32), {"mask": torch.ones(1, 32, 31)}, "mask must be"),
        (torch.zeros(1, 3, 32, 32), {"mask": 1}, "mask must be a tensor, or a list with one per level, got 1"),
        (torch.zeros(1, 3, 32, 32), {"mask": torch.full((1, 32, 32), 0.5)}, "mask must be bool"),
        ([torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 16, 16)], {}, "level 1: x must have level 0's batch size"),
        ([torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 16, 16)], {}, "level 1: x must have 3 channels"),
        ([torch.zeros(1, 3, 32, 32)] * 2, {"mask": [torch.ones(1, 32, 32)]}, "mask must have one entry per level"),
        ([torch.zeros(1, 3, 32, 32)] * 2, {"mask": torch.ones(1, 32, 32)}, "mask must be a list with one entry"),
        ([torch.zeros(1, 3, 32, 32)] * 2, {"mask": [None, torch.ones(1, 9, 9)]}, "level 1: mask must be"),
        ([torch.zeros(1, 3, 8, 8)] * 2, {"mask": [None, torch.full((1, 8, 8), 2.0)]}, "level 1: mask must be bool"),
        ([torch.zeros(1, 3, 8, 8)] * 2, {"spacing": [1.0, 2.0, 3.0]}, "spacing must have one entry per level"),
        ([torch.zeros(1, 3, 8, 8)] * 2, {"spacing": [(1, 1), (1, -1)]}, "level 1: spacing must be positive"),
        ([torch.zeros(1, 3, 8, 8)] * 2, {"origin": [None, (1, 1)]}, "level 1: origin without spacing"),
    ],
)
def test_bad_inputs_are_named_before_any_work(x, kwargs, message):
    model = timm.create_model("test_rat")
    model.stem.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(ValueError, match=message):
            run(x, **kwargs)


@torch.no_grad()
def test_a_stem_of_pixels_has_a_least_size():
    x = torch.zeros(1, 3, 3, 32)
    with pytest.raises(ValueError, match="x must be at least"):
        timm.create_model("test_rat", physical_stem=False)(x)
    assert timm.create_model("test_rat", num_classes=7)(x, spacing=4.0).shape == (1, 7)


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "rat_tiny"])
def test_groups_start_out_different(name):
    """What all groups have in common must not drown at initialisation what tells them apart."""
    model = timm.create_model(name).eval()
    maps = model.forward_intermediates(torch.randn(1, *IMAGE.get(name, (3, 96, 96))), intermediates_only=True)
    for level in maps[1:-1]:
        places = level.flatten(2)[0]  # [C, N]
        assert places.std(dim=1).mean() > 0.4 * places.std()


def test_every_parameter_gets_a_gradient(model):
    model.train()
    model(image(model), spacing=0.7).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without


def test_gradient_checkpointing_changes_nothing(model):
    x, grads = image(model), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters()), allow_unused=True))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def relative_error(out, expected):
    return ((out.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_bfloat16_and_autocast(model):
    """Of the map, whose error is the same for all weights; that of a few logits differs by three times."""
    x, half = image(model), copy.deepcopy(model).bfloat16()
    expected = model.forward_features(x, spacing=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model.forward_features(x, spacing=0.7), expected) < 1.5e-2
        assert model(x, spacing=0.7).dtype == torch.bfloat16
    assert relative_error(half.forward_features(x.bfloat16(), spacing=0.7), expected) < 1.5e-2
    logits = half.head(half.forward_features(x.bfloat16(), spacing=0.7))
    torch.testing.assert_close(half(x.bfloat16(), spacing=0.7), logits)


def two_stages(**config):
    """A model that has each part once, since compilers are slow: windows, a grouping, global attention."""
    return ResolutionAwareTransformer(RatConfig(embed_dim=32, depths=(1, 1), **config), num_classes=3).eval()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_without_graph_breaks():
    """Numbers of the default compiler; whole models are traced below, and compiled in test_cuda.py."""
    torch._dynamo.reset()
    model = two_stages(physical_stem=False)
    x = torch.randn(2, 3, 22, 70)  # of 6 x 18 tokens: windows of 7 fit along one axis
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        spacing = torch.rand(2, model.cfg.spatial_dims) + 0.5
        torch.testing.assert_close(compiled(x, spacing=spacing), model(x, spacing=spacing), rtol=0, atol=1e-5)


def test_each_size_is_a_program_of_constants():
    torch.compiler.reset()
    symbols = []

    def backend(graph, inputs):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        sizes = [str(n) for value in values if isinstance(value, torch.Tensor) for n in value.shape]
        symbols.append({size for size in sizes if not size.isdigit()})
        return graph.forward

    cfg = RatConfig(embed_dim=32, depths=(1,), attn_kernel_size=3, iters=1)
    model = ResolutionAwareTransformer(cfg, num_classes=3).eval()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    images = [torch.randn(1, 3, size, 24) for size in (16, 20, 24)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for x in images[:2]:
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(Exception, match="fullgraph=True"):  # as the README says
            compiled(images[2])
    with torch._dynamo.config.patch(recompile_limit=3):
        torch.testing.assert_close(compiled(images[2]), model(images[2]), rtol=1e-5, atol=1e-6)
    assert symbols == [set()] * 3


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_programs_do_not_grow_with_depth(train):
    """Blocks of a stage, and iterations of a grouping, are calls of one program that is compiled once."""
    if "max_reuse_entries" not in inspect.signature(torch.compiler.nested_compile_region).parameters:
        pytest.skip("this PyTorch traces each block")
    torch._dynamo.reset()
    graphs = []
    cfg = RatConfig(embed_dim=32, depths=(3, 3), attn_kernel_size=3, iters=2)
    model = ResolutionAwareTransformer(cfg, num_classes=3).train(train)
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    x = torch.randn(1, 3, 16, 16)
    with torch.set_grad_enabled(train):
        torch.testing.assert_close(compiled(x), model(x))
    (graph,) = graphs
    called = [node.args[0].target for node in graph.graph.nodes if "invoke_subgraph" in str(node.target)]
    assert sorted(collections.Counter(called).values()) == [2, 3, 3]  # iterations, a block of each stage


def test_a_block_is_few_operations_of_an_export():
    """What PyTorch and ONNX take to make a program grows with their number, ONNX with its square."""
    cfg = RatConfig(embed_dim=32, depths=(2, 1), attn_kernel_size=3)
    model = ResolutionAwareTransformer(cfg, num_classes=3, physical_stem=False).eval()
    inputs, batch = {"spacing": torch.ones(2, 2)}, torch.export.Dim("batch", min=1, max=64)
    dynamic = {"x": {0: batch}, "spacing": {0: batch}}
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), inputs, dynamic_shapes=dynamic, strict=False)

    def count(part):
        modules = [node.meta.get("nn_module_stack", {}).values() for node in program.graph.nodes]
        return len([stack for stack in modules if any(path == part for path, _ in stack)])

    assert 0 < count("stages.0.blocks.1") <= 60
    assert 0 < count("stages.1.downsample") <= 150  # in three iterations


@pytest.mark.slow
def test_compiled_once_for_all_spacings():
    torch._dynamo.reset()
    model = two_stages(physical_stem=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = image(model)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for spacing in (0.5, 0.7, 1.3, 2.9):
            torch.testing.assert_close(compiled(x, spacing=spacing), model(x, spacing=spacing))


@pytest.mark.slow
def test_compiled_training_without_graph_breaks():
    # images are in test_invariances.py, as masked pyramids
    torch._dynamo.reset()
    model = two_stages(spatial_dims=3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 20, 33, 17)
    parameters = list(model.parameters())
    ours, expected = (torch.autograd.grad(f(x).square().sum(), parameters) for f in (compiled, model))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_give_the_same(model):
    x = image(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)


def test_inference_mode_leaves_nothing_behind(model):
    x = image(model)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_leaving_the_meta_device():
    expected = timm.create_model("test_rat", learnable_rose=False).eval()
    model = timm.create_model("test_rat", learnable_rose=False, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(expected.state_dict())
    from timm.models._manipulate import reinit_non_persistent_buffers

    reinit_non_persistent_buffers(model)
    x = torch.randn(1, 3, 40, 40)
    assert torch.equal(model(x), expected(x))


def smooth_scene(model, spacing):
    """One scene of waves, 64 units long along each axis (16 in volumes), sampled at a spacing."""
    extent = 64 if model.cfg.spatial_dims == 2 else 16
    count = round(extent / spacing)
    place = (torch.arange(count) + 0.5) * extent / count
    waves = [
        torch.sin(place / (9 + axis)).view([-1 if a == axis else 1 for a in range(model.cfg.spatial_dims)])
        for axis in range(model.cfg.spatial_dims)
    ]
    return sum(waves).expand(1, model.in_chans, *(count,) * model.cfg.spatial_dims)


@pytest.mark.parametrize("name", NAMES)
def test_a_physical_stem_sees_the_same_scene_at_any_spacing(name):
    model = lively(timm.create_model(name, num_classes=7).eval())
    plain = lively(timm.create_model(name, num_classes=7, physical_stem=False).eval())
    plain.load_state_dict(model.state_dict())
    expected = model.forward_features(smooth_scene(model, 1.0))
    assert torch.equal(expected, plain.forward_features(smooth_scene(model, 1.0), spacing=1.0))
    for spacing in (0.5, 0.8, 1.6):
        found = model.forward_features(smooth_scene(model, spacing), spacing=spacing)
        assert found.shape == expected.shape
        assert (found - expected).norm() < 0.1 * expected.norm()
        other = plain.forward_features(smooth_scene(model, spacing), spacing=spacing)
        assert other.shape != expected.shape or (other - expected).norm() > 0.2 * expected.norm()


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_a_physical_stem_have_one_physical_grid(name):
    model = timm.create_model(name, spacing=0.5).eval()
    size = IMAGE[name][1:]
    axes = len(size)
    told = [0.25, 1.0, 0.75][:axes]
    images = [torch.randn(2, *IMAGE[name]), torch.randn(2, IMAGE[name][0], *(n // 2 for n in size))]
    out = model.forward_intermediates(images[0], spacing=told, output_dict=True)
    for info, level in zip(model.feature_info, out["grids"], strict=True):
        assert level.spacing[0].tolist() == list(info["spacing"])
    known = model.forward_intermediates(images, spacing=[told, [2 * s for s in told]], output_dict=True)
    fine, coarse = known["grids"][0]
    assert torch.equal(coarse.spacing, 2 * fine.spacing)
    # tokens stand on the first pixel of each stride cell; images share their outer corner, at zero
    torch.testing.assert_close(fine.origin, torch.full((1, axes), 0.25, dtype=fine.origin.dtype))
    torch.testing.assert_close(coarse.origin, 2 * fine.origin)


def test_a_physical_stem_takes_a_spacing_per_sample():
    model = lively(timm.create_model("test_rat", num_classes=7).eval())
    x, spacing = torch.randn(2, 3, 40, 56), torch.tensor([[2.0, 1.5], [1.0, 0.5]])
    together = model.forward_intermediates(x, spacing=spacing, output_dict=True)
    alone = model.forward_intermediates(x[:1], spacing=spacing[:1], output_dict=True)
    mask = together["masks"][0]
    assert mask[0].all()
    assert mask[1, :10, :7].all()
    assert mask[1].sum() == 70
    torch.testing.assert_close(together["image_intermediates"][0][:1], alone["image_intermediates"][0])
    assert model(x[:0], spacing=spacing[:0]).shape == (0, 7)
    assert torch.isfinite(model(x[..., :3, :3], spacing=8.0)).all()
    levels, spacings = [x, x[..., ::2, ::2]], [spacing, spacing * torch.tensor([[2.0], [3.0]])]
    both = model(levels, spacing=spacings)
    for i in range(2):
        own = model([level[i : i + 1] for level in levels], spacing=[s[i : i + 1] for s in spacings])
        torch.testing.assert_close(both[i : i + 1], own, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"spacing must be the same for all samples .* or with assignments"):
        model.forward_intermediates(x, spacing=spacing, output_dict=True, return_assignments=True)


def per_level(value):
    return value if isinstance(value, list) else [value]


def sample(value, i):
    """One sample of a batch, as a batch of one; of each level of a pyramid."""
    if isinstance(value, list):
        return [sample(level, i) for level in value]
    return None if value is None else value[i : i + 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_of_several_pixel_sizes_equals_its_items(name, pyramid, seed):
    torch.manual_seed(seed)
    model = lively(timm.create_model(name, num_classes=7).eval())
    axes, batch = model.spatial_dims, 3
    size = torch.randint(9, (60, 28)[axes - 2], (axes,)).tolist()
    x, spacing, mask = torch.randn(batch, model.in_chans, *size), 0.5 * 3 ** torch.rand(batch, axes), None
    spacing[1] = spacing[0]  # two samples share a grid
    if pyramid:
        x, spacing = [x, torch.randn(batch, model.in_chans, *(n // 2 + 1 for n in size))], [spacing, 2.5 * spacing]
        mask = [torch.rand(batch, *level.shape[2:]) < 0.8 for level in x]
    together = model.forward_intermediates(x, spacing=spacing, mask=mask, output_dict=True)
    logits = model(x, spacing=spacing, mask=mask)
    for i in range(batch):
        image, told = sample(x, i), {"spacing": sample(spacing, i), "mask": sample(mask, i)}
        torch.testing.assert_close(logits[i : i + 1], model(image, **told), rtol=1e-4, atol=1e-4)
        alone = model.forward_intermediates(image, output_dict=True, **told)
        for stage, own, masks in zip(
            together["image_intermediates"], alone["image_intermediates"], together["masks"], strict=True
        ):
            for whole, part, valid in zip(per_level(stage), per_level(own), per_level(masks), strict=True):
                inside = tuple(slice(n) for n in part.shape[2:])
                torch.testing.assert_close(whole[(slice(i, i + 1), slice(None), *inside)], part, rtol=1e-4, atol=1e-4)
                assert valid is None or int(valid[i].sum()) == int(valid[(i, *inside)].sum())  # the fill is masked


def test_samples_of_one_size_are_one_part():
    model = lively(timm.create_model("test_rat", num_classes=7).eval())
    x, spacing = torch.randn(4, 3, 40, 56), torch.tensor([0.7, 0.7 + 1e-7, 1.4, 0.7]).double()[:, None].expand(4, 2)
    calls = []
    model.stem.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    together = model(x, spacing=spacing)
    assert sorted(calls) == [1, 3]
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], model(x[i : i + 1], spacing=spacing[i]), rtol=1e-4, atol=1e-5)
    near = spacing[:2]
    maps = timm.create_model("test_rat", features_only=True)(x[:2], spacing=near)
    assert [m.shape[0] for m in maps] == [2] * 4


def test_geometry_in_half_precision_is_refused():
    model = timm.create_model("test_rat").eval()
    grid = rat_timm.Grid.create((4, 4))
    with pytest.raises(ValueError, match=r"spacing must be float32 or float64 inside the model, got torch\.bfloat16"):
        grid._replace(spacing=grid.spacing.bfloat16()).positions(grid.origin, (1.0, 1.0))
    positions = grid.positions(grid.origin, (1.0, 1.0))
    halved = positions._replace(offset=tuple(o.bfloat16() for o in positions.offset))
    with pytest.raises(ValueError, match="positions must be float32 or float64"):
        model.stages[0].blocks[0].attn.rose.rotation(halved, torch.bfloat16)


def test_spacings_that_decide_sizes_cannot_be_mapped_over():
    model, x = timm.create_model("test_rat").eval(), torch.randn(1, 3, 40, 56)
    with pytest.raises(ValueError, match="spacing must be numbers, not a tensor"):
        torch.func.vmap(lambda spacing: model(x, spacing=spacing))(torch.rand(3, 2) + 0.5)


@pytest.mark.parametrize("mask", [[torch.ones(1, 2, 2, dtype=torch.bool)], 1])
def test_masks_of_maps_are_tensors(mask):
    model = timm.create_model("test_rat").eval()
    with pytest.raises(ValueError, match="mask"):
        model.forward_head(model.forward_features(torch.randn(1, 3, 40, 56)), mask=mask)


def test_maps_that_do_not_tell_their_grids_have_one():
    backbone = timm.create_model("test_rat", features_only=True).eval()
    x = torch.randn(2, 3, 40, 56)
    assert len(backbone(x, spacing=[[2.0, 2.0], [2.0, 2.0]])) == 4
    for call in (backbone, backbone.model.forward_intermediates):
        with pytest.raises(ValueError, match="spacing must be the same for all samples"):
            call(x, spacing=[[2.0, 2.0], [1.0, 1.0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_spacing_in_a_wrong_unit_does_not_fill_the_memory(name):
    model = timm.create_model(name, spacing=0.5).eval()
    x = torch.randn(1, *IMAGE[name])
    with pytest.raises(ValueError, match=r"spacing would make \d+ x .* more than the limit of 16777216"):
        model(x, spacing=500.0)
    assert rat_timm.resample_limit() == 2**24
    try:
        rat_timm.set_resample_limit(100)
        with pytest.raises(ValueError, match="more than the limit of 100"):
            model(x, spacing=2.0)
        assert torch.isfinite(model(x, spacing=0.51)).all()  # grows by less than four times
    finally:
        rat_timm.set_resample_limit(2**24)
    with pytest.raises(ValueError, match="pixels must be"):
        rat_timm.set_resample_limit(0)


@pytest.mark.parametrize("name", NAMES)
def test_spacings_that_overflow_are_refused(name):
    model, x = timm.create_model(name, physical_stem=False).eval(), torch.randn(1, *IMAGE[name])
    for spacing in (1e30, torch.full((1, model.spatial_dims), 1e30, dtype=torch.float64), 9e-31, 1e-320):
        with pytest.raises(ValueError, match=r"spacing must be positive and from 1e-30 to 1e\+30"):
            model(x, spacing=spacing)
    assert torch.isfinite(model(x, spacing=9e29)).all()


@pytest.mark.parametrize("name", NAMES)
def test_spacings_can_be_mapped_over(name):
    model, x = timm.create_model(name, num_classes=5, physical_stem=False).eval(), torch.randn(1, *IMAGE[name])
    spacings = 0.5 + torch.rand(3, model.spatial_dims)
    mapped = torch.func.vmap(lambda spacing: model(x, spacing=spacing))(spacings)
    for out, spacing in zip(mapped, spacings, strict=True):
        torch.testing.assert_close(out, model(x, spacing=spacing), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_a_physical_stem_compiles_with_numbers():
    torch.compiler.reset()
    cfg = RatConfig(embed_dim=32, depths=(1,), attn_kernel_size=3)
    model = ResolutionAwareTransformer(cfg, num_classes=3).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 3, 32, 48)
    for spacing in ((2.0, 1.4), (0.7, 2.2)):
        torch.testing.assert_close(compiled(x, spacing=spacing), model(x, spacing=spacing), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="spacing must be numbers"):
        compiled(x, spacing=torch.tensor([[2.0, 1.4]]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_strides_give_denser_maps_of_the_same_weights(name, output_stride):
    x = torch.randn(1, *IMAGE[name])
    whole = lively(timm.create_model(name, num_classes=0).eval())
    dense = timm.create_model(name, num_classes=0, output_stride=output_stride).eval()
    dense.load_state_dict(whole.state_dict())
    expected, found = (m.forward_intermediates(x, output_dict=True) for m in (whole, dense))
    for info, grid, a, b in zip(
        dense.feature_info, found["grids"], expected["image_intermediates"], found["image_intermediates"], strict=True
    ):
        stride = min(output_stride, 2 ** (2 + info_index(dense, info)))
        assert info["reduction"] == stride
        assert b.shape[2:] == tuple(-(-n // stride) for n in x.shape[2:]) == grid.shape
        assert grid.spacing[0].tolist() == list(info["spacing"]) == [stride] * (x.ndim - 2)
        if stride == 2 ** (2 + info_index(dense, info)):
            torch.testing.assert_close(a, b)
    if output_stride == 32:
        assert torch.equal(whole(x), dense(x))
    assert dense.model_args()["output_stride"] == output_stride


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_token_gets_gradients_and_hides_what_is_masked(name):
    model = lively(timm.create_model(name, num_classes=0, mask_token=True).eval())
    x = torch.randn(2, *IMAGE[name])
    mask = torch.ones(2, *x.shape[2:], dtype=torch.bool)
    mask[:, :, 8:] = False
    out = model.forward_intermediates(x, mask=mask, output_dict=True)
    assert out["masks"] == [None] * 4
    hidden = out["image_intermediates"][0][:, :, :, 2:]
    assert hidden.abs().amin(dim=1).max() > 0  # tokens stand there
    hidden.sum().backward()
    assert model.stem.mask_token.grad.abs().sum() > 0
    other = torch.where(mask[:, None], x, torch.nan)
    assert torch.equal(model(other, mask=mask), model(x, mask=mask))
    assert not torch.allclose(model(x), model(x, mask=mask))
    assert "stem.mask_token" in model.no_weight_decay()


def test_weights_go_between_models_with_and_without_a_mask_token():
    plain, hiding = (timm.create_model("test_rat", mask_token=token).eval() for token in (False, True))
    x = torch.randn(1, 3, 32, 32)
    for source, target in ((plain, {"mask_token": True}), (hiding, {})):
        loaded = timm.create_model("test_rat", **target).eval()
        loaded.load_state_dict(checkpoint_filter_fn(source.state_dict(), loaded))
        assert torch.equal(loaded(x), source(x))


def info_index(model, info):
    return model.feature_info.index(info)


def test_a_denser_grouping_starts_from_the_same_taps():
    """Every second group of the undone stride starts from what the whole stride starts it from."""
    x = torch.randn(1, 3, 64, 64)
    whole = timm.create_model("test_rat", num_classes=0).eval()
    dense = timm.create_model("test_rat", num_classes=0, output_stride=8).eval()
    dense.load_state_dict(whole.state_dict())
    seen = [[], []]
    for model, starts in zip((whole, dense), seen, strict=True):
        for stage in model.stages[1:]:
            stage.downsample.sga.strider.register_forward_hook(lambda m, args, out, starts=starts: starts.append(out))
        model(x)
    torch.testing.assert_close(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1][..., ::2, ::2])


@pytest.mark.parametrize(("axes", "size", "larger"), [(2, 56, 96), (3, 40, 64)])
@torch.no_grad()
def test_the_last_stage_sees_the_whole_field_of_training_and_no_more(axes, size, larger):
    """With a stride of 8 windows of 7 cover 56 pixels, of 5 40; levels meet whatever their size."""
    cfg = RatConfig(axes, embed_dim=(32, 32), depths=(1, 2))
    windows = lively(ResolutionAwareTransformer(cfg, in_chans=1, num_classes=0, global_pool="").eval())
    changed = {"attn_kernel_size": (cfg.stages()[0].attn_kernel_size[0], 0)}
    everywhere = ResolutionAwareTransformer(cfg, in_chans=1, num_classes=0, global_pool="", **changed).eval()
    everywhere.load_state_dict(windows.state_dict())
    x, y = torch.randn(1, 1, *[size] * axes), torch.randn(1, 1, *[larger] * axes)
    torch.testing.assert_close(windows(x), everywhere(x), rtol=0, atol=1e-5)
    assert (windows(y) - everywhere(y)).abs().max() > 1e-3
    for a, b in zip(windows([y, x]), everywhere([y, x]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    apart = ResolutionAwareTransformer(cfg, in_chans=1, num_classes=0, global_pool="", joint_attention=False).eval()
    apart.load_state_dict(windows.state_dict())
    for level, alone in zip(apart([y, y]), [y, y], strict=True):
        torch.testing.assert_close(level, windows(alone), rtol=0, atol=1e-5)
