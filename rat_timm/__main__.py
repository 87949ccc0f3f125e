"""The command line: ``python -m rat_timm list [FILTER]`` and ``python -m rat_timm run SCRIPT [ARGUMENTS]``."""

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
    running = commands.add_parser("run", help="register the models and run a script, such as timm's validate.py")
    running.add_argument("script", type=Path)
    running.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    return parser.parse_args(arguments)


def main() -> None:
    """Does what the command line says."""
    given = parse(sys.argv[1:])
    if given.command == "run":
        run(given.script, given.arguments)
    else:
        found = names(given.filter)
        if not found:
            raise SystemExit(f"rat_timm list: no name matches {given.filter!r}")
        show(describe(name) for name in found)


if __name__ == "__main__":
    main()
