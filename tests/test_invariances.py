"""What must not matter does not: units, where zero is, the order of levels, what stands in masked pixels, the batch."""

import functools
import threading

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import lively, slow
from rat_timm import RatConfig, ResolutionAwareTransformer
from rat_timm.layers import compose

PIXELS = {"physical_stem": False, "group_width": "fine", "iters": 3}
CASES = {
    "2d": ("test_rat", {}),
    "2d narrow": ("test_rat", {"group_attn_width": "fine"}),
    "2d pooled": ("test_rat", {"stem_kernel_size": (7,), "stem_pool": True}),
    "2d conv": ("test_rat", {"block_types": ("conv", "conv", "attention", "attention")}),
    "2d dense": ("test_rat", {**PIXELS, "sga_attention_type": "dense", "reg_tokens": 2}),
    "3d": ("test_rat_3d", {}),
    "3d conv": ("test_rat_3d", {"block_types": ("conv", "attention", "conv", "attention"), "conv_kernel_size": 3}),
    "3d thick": ("test_rat_3d", {"group_width": "coarse", "stem_stride": (1, 4, 4), "reg_tokens": 1}),
    "3d pooled": ("test_rat_3d", {"stem_kernel_size": (5,), "stem_stride": (1, 4, 4), "stem_pool": True}),
    "classic": ("rat_classic", {"embed_dim": (32,) * 4, "num_heads": 4}),
}
VIT = {"depth": 2, "spacing": 1.0}
PLAIN_CASES = {
    "dinov3": ("rat_vit_small_patch16_dinov3", {**VIT, "img_size": 32}),
    "mixed": ("rat_vit_small_patch16_rope_mixed_224", {**VIT, "img_size": 48}),
    "axial": ("rat_vit_small_patch16_rope_224", {**VIT, "img_size": 48, "global_pool": "token"}),
    "stretched": ("rat_vit_medium_patch16_rope_reg1_gap_256", {**VIT, "img_size": 64, "embed_dim": 128}),
    "eva02": ("rat_eva02_tiny_patch14_224", {**VIT, "img_size": 28}),
    "perception": ("rat_vit_pe_core_tiny_patch16_384", {**VIT, "img_size": 32}),
    "3d dinov3": ("rat_vit_small_patch16_dinov3", {**VIT, "spatial_dims": 3, "patch_depth": 4, "in_chans": 1}),
    "3d mixed": ("rat_vit_small_patch16_rope_mixed_224", {**VIT, "spatial_dims": 3, "patch_depth": 5}),
    "3d eva02": ("rat_eva02_tiny_patch14_224", {**VIT, "spatial_dims": 3, "patch_depth": 6, "global_pool": "avgmax"}),
}
SIZES = {2: [(33, 40), (20, 17)], 3: [(9, 20, 17), (8, 12, 12)]}
cases = pytest.mark.parametrize("case", CASES)
all_cases = pytest.mark.parametrize("case", [*CASES, *PLAIN_CASES])


@functools.cache
def build(case):
    torch.manual_seed(0)
    return lively(create(case))


def create(case, **changed):
    name, kwargs = (CASES | PLAIN_CASES)[case]
    return timm.create_model(name, **{"num_classes": 5, **kwargs, **changed}).eval()


def levels(model, batch=2):
    return [torch.randn(batch, model.in_chans, *size) for size in SIZES[model.spatial_dims]]


def geometry(model, batch=2):
    """Spacing and origin per level and sample."""
    axes = model.spatial_dims
    spacing = [torch.rand(batch, axes) + 0.5, 2 * torch.rand(batch, axes) + 0.5]
    return spacing, [3 * torch.randn(batch, axes), 3 * torch.randn(batch, axes)]


def random_masks(images, share=0.6):
    return [torch.rand(x.shape[0], *x.shape[2:]) < share for x in images]


def assert_close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@all_cases
@settings(max_examples=5, deadline=None)
@given(shift=st.floats(-1e5, 1e5), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_a_common_shift_of_all_origins(case, shift, seed):
    torch.manual_seed(seed)
    model = build(case)
    images, (spacing, origin) = levels(model), geometry(model)
    expected = model(images, spacing=spacing, origin=origin)
    assert_close(model(images, spacing=spacing, origin=[o.double() + shift for o in origin]), expected)


@all_cases
@settings(max_examples=4, deadline=None)
@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_units_of_length(case, factor, seed):
    torch.manual_seed(seed)
    model = build(case)
    other = create(case, spacing=factor)
    other.load_state_dict(model.state_dict())
    images, (spacing, origin) = levels(model), geometry(model)
    scaled = [s.double() * factor for s in spacing], [o.double() * factor for o in origin]
    assert_close(other(images, spacing=scaled[0], origin=scaled[1]), model(images, spacing=spacing, origin=origin))


@all_cases
@torch.no_grad()
def test_the_order_of_levels(case):
    model = build(case)
    images, (spacing, origin), masks = levels(model), geometry(model), random_masks(levels(model))
    given_ = {"spacing": spacing, "origin": origin, "mask": masks}
    swapped = {name: value[::-1] for name, value in given_.items()}
    assert_close(model(images[::-1], **swapped), model(images, **given_))
    features = model.forward_features(images, **given_)
    for a, b in zip(model.forward_features(images[::-1], **swapped), features[::-1], strict=True):
        assert_close(a, b)


@all_cases
@torch.no_grad()
def test_a_pyramid_of_one_is_the_image(case):
    model = build(case)
    image, mask = levels(model)[0], random_masks(levels(model))[0]
    assert torch.equal(model([image], mask=[mask], spacing=[0.7]), model(image, mask=mask, spacing=0.7))
    (features,) = model.forward_features([image])
    assert torch.equal(features, model.forward_features(image))


@all_cases
@torch.no_grad()
def test_levels_see_each_other(case):
    model = build(case)
    images = levels(model)
    expected = model.forward_features(images)[0]
    images[1] = images[1] + 1
    assert (model.forward_features(images)[0] - expected).abs().max() > 1e-3


@all_cases
@settings(max_examples=4, deadline=None)
@given(share=st.sampled_from([0.02, 0.3, 0.7, 0.95]), seed=st.integers(0, 2**31))
@torch.no_grad()
def test_masked_pixels_change_no_bit(case, share, seed):
    torch.manual_seed(seed)
    model = build(case)
    images = levels(model)
    masks = random_masks(images, share)
    masks[0][0] = False
    masks[0][0, ..., :5] = True
    expected = model.forward_intermediates(images, mask=masks, output_dict=True)
    logits = model(images, mask=masks)
    single = model(images[0], mask=masks[0])
    assert torch.isfinite(logits).all()
    for fill in (float("nan"), float("inf"), -float("inf"), None):
        dirty = [
            torch.where(m.unsqueeze(1), x, torch.randn_like(x) if fill is None else fill)
            for x, m in zip(images, masks, strict=True)
        ]
        assert torch.equal(model(dirty, mask=masks), logits)
        assert torch.equal(model(dirty[0], mask=masks[0]), single)
        out = model.forward_intermediates(dirty, mask=masks, output_dict=True)
        for ours, theirs in zip(out["image_intermediates"], expected["image_intermediates"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@all_cases
@torch.no_grad()
def test_masked_places_of_maps_are_zero_and_valid_ones_are_not(case):
    model = build(case)
    images = levels(model)
    masks = random_masks(images, 0.05)
    masks[1][:, : images[1].shape[2] // 2] = False
    out = model.forward_intermediates(images, mask=masks, output_dict=True)
    for maps, valid in zip(out["image_intermediates"], out["masks"], strict=True):
        for features, mask in zip(maps, valid, strict=True):
            assert features.movedim(1, -1)[~mask].abs().sum() == 0
            assert (features.movedim(1, -1)[mask].abs().sum(-1) > 0).all()


@cases
@torch.no_grad()
def test_no_valid_pixel_gives_finite_zeros(case):
    model = build(case)
    image = levels(model)[0] * float("nan")
    mask = torch.zeros(2, *image.shape[2:], dtype=torch.bool)
    assert model.forward_features(image, mask=mask).abs().max() == 0
    assert torch.isfinite(model(image, mask=mask)).all()
    assert model.forward_head(model.forward_features(image, mask=mask), pre_logits=True).abs().max() == 0


def test_no_valid_pixel_gives_finite_gradients():
    model = lively(timm.create_model("test_rat", num_classes=5))
    image = torch.randn(2, 3, 33, 40, requires_grad=True)
    mask = torch.ones(2, 33, 40, dtype=torch.bool)
    mask[0] = False
    model(image, mask=mask).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert image.grad[0].abs().max() == 0
    assert image.grad[1].abs().max() > 0


@all_cases
@torch.no_grad()
def test_full_masks_are_no_masks(case):
    model = build(case)
    images = levels(model)
    masks = [torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool) for x in images]
    assert_close(model(images, mask=masks), model(images), atol=1e-5)
    assert_close(model(images[0], mask=masks[0].float()), model(images[0]), atol=1e-5)


@all_cases
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
@torch.no_grad()
def test_samples_of_a_batch_do_not_meet(case, seed):
    torch.manual_seed(seed)
    model = build(case)
    images, (spacing, origin) = levels(model, 3), geometry(model, 3)
    masks = random_masks(images)
    together = model(images, spacing=spacing, origin=origin, mask=masks)
    for i in range(3):
        part = slice(i, i + 1)
        picked = {"spacing": spacing, "origin": origin, "mask": masks}
        alone = model([x[part] for x in images], **{k: [v[part] for v in vs] for k, vs in picked.items()})
        assert_close(alone, together[part])


@pytest.mark.parametrize(
    ("name", "stem_stride", "overview", "crop"),
    [("test_rat", 4, (101, 77), (65, 139)), ("test_rat_3d", (1, 4, 4), (27, 70, 101), (17, 65, 41))],
)
def test_a_landmark_has_one_coordinate_in_crop_and_overview(name, stem_stride, overview, crop):
    model = timm.create_model(name, stem_stride=stem_stride, device="meta").eval()
    strides = [info["stride"] for info in model.feature_info]
    axes, last = len(overview), torch.tensor(strides[-1])
    fine, ratio = torch.tensor([0.25, 0.5, 0.125][:axes], dtype=torch.float64), 4
    start = torch.tensor([7.0, -3.5, 1.25][:axes], dtype=torch.float64)
    images = [torch.randn(1, model.in_chans, *size) for size in (overview, crop)]
    # with the reference spacing of the finer level nothing is resampled
    model = timm.create_model(name, stem_stride=stem_stride, spacing=fine.tolist()).eval()
    # the crop's first pixel lies on the overview's pixel number `last`
    origin = [start, start + last * fine * ratio]
    with torch.no_grad():
        out = model.forward_intermediates(images, spacing=[fine * ratio, fine], origin=origin, output_dict=True)
    for stride, (wide, narrow) in zip(strides, out["grids"], strict=True):
        here, there = tuple(last // torch.tensor(stride)), (0,) * axes
        assert torch.equal(wide.coordinates()[(0, *here)], narrow.coordinates()[(0, *there)])
        assert torch.equal(wide.coordinates()[(0, *here)], origin[1])
        if all(n > ratio * i for n, i in zip(narrow.shape, here, strict=True)):
            here, there = tuple(2 * i for i in here), tuple(ratio * i for i in here)
            assert torch.equal(wide.coordinates()[(0, *here)], narrow.coordinates()[(0, *there)])


@pytest.mark.parametrize("case", ["2d dense", "3d thick"])
@torch.no_grad()
def test_prefix_tokens_join_in_global_attention_only(case):
    model = build(case)
    images = levels(model)
    out = model.forward_intermediates(images, output_dict=True)
    count = model.cfg.prefix_tokens
    assert out["prefix"].shape == (2, count, model.num_features)
    tokens = model.stages[3].reg_tokens.clone()
    model.stages[3].reg_tokens.add_(torch.randn_like(tokens))
    other = model.forward_intermediates(images, output_dict=True)
    model.stages[3].reg_tokens.copy_(tokens)
    for stage in range(4):
        same = [
            torch.equal(a, b)
            for a, b in zip(out["image_intermediates"][stage], other["image_intermediates"][stage], strict=True)
        ]
        assert same == [stage < 3] * 2
    head = timm.create_model(CASES[case][0], num_classes=5, global_pool="token", **CASES[case][1]).eval()
    head.load_state_dict(model.state_dict())
    assert_close(head(images), head.head.fc(out["prefix"][:, 0]))


@torch.no_grad()
def test_compiled_pyramids_with_masks():
    """Two stages have all parts."""
    torch._dynamo.reset()
    two_stages = {"embed_dim": 32, "depths": (1, 1)}
    model = lively(timm.create_model("test_rat_3d", physical_stem=False, **two_stages).eval())
    images, (spacing, origin) = levels(model), geometry(model)
    given_ = {"spacing": spacing, "origin": origin, "mask": random_masks(images)}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(images, **given_), model(images, **given_))


@pytest.mark.slow
def test_compiled_training_on_masked_pyramids():
    """Two stages have all parts."""
    torch._dynamo.reset()
    cfg = RatConfig(embed_dim=32, depths=(1, 1), physical_stem=False)
    model = lively(ResolutionAwareTransformer(cfg, num_classes=3).double().train())
    images, (spacing, origin) = [x.double() for x in levels(model)], geometry(model)
    given_ = {"spacing": spacing, "origin": origin, "mask": random_masks(images)}

    def grads(run):
        model.zero_grad()
        run(images, **given_).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for ours, expected in zip(
        grads(torch.compile(model, fullgraph=True, backend="aot_eager")), grads(model), strict=True
    ):
        torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_features_only_takes_everything():
    backbone = timm.create_model("test_rat", features_only=True, physical_stem=False).eval()
    images, (spacing, origin) = levels(backbone.model), geometry(backbone.model)
    given_ = {"spacing": spacing, "origin": origin, "mask": random_masks(images)}
    expected = backbone.model.forward_intermediates(images, intermediates_only=True, **given_)
    for ours, theirs in zip(backbone(images, **given_), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_nothing_is_remembered_between_calls():
    model = build("2d")
    calls = [(size, s) for size in [(33, 40), (64, 20)] for s in (0.5, 1.0)]
    images = {size: torch.randn(1, 3, *size) for size, _ in calls}
    fresh = {c: lively_copy(model)(images[c[0]], spacing=c[1]) for c in calls}
    for call in [*calls, *reversed(calls)]:
        assert torch.equal(model(images[call[0]], spacing=call[1]), fresh[call])
    double = lively_copy(model).double()
    assert_close(double(images[33, 40].double()).float(), model(images[33, 40]))
    assert torch.equal(double.float()(images[33, 40]), model(images[33, 40]))


def lively_copy(model):
    copy = timm.create_model("test_rat", num_classes=5).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@torch.no_grad()
def test_two_threads_share_a_model():
    model = build("2d")
    images = [torch.randn(1, 3, 33 + 7 * i, 40) for i in range(4)]
    expected = [model(x, spacing=i + 1.0) for i, x in enumerate(images)]
    found = [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = model(images[i], spacing=i + 1.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-6)


def train(model, sizes, steps, autocast):
    torch.manual_seed(0)
    labels, colour = torch.tensor([0, 1]), torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    images = [colour + torch.randn(2, 3, n, n) for n in sizes]
    masks = random_masks(images, 0.8)
    spacing = torch.tensor([[1.0, 1.0], [0.5, 0.7]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images, spacing=spacing, mask=masks)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "sizes", "steps", "autocast"),
    [
        ("rat_tiny", (96, 48, 32), 2, False),
        # a CPU without bfloat16 units takes half a minute for a step of 256; of 16 pixels stage 4 would have one place,
        # where PyTorch 2.14's gradient of a convolution in bfloat16 on a CPU is uninitialised memory
        slow("rat_tiny", (64, 32, 24), 2, True),
        slow("test_rat", (128, 96, 64), 20, True),
    ],
)
def test_training_on_a_pyramid(name, sizes, steps, autocast):
    losses = train(timm.create_model(name, num_classes=2), sizes, steps, autocast)
    assert losses[-1] < (0.5 if steps == 20 else 1.0) * losses[0]


@torch.no_grad()
def test_assignments_of_a_pyramid():
    model = timm.create_model("test_rat").eval()
    images = levels(model)
    masks = random_masks(images, 0.3)
    out = model.forward_intermediates(images, mask=masks, output_dict=True, return_assignments=True)
    for level in range(2):
        shares = compose([per_level[level] for per_level in out["assignments"]])
        assert_close(shares.sum(-1), out["masks"][0][level].float())
