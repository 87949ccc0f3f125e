"""The tasks that a model is trained for: one file for each, and a table of them."""

import importlib

from training.config import Config
from training.tasks.base import Call, Measured, Task

TASKS = {
    "classification": "Classification",
    "segmentation": "Segmentation",
    "instances": "Instances",
    "detection": "Detection",
    "masked": "Masked",
    "distillation": "Distillation",
}
"""Each is in the file of its name, which is imported with the packages that it takes once it is wanted."""

__all__ = ["TASKS", "Call", "Measured", "Task", "task_class"]


def task_class(config: Config) -> type[Task]:
    """Returns the class of a config's task."""
    return getattr(importlib.import_module(f"training.tasks.{config.task}"), TASKS[config.task])
