"""How long torch.compile takes for the first call of models, how fast the result is, and whether it is right.

    python examples/compile_times.py swin_tiny_patch4_window7_224 rat_tiny rat_tiny_3d
    python examples/compile_times.py --onnx rat_tiny

With ``--onnx``: how long torch.export and torch.onnx.export take, for any batch and with the spacing as an input, how
many operations there are, and whether onnxruntime gives what the model gives (one and three samples, two spacings).

Each model has a process of its own, no cache, and one compiler job at a time, so that processor seconds tell what the
work is on a machine that does other work too.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time

SETTINGS = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main() -> None:
    """Measures each model in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--backend", default="inductor", help='of torch.compile; "eager" times the tracing alone')
    parser.add_argument("--onnx", action="store_true", help="export instead (extra export)")
    parser.add_argument("--optimize", action="store_true", help="with --onnx: run the exporter's optimiser too")
    parser.add_argument("--size", type=int, help="length of all axes; default: the model's own")
    args = parser.parse_args()
    if os.environ.items() >= SETTINGS.items():
        for name in args.models:
            if args.onnx:
                print(measure_onnx(name, args.size, args.optimize), flush=True)
            else:
                print(measure(name, args.batch_size, args.size, args.backend), flush=True)
        return
    for name in args.models:
        options = [
            f"--batch-size={args.batch_size}",
            f"--backend={args.backend}",
            *([f"--size={args.size}"] if args.size else []),
        ]
        options += [f"--{flag}" for flag in ("onnx", "optimize") if getattr(args, flag)]
        subprocess.run([sys.executable, __file__, name, *options], env={**os.environ, **SETTINGS}, check=True)


def measure(name: str, batch_size: int, size: int | None, backend: str) -> str:
    """Compiles a model at its first call and describes what came of it."""
    import timm
    import torch

    import rat_timm  # noqa: F401

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, *sizes = model.pretrained_cfg["input_size"]
    x = torch.randn(batch_size, channels, *([size] * len(sizes) if size else sizes))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        expected, wall, work = model(x), time.perf_counter(), _work()
        result = compiled(x)
        wall, work = time.perf_counter() - wall, _work() - work
        eager, fast = _fastest(lambda: model(x), lambda: compiled(x))
    return (
        f"{name:36} compiled in {wall:6.1f} s (processor {work:6.1f} s), "
        f"differs by {float((result - expected).abs().max()):.1e} of {float(expected.abs().max()):.2f}, "
        f"forward {eager * 1e3:.0f} ms -> {fast * 1e3:.0f} ms"
    )


def measure_onnx(name: str, size: int | None, optimize: bool) -> str:
    """Exports a model for any batch, with the spacing as an input, and describes what came of it."""
    import onnxruntime
    import timm
    import torch

    import rat_timm  # noqa: F401

    torch.manual_seed(0)
    model = timm.create_model(name, physical_stem=False).eval()
    channels, *sizes = model.pretrained_cfg["input_size"]
    sizes = [size] * len(sizes) if size else sizes
    batch, start = torch.export.Dim("batch", min=1, max=64), _work()
    program = torch.export.export(
        model,
        (torch.randn(2, channels, *sizes),),
        {"spacing": torch.ones(2, len(sizes))},
        dynamic_shapes={"x": {0: batch}, "spacing": {0: batch}},
        strict=False,
    )
    exported = _work()
    names = {"input_names": ["image", "spacing"], "output_names": ["logits"]}
    written = torch.onnx.export(program, dynamo=True, optimize=optimize, verbose=False, **names)
    converted, difference = _work(), 0.0
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        written.save(f"{folder}/model.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
        for count, value in ((1, 0.5), (1, 2.0), (3, 0.5), (3, 2.0)):
            x, spacing = torch.randn(count, channels, *sizes), torch.full((count, len(sizes)), value)
            (logits,) = session.run(None, {"image": x.numpy(), "spacing": spacing.numpy()})
            difference = max(difference, float((torch.from_numpy(logits) - model(x, spacing=spacing)).abs().max()))
    return (
        f"{name:36} processor {exported - start:.1f} s for torch.export ({len(program.graph.nodes)} nodes), "
        f"{converted - exported:.1f} s for torch.onnx.export ({len(list(written.model.graph))} nodes"
        f"{', optimised' if optimize else ''}), onnxruntime differs by {difference:.1e}"
    )


def _work() -> float:
    """Returns the processor seconds of this process and of those that it ran and waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def _fastest(*functions, repeats: int = 7) -> list[float]:
    """Returns each function's shortest time, taking turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, own in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            own.append(time.perf_counter() - start)
    return [min(own) for own in times]


if __name__ == "__main__":
    main()
