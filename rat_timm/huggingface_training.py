"""transformers' ``Trainer`` with the geometry of images, whatever the network around a backbone of this package.

    trainer = RatTrainer(model, arguments, train_dataset=rows)  # rows have pixel_values, labels, spacing, mask

``Trainer`` drops the columns of a data set that the model's ``forward`` does not name: transformers' own classes
(``AutoModelForImageClassification``, detectors around `rat_timm.huggingface.RatBackbone`) name no spacing, and train as
if all images had the reference spacing. `RatTrainer` keeps ``spacing``, ``mask`` and ``origin`` and tells the backbone.
With ``Trainer`` itself, ``callbacks=[GeometryCheck()]`` warns.
"""

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .geometry.read import geometry
from .optional import import_optional

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import TrainerControl, TrainerState, TrainingArguments

_transformers: Any = import_optional("transformers", "transformers")
_Trainer: Any = _transformers.Trainer
_Callback: Any = _transformers.TrainerCallback

COLUMNS = ("spacing", "mask", "origin")


class RatTrainer(_Trainer):
    """transformers' ``Trainer``, which hands ``spacing``, ``mask`` and ``origin`` of batches to the backbone.

    Models are called without them, inside `rat_timm.geometry`. (Not for ``nn.DataParallel``: start a process per GPU.)
    """

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in COLUMNS if name not in self._signature_columns]

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """See transformers."""
        inputs, context = _apart(inputs)
        with context:
            return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See transformers."""
        inputs, context = _apart(inputs)
        with context:
            return super().prediction_step(model, inputs, *args, **kwargs)


def _apart(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], AbstractContextManager]:
    """Takes the geometry out of a batch."""
    told = {name: inputs[name] for name in COLUMNS if name in inputs}
    rest = {name: value for name, value in inputs.items() if name not in told}
    return rest, geometry(**told) if told else nullcontext()


class GeometryCheck(_Callback):
    """Warns once if ``Trainer`` drops the spacing, masks or origins that the rows of a data set have.

    Columns of a ``datasets.Dataset`` are gone before a callback could see them: of these it does not know.
    """

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        model: nn.Module | None = None,
        train_dataloader: "DataLoader | None" = None,
        **kwargs: Any,
    ) -> None:
        """See transformers."""
        data: Any = getattr(train_dataloader, "dataset", None)
        if model is None or not args.remove_unused_columns or not hasattr(data, "__getitem__"):
            return
        row = data[0]
        named = inspect.signature(model.forward).parameters
        dropped = [name for name in COLUMNS if isinstance(row, Mapping) and name in row and name not in named]
        if dropped:
            warnings.warn(
                f"Trainer drops the columns {dropped}, which {type(model).__name__}.forward does not name: images are "
                "taken as they would be without. Use rat_timm.huggingface_training.RatTrainer, "
                "rat_timm.huggingface.RatForImageClassification, or TrainingArguments(remove_unused_columns=False)",
                stacklevel=2,
            )
