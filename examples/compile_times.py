"""How long torch.compile takes for the first call of models, how fast the result is, and whether it is right.

    python examples/compile_times.py swin_tiny_patch4_window7_224 rat_tiny rat_tiny_3d

Each model has a process of its own, no cache, and one compiler job at a time, so that processor seconds tell what the
work is on a machine that does other work too.
"""

import argparse
import os
import resource
import subprocess
import sys
import time

SETTINGS = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main() -> None:
    """Measures each model in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, help="length of all axes; default: the model's own")
    args = parser.parse_args()
    if os.environ.items() >= SETTINGS.items():
        for name in args.models:
            print(measure(name, args.batch_size, args.size), flush=True)
        return
    for name in args.models:
        options = [f"--batch-size={args.batch_size}", *([f"--size={args.size}"] if args.size else [])]
        subprocess.run([sys.executable, __file__, name, *options], env={**os.environ, **SETTINGS}, check=True)


def measure(name: str, batch_size: int, size: int | None) -> str:
    """Compiles a model at its first call and describes what came of it."""
    import timm
    import torch

    import rat_timm  # noqa: F401

    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, *sizes = model.pretrained_cfg["input_size"]
    x = torch.randn(batch_size, channels, *([size] * len(sizes) if size else sizes))
    compiled = torch.compile(model, fullgraph=True)
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
