"""A plugin for napari (extra ``napari``): Plugins > rat_timm > Predict, and a reader of files with their pixel size.

A layer's scale and units are the spacing, and what comes back is a layer that lies where the image lies: labels,
instances, probabilities or features, by `rat_timm.predict`, in a thread. In a script, without a window:

    from rat_timm.napari import predict_layers

    for data, options, kind in predict_layers([viewer.layers["nuclei"]], "models/nuclei", task="labels"):
        viewer.add_layer(napari.layers.Layer.create(data, options, kind))
"""

from .layers import LayerData, predict_layers
from .reader import open_layers

__all__ = ["LayerData", "open_layers", "predict_layers"]
