r"""The command ``python -m rat_timm predict``: from a file to a file.

    python -m rat_timm predict slide.ome.zarr --model models/nuclei --output labels.ome.zarr
    python -m rat_timm predict brain.nii.gz --model models/lesions --output lesions.nii.gz --unit mm --preview look.png
    python -m rat_timm predict cells.ome.tif --model models/cells --output cells.ome.zarr --task instances --scale 8 \
        --intensities 100 4000 --scheduler dask --workers 4

The same command goes on with a run that was interrupted. Pixels go to the model as they are, unless ``--intensities``
or ``facts.json`` in the model's folder says which values become 0 and 1; that file, which examples/train.py writes, has
``--scale`` too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .manifest import Manifest
from .network import TASKS
from .options import DTYPES, OVERVIEW, Options
from .run import predict

_FAULTS = (ValueError, OSError, ImportError, RuntimeError, MemoryError)  # RuntimeError: PyTorch's, of memory and dtypes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("image", help="OME-Zarr, OME-TIFF, NIfTI or DICOM")
    parser.add_argument("--model", required=True, help="a saved folder, hf-hub:owner/name, or a registered name")
    parser.add_argument("--output", required=True, help=".ome.zarr, .nii, .nii.gz or .ome.tif")
    parser.add_argument("--task", choices=TASKS, default="labels")
    lengths = parser.add_argument_group("lengths, in --unit, one for all axes or one per axis (z y x)")
    lengths.add_argument("--unit", default="um", help="that of the model's reference spacing")
    lengths.add_argument("--assumed-unit", help="of pixel sizes of files that have no unit")
    lengths.add_argument("--spacing", type=float, nargs="+", help="the image's pixel size; default: the file's")
    lengths.add_argument("--out", type=float, nargs="+", help="the output's pixel size; default: the image's pixels")
    lengths.add_argument("--tile", type=float, nargs="+", help="what one call of the model predicts")
    lengths.add_argument("--halo", type=float, nargs="+", help="how far it sees beyond; default: all that matters")
    lengths.add_argument("--scale", type=float, help="length in the training of instances; default: as trained")
    lengths.add_argument("--largest", type=float, help="diameter of the largest object; default: 10 times --scale")
    lengths.add_argument("--depth", type=float)
    lengths.add_argument("--smoothing", type=float)
    lengths.add_argument("--min-distance", type=float, default=0.0)
    parser.add_argument("--min-size", type=float, default=0.0, help="least area or volume of an object")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the foreground's probability, for instances")
    parser.add_argument("--level", type=int, default=0, help="of the image's pyramid, on whose pixels is predicted")
    parser.add_argument("--time", type=int)
    parser.add_argument("--region", type=_region, help="pixels of that level, such as 0:512,1024:2048")
    parser.add_argument(
        "--levels",
        type=_context,
        nargs="*",
        help=f"what the model sees beside: pixel sizes of images around, {OVERVIEW!r} for the whole field, or nothing",
    )
    parser.add_argument(
        "--background", type=_background, help="a pixel value, or an image that is not zero where valid"
    )
    parser.add_argument(
        "--intensities", type=float, nargs=2, help="pixel values that become 0 and 1; default: as trained"
    )
    parser.add_argument("--stage", type=int, default=-1, help="of a hierarchical backbone, for features")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: this one")
    parser.add_argument("--scheduler", help="dask, ray, tcp://... of Dask, or ray://...")
    parser.add_argument("--restart", action="store_true", help="begin again instead of going on")
    parser.add_argument("--preview", help="a PNG file, for a slice with its labels")
    parser.add_argument("--quiet", action="store_true", help="no word and no progress bar")


def run(given: argparse.Namespace) -> None:
    """Predicts as the command line says; errors are one line."""
    values = dict(vars(given))
    image, model, output = (values.pop(name) for name in ("image", "model", "output"))
    values.pop("command", None)
    values["resume"], values["progress"] = not values.pop("restart"), not values.pop("quiet")
    for name in ("spacing", "out", "tile", "halo"):
        values[name] = _one_or_all(values[name])
    values["intensities"] = None if values["intensities"] is None else tuple(values["intensities"])
    try:
        done = predict(image, model, output, Options(**values))
    except KeyboardInterrupt:
        print(f"rat_timm predict: interrupted{_kept(output)}", file=sys.stderr)
        raise SystemExit(130) from None
    except _FAULTS as error:
        raise SystemExit(f"rat_timm predict: {_in_one_line(error)}{_kept(output)}") from error
    if not given.quiet:
        print(f"{done.output}: {done.computed} pixels in {done.seconds:.1f} s")


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _kept(output: str) -> str:
    manifest = Manifest.beside(Path(output))
    return f" (what was done stays in {manifest.partial}: the same command goes on)" if manifest.is_there else ""


def _one_or_all(values: Sequence[float] | None) -> float | Sequence[float] | None:
    return values if values is None or len(values) > 1 else values[0]


def _region(text: str) -> list[slice]:
    parts = [part.split(":") for part in text.split(",")]
    if any(len(part) != 2 for part in parts):
        raise argparse.ArgumentTypeError(f"must be START:STOP for each axis, with commas, got {text!r}")
    try:
        return [slice(*(int(end) if end else None for end in part)) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, got {text!r}") from None


def _context(text: str) -> float | str:
    return text if text == OVERVIEW else float(text)


def _background(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
