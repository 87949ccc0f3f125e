"""MONAI bundles: a folder with a network, what it takes and gives, and a workflow that predicts NIfTI files."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.units import metres_of
from ..dense.segmenter import Segmenter
from ..optional import import_optional
from ..predict.facts import open_intensities, read_facts

TASKS = ("labels", "probabilities")
AXES = ("zyx", "xyz")
SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
_NO_LICENCE = "No licence is stated for these weights. Whoever hands them on states it here.\n"
_README = """\
# {name}

{description}

    pip install 'rat-timm[monai]'
    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --dataset_dir FOLDER_OF_NIFTI_FILES --output_dir PREDICTIONS

Predictions have the names of their images and `_{postfix}` behind, the same pixels and the same affine matrix. Pixel
sizes are read from the affine matrix, and their unit from the file; for files that state none, add
`--assumed_unit mm`. Images go through the network as a whole; where memory does not do, `--roi_size '[96, 96, 96]'`
takes overlapping windows of so many voxels.

Weights lie in `models/model.safetensors`, not in a pickle: `rat_timm.dense.Segmenter.load("models")`.
"""


def export_bundle(
    folder: str | Path,
    output: str | Path,
    *,
    task: str = "labels",
    unit: str = "um",
    assumed_unit: str | None = None,
    intensities: Sequence[float] | None = None,
    roi_size: Sequence[int] | None = None,
    axes: str = "zyx",
    licence: str | Path | None = None,
    authors: str = "",
) -> Path:
    """Makes a MONAI bundle that predicts a folder of NIfTI files.

    Args:
        folder: What `rat_timm.dense.Segmenter.save` wrote.
        output: The bundle, which must not be there.
        task: "labels", the likeliest class of each pixel, or "probabilities".
        unit: Of the model's reference spacing.
        assumed_unit: Of pixel sizes of files that do not state theirs; None makes them an error.
        intensities: Pixel values that become 0 and 1, as in training. Default: those that the folder says, see
            `rat_timm.predict.facts`; pixels go to the model as they are if it says none.
        roi_size: Voxels of overlapping windows along the axes of files. Default: images are predicted as a whole.
        axes: In which order the model was trained: "zyx" as `rat_timm.data.read` has it, or "xyz", as MONAI has it.
        licence: A file with the weights' licence.
        authors: Whose the model is.

    Returns:
        The bundle.

    Raises:
        ValueError: If an argument is not allowed, or the folder damaged.
        FileNotFoundError: If there is no model or no licence.
        FileExistsError: If the bundle is there.
    """
    folder, output = Path(folder), Path(output)
    _check(task, unit, assumed_unit, intensities, axes)
    if output.exists():
        raise FileExistsError(f"output {output} exists: delete it or give another name")
    model = Segmenter.load(folder)
    if intensities is None:
        intensities = open_intensities(read_facts(folder))
    if roi_size is not None and len(roi_size) != model.spatial_dims:
        raise ValueError(f"roi_size must be {model.spatial_dims} numbers, as the model has axes, got {list(roi_size)}")
    text = _NO_LICENCE if licence is None else Path(licence).read_text()
    read = {"unit": unit, "assumed_unit": assumed_unit, "roi_size": None if roi_size is None else list(roi_size)}
    metadata = _metadata(model, unit, authors)
    postfix = {"labels": "seg", "probabilities": "probabilities"}[task]
    for name in ("configs", "models", "docs"):
        (output / name).mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(folder / file, output / "models" / file)
    inference = _inference(model, task, postfix, read, intensities, axes == "zyx")
    _write(metadata, output / "configs" / "metadata.json")
    _write(inference, output / "configs" / "inference.json")
    readme = _README.format(name=output.name, description=metadata["description"], postfix=postfix)
    (output / "docs" / "README.md").write_text(readme)
    (output / "LICENSE").write_text(text)
    return output


def nifti_files(folder: str | Path) -> list[str]:
    """Returns the NIfTI files of a folder, not of folders in it.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(str(file) for ending in ("*.nii", "*.nii.gz") for file in Path(folder).glob(ending))
    if not files:
        raise ValueError(f"dataset_dir must be a folder with .nii or .nii.gz files in it, got {str(folder)!r}")
    return files


def _check(task: str, unit: str, assumed_unit: str | None, intensities: Sequence[float] | None, axes: str) -> None:
    for name, value, allowed in (("task", task, TASKS), ("axes", axes, AXES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    for length in (unit, assumed_unit):
        if length is not None:
            metres_of(length)
    if intensities is not None and not (len(intensities) == 2 and intensities[0] < intensities[1]):
        raise ValueError(f"intensities must be two numbers, the lower first, got {list(intensities)}")


def _write(value: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(value, indent=4) + "\n")


def _metadata(model: Segmenter, unit: str, authors: str) -> dict[str, Any]:
    """Returns what the schema of MONAI's bundles asks for."""
    from .. import __version__  # at the end of the package's import

    size = " x ".join(f"{step:g}" for step in model.reference_spacing)
    tensor = {"type": "image", "modality": "n/a", "spatial_shape": ["*"] * model.spatial_dims, "dtype": "float32"}
    names = model.class_names or [f"class {index}" for index in range(model.num_classes)]
    return {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": "exported by rat_timm"},
        "monai_version": import_optional("monai", "monai").__version__,
        "pytorch_version": str(torch.__version__).partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {"rat_timm": __version__},
        "task": f"Segmentation of {'images' if model.spatial_dims == 2 else 'volumes'}",
        "description": (
            f"A resolution-aware segmenter ({type(model.backbone).__name__} of rat_timm) of images of any pixel size, "
            f"which it reads from their affine matrices; its reference is {size} {unit}."
        ),
        "authors": authors or "not stated",
        "copyright": "see LICENSE",
        "data_type": "nibabel",
        "network_data_format": {
            "inputs": {
                "image": {
                    **tensor,
                    "format": "magnitude",
                    "num_channels": model.in_chans,
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(index): "image" for index in range(model.in_chans)},
                }
            },
            "outputs": {
                "pred": {
                    **tensor,
                    "format": "labels",
                    "num_channels": model.num_classes,
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": {str(index): name for index, name in enumerate(names)},
                }
            },
        },
    }


def _inference(
    model: Segmenter,
    task: str,
    postfix: str,
    read: dict[str, Any],
    intensities: Sequence[float] | None,
    reverse_axes: bool,
) -> dict[str, Any]:
    """Returns a config of MONAI's workflow."""
    return {
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        **read,
        "datalist": {"_target_": "rat_timm.monai.nifti_files", "folder": "@dataset_dir"},
        "network_def": {"_target_": "rat_timm.dense.Segmenter.load", "folder": "$@bundle_root + '/models'"},
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _before(intensities)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "rat_timm.monai.SpacingInferer",
            "unit": "@unit",
            "assumed_unit": "@assumed_unit",
            "roi_size": "@roi_size",
            "reverse_axes": reverse_axes,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _after(model, task, postfix)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
        },
        "run": ["$@evaluator.run()"],
    }


def _before(intensities: Sequence[float] | None) -> list[dict[str, Any]]:
    scaled = []
    if intensities is not None:
        low, high = map(float, intensities)
        scaled = [{"_target_": "ScaleIntensityRanged", "a_min": low, "a_max": high, "b_min": 0.0, "b_max": 1.0}]
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "reader": "NibabelReader"},  # others do not hand the unit on
        {"_target_": "EnsureChannelFirstd"},
        {"_target_": "EnsureTyped", "dtype": "$torch.float32"},
        *scaled,
    ]
    return [{**step, "keys": "image"} for step in steps]


def _after(model: Segmenter, task: str, postfix: str) -> list[dict[str, Any]]:
    single = model.num_classes == 1
    if task == "labels":
        made = {"_target_": "AsDiscreted", **({"threshold": 0.0} if single else {"argmax": True})}
        dtype = "uint8" if model.num_classes <= 256 else "uint16"
    else:
        made = {"_target_": "Activationsd", ("sigmoid" if single else "softmax"): True}
        dtype = "float32"
    saved = {
        "_target_": "SaveImaged",
        "output_dir": "@output_dir",
        "output_postfix": postfix,
        "output_dtype": f"$np.{dtype}",
        "resample": False,
        "separate_folder": False,
        "writer": "rat_timm.monai.UnitWriter",
        "print_log": False,
    }
    return [{**step, "keys": "pred"} for step in (made, saved)]
