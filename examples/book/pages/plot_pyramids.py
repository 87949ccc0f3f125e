"""
Pyramids: several resolutions of one scene
==========================================

A list of images is a pyramid: a crop of fine pixels, an overview of coarse ones, or more. Each has its own spacing and
origin, and all tokens lie in one coordinate system.
"""

# %%
# Tokens of two levels
# --------------------
# Stained tissue (scikit-image's; its pixel is the unit): the whole at 4 units per pixel, and a crop of it as it is.
# Dots are the tokens of the third stage: the crop has many small ones in the part that it shows.

import timm
import torch
from matplotlib import pyplot as plt
from skimage.data import immunohistochemistry

import rat_timm  # registers the models

photograph = torch.from_numpy(immunohistochemistry()).movedim(-1, 0)[None] / 255 - 0.5
overview = torch.nn.functional.avg_pool2d(photograph, 4)
crop = photograph[..., 130:322, 250:410]
torch.manual_seed(0)
model = timm.create_model("test_rat").eval()  # random weights
with torch.inference_mode():
    out = model.forward_intermediates(
        [crop, overview],
        spacing=[(1.0, 1.0), (4.0, 4.0)],
        origin=[(130.5, 250.5), (2.0, 2.0)],
        output_dict=True,
    )

figure, axes = plt.subplots(figsize=(6, 5))
axes.imshow(photograph[0].movedim(0, -1) + 0.5, extent=(0, 512, 512, 0), alpha=0.6)
for level, color, name in ((1, "tab:blue", "overview"), (0, "tab:red", "crop")):
    grid = out["grids"][2][level]
    y, x = grid.coordinates()[0].flatten(0, 1).T
    axes.scatter(x, y, s=20 if level else 6, c=color, label=f"{name}: {grid.shape[0]} x {grid.shape[1]} tokens")
    print(f"{name}: spacing {grid.spacing[0].tolist()}, first token at {grid.origin[0].tolist()}")
axes.set(title="Each token knows where it is", xlabel="x (units)", ylabel="y (units)")
figure.legend(loc="outside lower center", ncols=2)

# %%
# Where levels meet
# -----------------
# In the last stage all tokens of all levels attend to each other, by their physical distance. In the stages before,
# each level attends to itself. A ``Segmenter(..., context=True)`` also adds what is decoded of the overview to the
# crop's pixels, by position. What the crop's classes gain can be asked: the overview is shown moved, and the answer
# changes.

from rat_timm.dense import Segmenter

torch.manual_seed(0)
network = Segmenter("test_rat", num_classes=2, width=16, context=True).eval()  # random weights
moves, answers = (0, 4, 16, 64, 128), []
with torch.inference_mode():
    for move in moves:
        logits = network(
            [crop, overview],
            spacing=[(1.0, 1.0), (4.0, 4.0)],
            origin=[(130.5, 250.5), (2.0, 2.0 + move)],
        )
        answers.append(logits)
changes = [float((answer - answers[0]).abs().mean() / answers[0].std()) for answer in answers]
figure, axes = plt.subplots(figsize=(5.5, 3.2))
axes.plot(moves, changes, "o-")
axes.set(title="A wrong origin is a wrong overview", xlabel="overview said to be off by (units)")
axes.set_ylabel("mean change of logits / their deviation")
print(", ".join(f"{move} units: {change:.2f}" for move, change in zip(moves, changes)))

# %%
# What a trained network makes of it is :doc:`measured </measured/context_study/README>` on drawn tissue: far more than
# of the crop or of the overview alone, and what it loses when the overview is said to be elsewhere. :doc:`plot_slide`
# trains one.
#
# Reference: :api:`rat_timm.data`, :api:`rat_timm.explain`.
