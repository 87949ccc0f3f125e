"""What the folder of a trained model says beside its weights, as ``examples/train.py`` writes it.

Which pixel values the model saw as 0 and 1, and how long its objects are.
"""

import dataclasses
import json
import warnings
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .network import check_source
from .options import Options

FACTS = "facts.json"
"""A file beside the weights: an object with "length", a number, "intensities", two numbers or null, and "task"."""


class Facts(NamedTuple):
    """What training knew.

    Attributes:
        length: Of objects, in the unit of training: ``scale`` of `rat_timm.dense.instances`.
        intensities: Pixel values that became 0 and 1; None where each image, or channel, had its own.
        task: For which the model was trained, as examples/train.py calls it; None if the folder does not say.
    """

    length: float
    intensities: tuple[float, float] | None
    task: str | None = None


def read_facts(folder: str | PathLike) -> Facts | None:
    """Reads what a model's folder says; None if there is no such file.

    Raises:
        ValueError: If the file is damaged.
    """
    file = Path(folder) / FACTS
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text())
        length, intensities = float(said["length"]), said.get("intensities")
        intensities = None if intensities is None else (float(intensities[0]), float(intensities[1]))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"model: {file} must say length and intensities, got {error!r}") from error
    return Facts(length, intensities, said.get("task"))


def open_intensities(facts: Facts | None) -> tuple[float, float] | None:
    """Returns the intensities for pixels of which a user says none; None leaves pixels as they are.

    Warns:
        UserWarning: If training had other ones for each image.
    """
    if facts is not None and facts.intensities is None:
        warnings.warn(
            "intensities were each image's own in training, and pixels go to the model as they are: give the values "
            "that become 0 and 1",
            stacklevel=4,
        )
    return None if facts is None else facts.intensities


def as_trained(options: Options, model: str | PathLike | nn.Module) -> Options:
    """Fills in what options leave open and the model's folder says: ``intensities``, and ``scale`` for instances.

    Args:
        options: What a user asks for.
        model: As `rat_timm.predict.predict` takes it. Only folders have facts.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the file is damaged, or nobody says the scale of instances.

    Warns:
        UserWarning: If labels are asked of a model for instances.
    """
    if not isinstance(model, nn.Module):
        check_source(model)
    facts = None if isinstance(model, nn.Module) else read_facts(model)
    if options.intensities is None:
        options = dataclasses.replace(options, intensities=open_intensities(facts))
    if options.task == "instances" and options.scale is None:
        if facts is None:
            raise ValueError("scale must be the length with which the network for instances was trained, got None")
        options = dataclasses.replace(options, scale=facts.length)
    if options.task == "labels" and facts is not None and facts.task == "instances":
        warnings.warn("model was trained for instances: ask for task instances, its maps are no classes", stacklevel=3)
    return options
