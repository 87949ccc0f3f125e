"""How fast and how large: models and operations against their peers, alternated in one run.

    python examples/benchmark.py --models rat_tiny --peers swin_tiny_patch4_window7_224 hiera_tiny_224
    python examples/benchmark.py --models rat_tiny --peers rat_tiny+conv
    python examples/benchmark.py --models rat_tiny --features --size 224 1024 --batch 1
    python examples/benchmark.py --models rat_classic --peers upstream_rat --size 128 --batch 1
    python examples/benchmark.py --models rat_classic --size 256+128+64 --batch 1
    python examples/benchmark.py --models rat_tiny_3d --peers monai_swin_vit --features --size 96 --batch 1
    python examples/benchmark.py --operations
    python examples/benchmark.py --models rat_tiny rat_tiny@flex --device cuda --dtype bfloat16 --batch 64 --memory

Every model is a name of timm's registry, or NAME+conv, a hierarchical RAT with a strided convolution instead of spatial
grouping attention; upstream_rat, the seed's network with its defaults; monai_swin_vit, the encoder of MONAI's SwinUNETR
(feature size 24); nnunet_resenc_l, the encoder of nnU-Net's ResEnc-L (``pip install --no-deps
dynamic_network_architectures``: it asks for an older timm, which its encoder does not use). NAME@BACKEND runs
neighbourhood attention on a backend (`rat_timm.set_attention_backend`). A ratio is the median over the runs of a peer's
time divided by the model's in the same run: above 1 the model is faster. Memory is what one step needs beside the
model: on a GPU as PyTorch allocates it, on the CPU in a process of its own, beside the imported packages. Share is that
of the rate at which the device multiplies large matrices, measured in the same run.

What a model raises is printed and recorded, the others are measured, and the exit status is 1.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import math
import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import rat_timm
from rat_timm.cost import count_macs
from rat_timm.layers import grouping_attention, local_grouping_attention, neighborhood_attention
from rat_timm.optional import import_optional

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STAGES = ((56, 2), (28, 4), (14, 8))  # length and heads of stages of 64 to 256 channels for 224 x 224 pixels
ROOF = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices whose product sets the roof
STEPS = {"cpu": 1, "cuda": 10}  # in a row in each turn: a GPU works while the next are launched
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured. Lower precision than float32 is autocast."""

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 4
    mode: str = "infer"
    compile: str | None = None
    features: bool = False


class Contender(NamedTuple):
    """Something to time: one step of it, and what that works on."""

    name: str
    size: str
    step: Callable[[], Any]
    images: int
    pixels: int
    parameters: int = 0
    macs: int = 0
    memory: tuple[float, float] | None = None


class Peer(NamedTuple):
    """A network from another package: how to build it, and the channels and number of axes of its images."""

    build: Callable[[], nn.Module]
    channels: int
    axes: int


def upstream_rat() -> nn.Module:
    """Builds the network of the package ``resolution-aware-transformer`` with its defaults."""
    return import_optional("resolution_aware_transformer", "benchmark").ResolutionAwareTransformer()


def monai_swin_vit() -> nn.Module:
    """Builds the encoder of MONAI's SwinUNETR, feature size 24, for one channel."""
    build = import_optional("monai.networks.nets.swin_unetr", "benchmark").SwinTransformer
    return build(1, 24, window_size=(7,) * 3, patch_size=(2,) * 3, depths=(2,) * 4, num_heads=(3, 6, 12, 24))


def nnunet_resenc_l() -> nn.Module:
    """Builds the encoder of nnU-Net's ResEnc-L for one channel: six stages, as it plans them for patches of 96^3."""
    encoders = importlib.import_module("dynamic_network_architectures.building_blocks.residual_encoders")  # in no extra
    return encoders.ResidualEncoder(
        1,
        6,
        (32, 64, 128, 256, 320, 320),
        nn.Conv3d,
        3,
        (1, 2, 2, 2, 2, 2),
        (1, 3, 4, 6, 6, 6),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
    )


PEERS = {
    "upstream_rat": Peer(upstream_rat, 3, 2),
    "monai_swin_vit": Peer(monai_swin_vit, 1, 3),
    "nnunet_resenc_l": Peer(nnunet_resenc_l, 1, 3),
}


def build(name: str, setting: Setting) -> nn.Module:
    """Builds a model by name on the setting's device, in training mode if that is measured."""
    base, _, change = name.partition("@")[0].partition("+")
    if change not in ("", "conv"):
        raise ValueError(f"a model is NAME or NAME+conv, got {name!r}")
    if base in PEERS:
        model = PEERS[base].build()
    else:
        kwargs = {"sga_attention_type": "none"} if change else {}
        model = timm.create_model(base, **({"features_only": True} if setting.features else {}), **kwargs)
    return model.to(setting.device).train(setting.mode == "train")


def images(name: str, size: str, setting: Setting) -> Any:
    """Makes a random image, 224 square or cubic, 64x96x96 not, or a pyramid, 256+128+64."""
    base = name.partition("@")[0].partition("+")[0]
    if base in PEERS:
        _, channels, axes = PEERS[base]
    else:
        channels, *nominal = timm.get_pretrained_cfg(base).input_size
        axes = len(nominal)
    levels = []
    for level in size.split("+"):
        shape = [int(n) for n in level.split("x")]
        full = shape * axes if len(shape) == 1 else shape
        levels.append(torch.randn(setting.batch, channels, *full, device=setting.device))
    return levels[0] if len(levels) == 1 else levels


def make_step(name: str, model: nn.Module, x: Any, setting: Setting) -> Callable[[], None]:
    """Returns what is timed: a forward pass, or forward and backward, on the backend that the name asks for."""
    run = torch.compile(model, mode=setting.compile) if setting.compile else model
    chosen = functools.partial(on_backend, name.partition("@")[2])
    precision = functools.partial(
        torch.autocast, setting.device, DTYPES[setting.dtype], enabled=setting.dtype != "float32"
    )

    def infer() -> None:
        with chosen(), torch.inference_mode(), precision():
            run(x)

    def train() -> None:
        model.zero_grad()
        with chosen(), precision():
            loss = sum(out.float().square().mean() for out in tensors(run(x)))
        loss.backward()

    return train if setting.mode == "train" else infer


@contextlib.contextmanager
def on_backend(name: str) -> Iterator[None]:
    """Chooses what neighbourhood attention runs on, for a while; nothing changes without a name."""
    before = rat_timm.attention_backend()
    rat_timm.set_attention_backend(name or before)
    try:
        yield
    finally:
        rat_timm.set_attention_backend(before)


def tensors(out: Any) -> Iterator[Tensor]:
    """Finds the feature maps or logits in what a model returns."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, dict):
        yield out["x_out"]  # of upstream's network
    else:
        for part in out:
            yield from tensors(part)


def contender(name: str, size: str, setting: Setting, with_memory: bool = False) -> Contender:
    """Builds a model and its step, counts what it has to do, and makes a first step, which compiles it."""
    used = None
    if with_memory and setting.device == "cpu":
        used = in_new_process(measure_memory, name, size, setting)
    before = allocated(setting)
    model, x = build(name, setting), images(name, size, setting)
    levels = [x] if isinstance(x, Tensor) else x
    macs = count_macs(model, x)
    step = make_step(name, model, x, setting)
    step()
    if with_memory and setting.device == "cuda":
        needed, peak = cuda_memory(step)
        used = needed, peak - before
    return Contender(
        name=name,
        size=size,
        step=step,
        images=setting.batch,
        pixels=sum(level[:, 0].numel() for level in levels),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=macs,
        memory=used,
    )


def allocated(setting: Setting) -> int:
    """Returns the bytes that PyTorch holds for tensors on the GPU."""
    return torch.cuda.memory_allocated() if setting.device == "cuda" else 0


def cuda_memory(step: Callable[[], Any]) -> tuple[int, int]:
    """Returns the bytes that one step needs on the GPU beside what is there (a training step keeps its gradients)."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before, peak


def contenders_of(
    entries: Sequence[tuple[str, str]], setting: Setting, with_memory: bool
) -> tuple[list[Contender], list[dict]]:
    """Returns what can be timed, and a record of each model that cannot."""
    found, failed = [], []
    for name, size in track(entries, "building", transient=True):
        try:
            found.append(contender(name, size, setting, with_memory))
        except Exception as error:
            traceback.print_exc()
            failed.append({"model": name, "size": size, "error": f"{type(error).__name__}: {error}"[:500]})
        if setting.device == "cuda":
            torch.cuda.empty_cache()
    return found, failed


def operations(setting: Setting) -> list[Contender]:
    """Returns the package's operations and their peers at the sizes of three stages for a 224 x 224 image."""
    found = []
    for length, heads in STAGES:
        shape = (setting.batch, length, length, heads, 32)
        q, k, v = (torch.randn(shape, device=setting.device, dtype=DTYPES[setting.dtype]) for _ in range(3))
        groups = torch.randn(setting.batch, length // 2, length // 2, heads, 32, device=q.device, dtype=q.dtype)
        calls: dict[str, functools.partial] = {
            "neighbourhood 7x7": functools.partial(neighborhood_attention, q, k, v, 7),
            **({"neighbourhood 7x7, flex": functools.partial(flex, q, k, v, 7)} if setting.device == "cuda" else {}),
            "windows 7x7": functools.partial(windows, q, k, v, 7),
            "global": functools.partial(over_all, q, k, v),
            **({"NATTEN 7x7": functools.partial(natten, q, k, v, 7)} if find_spec("natten") else {}),
            "local grouping": functools.partial(local_grouping_attention, groups, k, v, 2),
            "dense grouping": functools.partial(dense, groups, k, v),
            "grouping, explicit matrices": functools.partial(explicit, groups, k, v),
        }
        found += [_operation(name, shape, call, setting) for name, call in calls.items()]
    return found


def _operation(name: str, shape: Sequence[int], call: functools.partial, setting: Setting) -> Contender:
    def infer() -> None:
        with torch.inference_mode():
            call()

    def train() -> None:
        for tensor in call.args:
            if isinstance(tensor, Tensor):
                tensor.requires_grad_().grad = None
        call().sum().backward()

    step = train if setting.mode == "train" else infer
    return Contender(name, "x".join(map(str, shape)), step, shape[0], math.prod(shape[:3]))


def windows(query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
    """Attends inside windows that do not overlap, as Swin does."""
    batch, height, width, heads, dim = query.shape

    def split(x: Tensor) -> Tensor:
        x = x.view(batch, height // size, size, width // size, size, heads, dim)
        return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, heads, size * size, dim)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value))
    out = out.view(batch, height // size, width // size, heads, size, size, dim)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(query.shape)


def flex(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Runs neighbourhood attention on FlexAttention."""
    with on_backend("flex"):
        return neighborhood_attention(query, key, value, kernel_size)


def over_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends from every place to every place."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(query.shape)


def natten(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Runs NATTEN's own neighbourhood attention."""
    import natten

    return natten.na2d(query, key, value, kernel_size=kernel_size)


def dense(groups: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Runs dense grouping on grids."""
    return grouping_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (groups, key, value)))


def explicit(groups: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Runs dense grouping as its formula is written."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (groups, key, value))
    attention = (q @ k.mT).softmax(-1)
    return attention / (attention.sum(-2, keepdim=True) + 1e-6) @ v


def roof(setting: Setting) -> Contender:
    """Returns the product of large matrices, whose rate is the device's roof."""
    size = ROOF[setting.device]
    if setting.device == "cpu" and setting.dtype != "float32":
        size //= 8  # a processor that does not know the type takes hundreds of times as long
    a, b = (torch.randn(size, size, device=setting.device, dtype=DTYPES[setting.dtype]) for _ in range(2))
    return Contender("matrix product", str(size), functools.partial(torch.matmul, a, b), 1, 1, macs=size**3)


def alternate(contenders: Sequence[Contender], runs: int, steps: int) -> list[list[float]]:
    """Times the contenders in turns, ``runs`` times, in seconds per step.

    PyTorch's timer warms each up before every turn and waits for the GPU before it reads the clock.
    """
    threads = torch.get_num_threads()
    timers = [Timer("step()", globals={"step": c.step}, num_threads=threads) for c in contenders]
    turns = [[timer.timeit(steps).median for timer in timers] for _ in track(range(runs), "timing", transient=True)]
    return [list(times) for times in zip(*turns, strict=True)]


def measure_memory(name: str, size: str, setting: Setting) -> tuple[float, float]:
    """Returns the bytes that one step needs beside packages and model, and the peak of all; to run in a new process."""
    step = make_step(name, build(name, setting), images(name, size, setting), setting)
    before = resident()
    step()
    peak = resident()
    return peak - before, peak


def resident() -> int:
    """Returns the process's peak resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows(contenders: Sequence[Contender], times: Sequence[Sequence[float]], peers: Sequence[str]) -> list[dict]:
    """Puts together what was measured; the last contender is the roof."""
    rate = contenders[-1].macs / median(times[-1])
    found = []
    for entry, seconds in zip(contenders[:-1], times[:-1], strict=True):
        others = {(c.name, c.size): t for c, t in zip(contenders, times, strict=True)}
        ratios = {
            peer: median(b / a for a, b in zip(seconds, others[peer, entry.size], strict=True))
            for peer in peers
            if (peer, entry.size) in others
        }
        found.append(
            {
                "model": entry.name,
                "size": entry.size,
                "parameters": entry.parameters,
                "macs": entry.macs // entry.images,
                "seconds": median(seconds),
                "images_per_second": entry.images / median(seconds),
                "nanoseconds_per_pixel": median(seconds) / entry.pixels * 1e9,
                "share": entry.macs / median(seconds) / rate,
                "speed_over": ratios,
                **(dict(zip(("step_bytes", "peak_bytes"), entry.memory, strict=True)) if entry.memory else {}),
            }
        )
    return found


def show(results: Sequence[dict], peers: Sequence[str], title: str) -> None:
    """Prints the table."""
    table = Table(title=title)
    for column in ("model", "size", "M params", "GMAC", "ms", "img/s", "ns/pixel", "share"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for peer in peers:
        table.add_column(f"speed over {peer}", justify="right")
    remembered = any("step_bytes" in r for r in results)
    if remembered:
        table.add_column("step GB", justify="right")
        table.add_column("peak GB", justify="right")
    for r in results:
        cells = [r["model"], r["size"], f"{r['parameters'] / 1e6:.1f}", f"{r['macs'] / 1e9:.2f}"]
        cells += [f"{r['seconds'] * 1e3:.2f}", f"{r['images_per_second']:.2f}", f"{r['nanoseconds_per_pixel']:.0f}"]
        cells += [f"{r['share']:.0%}" if r["macs"] else "-"]
        cells += [f"{r['speed_over'][peer]:.2f}" if peer in r["speed_over"] else "-" for peer in peers]
        cells += [f"{r['step_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / 1e9:.2f}"] if remembered else []
        table.add_row(*cells)
    Console(width=200).print(table)


def plot(results: Sequence[dict], file: Path) -> None:
    """Draws images per second against parameters, and the time per pixel of each size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for name in dict.fromkeys(r["model"] for r in results):
        own = [r for r in results if r["model"] == name]
        axes[0].plot([r["size"] for r in own], [r["images_per_second"] for r in own], "o-", label=name)
        axes[1].plot([r["size"] for r in own], [r["nanoseconds_per_pixel"] for r in own], "o-", label=name)
    axes[0].set(xlabel="size", ylabel="images per second", ylim=(0, None))
    axes[1].set(xlabel="size", ylabel="nanoseconds per pixel", ylim=(0, None))
    axes[0].legend()
    figure.savefig(file, dpi=120)


COLUMNS = ("model", "size", "parameters", "macs", "seconds", "images_per_second", "share", "step_bytes", "peak_bytes")


def append_csv(results: Sequence[dict], about: dict, file: Path) -> None:
    """Appends a row per result to a table, which is begun if it is not there."""
    begun = file.exists()
    with file.open("a", newline="") as stream:
        table = csv.DictWriter(stream, (*about, *COLUMNS, "speed_over", "error"), extrasaction="ignore")
        if not begun:
            table.writeheader()
        for result in results:
            ratios = " ".join(f"{peer}={ratio:.3f}" for peer, ratio in result.get("speed_over", {}).items())
            table.writerow({**about, **result, "speed_over": ratios})


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="what is compared")
    parser.add_argument("--peers", nargs="*", default=[], help="what it is compared with")
    parser.add_argument("--operations", action="store_true", help="time attention and grouping instead of models")
    parser.add_argument("--size", nargs="+", default=["224"], help="224, 64x96x96, or a pyramid 256+128+64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile", nargs="?", const="default", choices=COMPILE_MODES, help="torch.compile, and its mode"
    )
    parser.add_argument("--features", action="store_true", help="timm's features_only models")
    parser.add_argument("--memory", action="store_true", help="measure memory too; on the CPU in new processes")
    parser.add_argument("--runs", type=int, default=9, help="how often all are timed in turns")
    parser.add_argument("--steps", type=int, help="steps in a row in a turn: 1 on the CPU, 10 on a GPU by default")
    parser.add_argument("--json", type=Path, help="file for what was measured")
    parser.add_argument("--csv", type=Path, help="table that what was measured is appended to")
    parser.add_argument("--plot", type=Path, help="file for a picture")
    arguments = parser.parse_args()
    if not arguments.operations and not arguments.models:
        parser.error("give --models or --operations")
    return arguments


def main() -> int:
    """Measures what the command line asks for; returns 1 if a model could not be measured."""
    arguments = parse()
    setting = Setting(
        arguments.device, arguments.dtype, arguments.batch, arguments.mode, arguments.compile, arguments.features
    )
    names, peers = [*arguments.models, *arguments.peers], arguments.peers
    if arguments.operations:
        contenders, failed, peers = (
            operations(setting),
            [],
            ["windows 7x7", "NATTEN 7x7", "grouping, explicit matrices"],
        )
    else:
        entries = [(name, size) for size in arguments.size for name in names]
        contenders, failed = contenders_of(entries, setting, arguments.memory)
    steps = arguments.steps or STEPS[setting.device]
    results = []
    if contenders:
        timed = [*contenders, roof(setting)]
        results = rows(timed, alternate(timed, arguments.runs, steps), peers)
    device = torch.cuda.get_device_name() if setting.device == "cuda" else f"{torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    if results:
        show(results, peers, f"{setting.mode}, {setting.dtype}, batch {setting.batch}, {device}, {versions}")
    results += failed
    about = {**dataclasses.asdict(setting), "hardware": device, "versions": versions}
    if arguments.json:
        record = {"setting": dataclasses.asdict(setting), "device": device, "versions": versions, "results": results}
        arguments.json.write_text(json.dumps(record, indent=2))
    if arguments.csv:
        append_csv(results, about, arguments.csv)
    if arguments.plot:
        plot(results, arguments.plot)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
