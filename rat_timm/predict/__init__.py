"""Prediction on images larger than memory, in tiles, from a file to a file (extra ``predict``).

    from rat_timm.predict import predict

    predict("slide.ome.zarr", "models/nuclei", "labels.ome.zarr", task="labels")

or ``python -m rat_timm predict slide.ome.zarr --model models/nuclei --output labels.ome.zarr``. Pixels come and go by
`rat_timm.data`, lengths are physical, and what lies in masked pixels changes nothing.

- **Equal to the whole.** `receptive_field` says how far a model looks. Where that is bounded (windows, sparse groupings
  and convolutions) tiles see as far, and start where the strides of all layers do: the result is the whole image's.
- **Where it can not be.** Global attention sees an overview of the whole field beside each window, windows are blended,
  and what is said beforehand of the difference is measured on some of them with longer halos.
- **Nothing for nothing.** Tiles without data are not computed; the next windows are read while the model computes, and
  tiles are written meanwhile. Memory is that of a tile, said beforehand.
- **Interrupted.** Finished tiles stay in ``OUTPUT.partial``; the same call goes on and gives the same bytes.
- **Objects across tiles** are one (`rat_timm.predict.stitch`), and ``workers`` or a scheduler of Dask or Ray compute
  tiles side by side (`rat_timm.predict.engines`).
"""

from .options import Options
from .receptive import ReceptiveField, receptive_field
from .run import Prediction, predict

__all__ = ["Options", "Prediction", "ReceptiveField", "predict", "receptive_field"]
