"""
Classify images of any pixel size
=================================

The weights that the package ships know handwritten digits in a field of view of 32 units. That field may be drawn with
few or with many pixels: the network is told how large a pixel is.
"""

# %%
# Three images of one digit
# -------------------------
# The digits are scikit-learn's; those here were held out of the training.

import timm
import torch
from matplotlib import pyplot as plt

import rat_timm  # registers the models
from training.digits import digits, draw, poses, spacing_of

model = timm.create_model("test_rat", pretrained=True).eval()
_, held_out = digits()
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))


def drawn(count, side):
    """Returns so many digits ``[count, 3, side, side]``, as the model takes them."""
    pose = poses(count, 2, 0, 0, torch.Generator())
    return (draw(held_out.images[:count], (side, side), pose) - mean) / std


figure, row = plt.subplots(1, 3, figsize=(8, 3))
for axes, side in zip(row, (16, 32, 96), strict=True):
    image, spacing = drawn(1, side), spacing_of((side, side))
    with torch.inference_mode():
        chance, digit = model(image, spacing=spacing).softmax(-1)[0].max(0)
    axes.imshow(image[0, 0], extent=(0, 32, 32, 0))
    axes.set(title=f"{side} x {side} pixels: {chance:.0%} a {digit}", xlabel="units")
figure.suptitle("One digit in few and in many pixels is one digit")

# %%
# What the pixel size is worth
# ----------------------------
# The same held-out digits at five pixel sizes, told and not told. A network that is not told takes its reference pixel
# size, 1 unit, and sees large digits where there are many pixels.

from book import pick
from rat_timm.data import Sample, collate
from rat_timm.evaluation import Accuracy

count, sides = pick(40, 360), (16, 24, 32, 48, 64)
right = {"told": [], "not told": []}
for side in sides:
    spacing = torch.tensor(spacing_of((side, side)))
    samples = [Sample(image, spacing, target=int(label)) for image, label in zip(drawn(count, side), held_out.labels)]
    batch = collate(samples)
    for name, told in (("told", batch.spacing), ("not told", None)):
        accuracy = Accuracy()
        with torch.inference_mode():
            accuracy.update(model(batch.image, spacing=told), batch.target)
        right[name].append(100 * accuracy.compute())

pixel_sizes = [spacing_of((side, side))[0] for side in sides]
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, values in right.items():
    axes.plot(pixel_sizes, values, "o-", label=name)
    print(f"{name}:", ", ".join(f"{value:.0f}% at {size:.2g}" for size, value in zip(pixel_sizes, values)))
axes.set(xscale="log", xlabel="pixel size (units)", ylabel=f"right, of {count} digits (%)", ylim=(0, 103))
axes.set_xticks(pixel_sizes, [f"{size:.2g}" for size in pixel_sizes])
axes.minorticks_off()
axes.set_title("Told the pixel size, it reads digits at any")
axes.legend()

# %%
# Resizing all images to one pixel size beforehand does nearly the same for an ordinary network: see
# :doc:`what was measured </measured/resolution_study/README>`, also on photographs, where RAT is not ahead.
#
# Your own images
# ---------------
# The training program takes a folder ``train/<class>/*`` and ``validation/<class>/*`` of OME-TIFF, OME-Zarr, NIfTI or
# DICOM files, which say their pixel size, or pictures, whose pixel size ``--spacing`` says::
#
#     python examples/train.py --output runs/mine --model rat_tiny --pretrained false --data mine --unit um
#
# What it saves, ``timm.create_model("local-dir:runs/mine/model", pretrained=True)`` opens. :doc:`plot_transformers`
# trains a small one.
#
# Next: :doc:`plot_segment`. Reference: :api:`rat_timm.data`, :api:`rat_timm.evaluation`.
