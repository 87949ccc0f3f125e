"""
If you use segmentation_models_pytorch
======================================

Its networks take any encoder of timm's, and so these, under their names with ``tu-`` in front. ``WithGeometry`` tells
the encoder the pixel size of an image, takes images of any size, and gives maps of their own pixels.

Install: ``python -m pip install segmentation-models-pytorch`` and ``python -m pip install '.[data]'``.
"""

# %%
# A U-Net that knows the pixel size
# ---------------------------------
# The network is called with the pixels of your file and their size, in training and afterwards. (Here the file is made
# beforehand, and nothing is trained.)

# sphinx_gallery_start_ignore
import numpy as np
import tifffile

size = {"axes": "CYX", "PhysicalSizeY": 0.25, "PhysicalSizeX": 0.25}
tifffile.imwrite("mine.ome.tif", np.random.default_rng(0).integers(0, 255, (3, 100, 130), np.uint8), metadata=size)
# sphinx_gallery_end_ignore
import segmentation_models_pytorch as smp

import rat_timm  # registers the models
from rat_timm import data
from rat_timm.adapters import WithGeometry

unet = WithGeometry(smp.Unet("tu-test_rat", encoder_weights=None, classes=2))  # or tu-rat_tiny
scan = data.read("mine.ome.tif", unit="um")
logits = unet(scan.pixels[None] / 255, spacing=scan.spacing)
print(list(scan.pixels.shape), "pixels of", scan.spacing, "um:", list(logits.shape))

# %%
# Your training loop stays what it is, but for ``spacing=``. Or let ``examples/train.py --model smp:unet-convnext_atto``
# train a network of yours in the same way as these, to compare.
#
# What is masked changes nothing in the encoder alone: the decoders of smp do not know masks.
# ``rat_timm.dense.Segmenter`` does.
#
# Reference: :api:`rat_timm.adapters`.
