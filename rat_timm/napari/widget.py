"""The widget: a form for `rat_timm.napari.predict_layers`, which runs in a thread."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..optional import import_optional
from ..predict.network import TASKS
from .layers import LayerData, predict_layers

if TYPE_CHECKING:
    from magicgui.widgets import FunctionGui, PushButton
    from napari.layers import Image
    from napari.qt.threading import FunctionWorker
    from napari.viewer import Viewer

_FAULTS = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


def numbers(text: str, name: str) -> tuple[float, ...] | None:
    """Reads numbers with commas or spaces between them; None if there are none.

    Raises:
        ValueError: If the text is something else.
    """
    try:
        return tuple(float(part) for part in text.replace(",", " ").split()) or None
    except ValueError:
        raise ValueError(f"{name} must be numbers such as '2, 0.5, 0.5', got {text!r}") from None


def predict_widget() -> "FunctionGui":
    """Makes the form.

    Raises:
        ImportError: If napari is not installed; with the extra that installs it.
    """
    napari: Any = import_optional("napari", "napari")
    magicgui: Any = import_optional("magicgui", "napari")
    kind = import_optional("napari.layers", "napari")

    def images(_: object) -> list[Any]:
        viewer = napari.current_viewer()
        return [] if viewer is None else [layer for layer in viewer.layers if isinstance(layer, kind.Image)]

    def predict(
        image: Any,
        more_channels: list,
        model: Path,
        task: str = "labels",
        mask: Any = None,
        spacing: str = "",
        unit: str = "um",
        intensities: str = "",
        scale: float = 0.0,
        tile: str = "",
    ) -> object:
        options = {
            "task": task,
            "mask": mask,
            "spacing": _one_or_all(numbers(spacing, "spacing")),
            "unit": unit,
            "intensities": numbers(intensities, "intensities"),
            "scale": scale or None,
            "tile": _one_or_all(numbers(tile, "tile")),
        }
        layers = [image, *(layer for layer in more_channels if layer is not image)]
        return start(napari.current_viewer(), cancel, layers, model.as_posix(), options)

    predict.__annotations__ |= {"image": kind.Image, "mask": kind.Layer | None}  # which widgets choose among
    form = magicgui.magicgui(
        predict,
        call_button="Predict",
        more_channels={"widget_type": "Select", "choices": images, "tooltip": "further channels, in the list's order"},
        model={"mode": "d", "tooltip": "a saved folder, hf-hub:owner/name, or a registered name"},
        task={"choices": TASKS},
        mask={"tooltip": "a layer that is not zero where pixels are valid"},
        spacing={"tooltip": "pixel size along (z) y x; empty: the layer's scale"},
        unit={"tooltip": "of lengths here, and of the model's reference spacing"},
        intensities={"tooltip": "pixel values that become 0 and 1, as in training; empty: pixels as they are"},
        scale={"tooltip": "length with which a network for instances was trained", "max": 1e9, "step": 0.1},
        tile={"tooltip": "length of what is predicted at once; empty: what fits"},
    )
    cancel = magicgui.widgets.PushButton(text="Cancel", tooltip="ends what runs after the tile in hand", gui_only=True)
    form.append(cancel)
    return form


class Cancelled(Exception):  # noqa: N818
    """Ends a prediction that nobody waits for."""


def start(
    viewer: "Viewer", cancel: "PushButton", layers: Sequence["Image"], model: str, options: dict[str, Any]
) -> "FunctionWorker":
    """Predicts in a thread, whose progress napari shows, and adds the layers.

    Args:
        viewer: Where layers are cut along further axes, and where they are added.
        cancel: Ends the prediction after the tile in hand.
        layers: See `predict_layers`.
        model: See `predict_layers`.
        options: See `predict_layers`.

    Returns:
        The thread's worker.
    """
    threading: Any = import_optional("napari.qt.threading", "napari")
    in_main_thread: Any = import_optional("superqt.utils", "napari").ensure_main_thread
    position = [round(at) for at in layers[0].world_to_data(viewer.dims.point)]

    @in_main_thread
    def show(percent: int) -> None:
        worker.pbar.total = 100
        worker.pbar.update(percent - worker.pbar.n)

    def tell(done: int, total: int) -> None:
        if worker.abort_requested:
            raise Cancelled
        show(100 * done // total)

    work = partial(predict_layers, layers, model, position=position, progress=tell, **options)
    worker = threading.create_worker(work, _progress={"desc": "rat_timm"}, _ignore_errors=True)
    worker.returned.connect(partial(add, viewer))
    worker.errored.connect(report)
    cancel.changed.connect(worker.quit)
    worker.finished.connect(partial(cancel.changed.disconnect, worker.quit))
    worker.start()
    return worker


def add(viewer: "Viewer", made: Sequence[LayerData]) -> None:
    """Adds layers to a viewer."""
    layer = import_optional("napari.layers", "napari").Layer
    for data, options, kind in made:
        viewer.add_layer(layer.create(data, options, kind))


def report(error: Exception) -> None:
    """Shows what a user can mend in one line."""
    if isinstance(error, Cancelled):
        return
    if not isinstance(error, _FAULTS):
        raise error
    show_error: Any = import_optional("napari.utils.notifications", "napari").show_error
    show_error(f"rat_timm: {' '.join(str(error).split()) or type(error).__name__}")


def _one_or_all(values: tuple[float, ...] | None) -> float | tuple[float, ...] | None:
    return values[0] if values is not None and len(values) == 1 else values
