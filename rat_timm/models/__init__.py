"""The families of models; importing this package registers them with timm.

**Compiling.** ``torch.compile(fullgraph=True)`` and ``torch.export`` work. Each image size is a program of its own, and
so is each spacing where the stem or the patches are physical, which must then be numbers
(``physical_stem=False`` makes a RAT whose programs take the spacing as an input): give
``torch.compile(dynamic=False)``, and for more than eight sizes raise ``torch._dynamo.config.recompile_limit``. Inside a
compiled model the values of a spacing tensor are not checked. ``torch.jit.trace`` works for one image size;
``torch.jit.script`` does not.

**ONNX** (extra ``export``) takes any batch size, and the spacing as an input unless the stem is physical, as it is by
default:

    model = timm.create_model("rat_tiny", physical_stem=False)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        model.eval(),
        (torch.randn(2, 3, 224, 224),),
        kwargs={"spacing": torch.ones(2, 2)},
        dynamic_shapes={"x": {0: batch}, "spacing": {0: batch}},
        dynamo=True,
        optimize=False,
    )
    program.save("model.onnx")

onnxruntime optimises what it loads, so that the exporter need not: its optimiser takes time that grows with the square
of the number of operations (``examples/benchmarks.md`` has times).

**Hooks.** A forward hook on ``model.stages[i]`` of a ``rat_tiny``, say, gets the map that ``features_only`` gives, so
that timm's ``feature_cls="hook"``, torchvision's ``create_feature_extractor(model, {"stages.2": "map"})``, class
activation maps and captum work on stages.
"""

from .apvit import AdaptiveVit
from .rat import RatConfig, ResolutionAwareTransformer
from .rope_vit import RatVit

__all__ = ["AdaptiveVit", "RatConfig", "RatVit", "ResolutionAwareTransformer"]
