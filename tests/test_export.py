"""Programs and ONNX files of models: any batch, spacing as an input."""

import pytest
import timm
import torch

import rat_timm  # noqa: F401
from helpers import slow
from rat_timm.models.rat.config import RatConfig
from rat_timm.models.rat.model import ResolutionAwareTransformer

SIZES = {2: (64, 96), 3: (16, 32, 32)}


@pytest.mark.parametrize("name", ["test_rat", *map(slow, ["test_rat_3d", "rat_nat_tiny"])])
def test_programs_and_onnxruntime_give_what_the_model_gives(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    two_stages = {
        "embed_dim": 32,
        "depths": (1, 1),
        "initial_frequency": 1.0,
    }  # hold each part once, since exports are slow
    model = timm.create_model(name, num_classes=7, physical_stem=False, **two_stages).eval()
    axes = model.spatial_dims
    x, spacing = torch.randn(2, model.in_chans, *SIZES[axes]), torch.rand(2, axes) + 0.5
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {"x": {0: batch}, "spacing": {0: batch}}
    exported = torch.export.export(model, (x,), {"spacing": spacing}, dynamic_shapes=dynamic, strict=False)
    names = {"input_names": ["image", "spacing"], "output_names": ["logits"]}
    written = torch.onnx.export(exported, dynamo=True, optimize=False, verbose=False, **names)
    written.save(tmp_path / "model.onnx")
    # sums by scatter are not safe there: threads write to one place
    assert not [node for node in written.model.graph if node.op_type.startswith("Scatter")]
    session, program = runtime.InferenceSession(tmp_path / "model.onnx"), exported.module()
    for count, size in ((1, 0.4), (1, 3.0), (5, 0.4), (5, 3.0)):
        x, spacing = torch.randn(count, *x.shape[1:]), torch.full((count, spacing.shape[1]), size)
        with torch.no_grad():
            expected = model(x, spacing=spacing)
        torch.testing.assert_close(program(x, spacing=spacing), expected)
        (logits,) = session.run(None, {"image": x.numpy(), "spacing": spacing.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("axes", "strict"), [slow(2, True), (3, False)])
def test_exported_operations_give_what_the_eager_ones_give(axes, strict):
    """With masks, cut-off cells, tiles that repeat tokens, and heads without a rotation."""
    cfg = RatConfig(
        spatial_dims=axes, embed_dim=32, num_heads=(2, 4), depths=(1, 1), attn_kernel_size=3, rotary_ratio=0.5, iters=1
    )
    model = ResolutionAwareTransformer(cfg, in_chans=1, num_classes=3).eval()
    sizes = (37, 42, 45) if axes == 3 else (85, 90)  # groupings of fewer tokens are one tile
    x, mask = torch.randn(2, 1, *sizes), torch.ones(2, *sizes, dtype=torch.bool)
    mask[0, 20:], mask[1, :, :30] = False, False
    batch = torch.export.Dim("batch", min=1, max=64)
    dynamic = {"x": {0: batch}, "mask": {0: batch}}
    program = torch.export.export(model, (x,), {"mask": mask}, dynamic_shapes=dynamic, strict=strict).module()
    x, mask = torch.randn(3, 1, *sizes), torch.cat((mask, mask[:1]))
    with torch.no_grad():
        torch.testing.assert_close(program(x, mask=mask), model(x, mask=mask))
