r"""The command line: ``python -m rat_timm`` and ``list``, ``convert``, ``run``, ``predict`` or ``export-bundle``.

``predict`` goes from an image to an image (`rat_timm.predict.command`), and ``export-bundle`` makes a bundle for MONAI
of a segmenter's folder (`rat_timm.monai`).

``convert`` makes a folder with safetensors, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``, of weights
that others have published as a pickle (`rat_timm.timm_api.convert`):

    python -m rat_timm convert nat_tiny.pth --like rat_nat_tiny --output rat_nat_tiny.in1k

``run`` registers the models and runs a script, also under torchrun (``torchrun -m rat_timm run ...``). timm's scripts,
from a checkout of timm, fine-tune, test and export a model so (``train.py`` needs no ``run``):

    python train.py --device-modules rat_timm --model test_rat --pretrained --num-classes 10 --data-dir DIGITS \
        --train-split train --val-split validation --input-size 3 40 40 -b 32 --epochs 2 --warmup-epochs 0 \
        --opt adamw --lr 5e-4 --weight-decay 0.05 --layer-decay 0.8 --model-ema --model-ema-decay 0.95 \
        --amp --amp-dtype bfloat16 --hflip 0 --scale 0.7 1.0 --device cpu --output out --experiment first
    python -m rat_timm run validate.py --model test_rat --num-classes 10 --data-dir DIGITS --split validation \
        --input-size 3 40 40 --crop-pct 1.0 --checkpoint out/first/model_best.pth.tar --use-ema --device cpu
    python -m rat_timm run inference.py --model test_rat --num-classes 10 --data-dir DIGITS/validation \
        --input-size 3 40 40 --checkpoint out/first/model_best.pth.tar --topk 1 --device cpu
    python -m rat_timm run benchmark.py --model test_rat --input-size 3 40 40 -b 8 --bench both --device cpu
    python -m rat_timm run onnx_export.py model.onnx --model test_rat --num-classes 10 --img-size 40 \
        --checkpoint out/first/model_best.pth.tar --dynamo --opset 18

They know no spacing: every image has the reference spacing. ``train.py ... --resume out/first/last.pth.tar`` goes on.
On CPUs timm's ``train.py`` cannot train in several processes, whatever the model.
"""

import argparse
import fnmatch
import itertools
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch

from .cost import count_macs
from .timm_api.convert import convert
from .timm_api.families import FAMILIES


class Variant(NamedTuple):
    """A row of the list, in words."""

    name: str
    parameters: str
    macs: str
    size: str
    strides: str
    spacing: str
    weights: str


def names(pattern: str) -> list[str]:
    """Returns the registered names that match a shell pattern, without the tags of weights."""
    return [name for family in FAMILIES.values() for name in fnmatch.filter(family.variants, pattern)]


def describe(name: str) -> Variant:
    """Builds a variant on the meta device and says what it is."""
    cfg = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    image = torch.empty(1, *cfg.input_size, device="meta")
    return Variant(
        name=name,
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        macs=f"{count_macs(model, image) / 1e9:.2f} G",
        size="x".join(map(str, cfg.input_size)),
        strides="/".join(dict.fromkeys(str(info["reduction"]) for info in model.feature_info)),
        spacing="x".join(f"{s:g}" for s in model.reference_spacing),
        weights=weights(name),
    )


def weights(name: str) -> str:
    """Returns the tags of the weights that a variant has; "-" for none."""
    tagged = timm.list_pretrained(f"{name}*")
    tags = [full.partition(".")[2] for full in tagged if full.partition(".")[0] == name]
    return ", ".join(tag or "untagged" for tag in tags) or "-"


def show(variants: Iterator[Variant]) -> None:
    """Prints the rows as they come."""
    header = Variant("name", "parameters", "MACs", "at", "strides", "spacing", "weights")
    widths = (46, 10, 9, 12, 11, 9)
    for row in itertools.chain([header], variants):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print(*cells, row.weights, flush=True)


def run(script: Path, arguments: list[str]) -> None:
    """Runs a script as if it had been called itself, with the models registered."""
    if not script.is_file():
        raise SystemExit(f"rat_timm run: there is no file {script}")
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.parent.resolve())
    runpy.run_path(str(script), run_name="__main__")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("python -m rat_timm", description="Resolution-aware models for timm.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="print the variants")
    listing.add_argument("filter", nargs="?", default="*", help="shell pattern, such as 'rat_*_3d'")
    converting = commands.add_parser(
        "convert", help="bring weights that others have published into this package's form"
    )
    converting.add_argument("source", type=Path, help="their file, or a folder that transformers wrote")
    converting.add_argument("--like", required=True, metavar="NAME", help="the variant, such as rat_nat_tiny")
    converting.add_argument("--output", required=True, type=Path, help="the folder to write")
    running = commands.add_parser("run", help="register the models and run a script, such as timm's validate.py")
    running.add_argument("script", type=Path)
    running.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    _add_bundle(commands.add_parser("export-bundle", help="make a bundle for MONAI of a segmenter"))
    if arguments[:1] == ["predict"]:  # whose packages take a while to import
        from .predict import command

        command.add_arguments(commands.add_parser("predict", help="predict an image, tile by tile"))
    else:
        commands.add_parser("predict", help="predict an image, tile by tile")
    return parser.parse_args(arguments)


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `rat_timm.monai.export_bundle`."""
    parser.add_argument("folder", type=Path, help="what Segmenter.save wrote")
    parser.add_argument("--output", required=True, type=Path, help="the bundle's folder, which must not be there")
    parser.add_argument("--task", default="labels", help="labels or probabilities")
    parser.add_argument("--unit", default="um", help="of the model's reference spacing")
    parser.add_argument("--assumed-unit", help="of files that do not state theirs")
    parser.add_argument("--intensities", type=float, nargs=2, help="pixel values that become 0 and 1")
    parser.add_argument("--roi-size", type=int, nargs="+", help="voxels of windows; default: whole images")
    parser.add_argument("--axes", default="zyx", help="as the model was trained: zyx (this package), xyz (MONAI)")
    parser.add_argument("--licence", type=Path, help="a file with that of the weights")
    parser.add_argument("--authors", default="")


def _export_bundle(given: argparse.Namespace) -> None:
    from .monai import export_bundle

    options = {name: value for name, value in vars(given).items() if name not in ("command", "folder", "output")}
    try:
        print(export_bundle(given.folder, given.output, **options))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"rat_timm export-bundle: {error}") from error


def main() -> None:
    """Does what the command line says."""
    given = parse(sys.argv[1:])
    if given.command == "run":
        run(given.script, given.arguments)
    elif given.command == "predict":
        from .predict import command

        command.run(given)
    elif given.command == "export-bundle":
        _export_bundle(given)
    elif given.command == "convert":
        print(f"local-dir:{convert(given.source, given.like, given.output)}")
    else:
        found = names(given.filter)
        if not found:
            raise SystemExit(f"rat_timm list: no name matches {given.filter!r}")
        show(describe(name) for name in found)


if __name__ == "__main__":
    main()
