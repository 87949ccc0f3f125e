"""
Images come to one pixel size
=============================

A kernel of three pixels sees a nucleus at one pixel size and a speck of it at another. So images whose pixel size is
told are brought to the network's reference pixel size in front of the first convolution.
"""

# %%
# What the network sees
# ---------------------
# Three files of one part of a frame of HeLa nuclei, the network's reference being 0.645 micrometres: what is coarser is
# interpolated, what is finer is averaged without aliasing. What a coarse file does not show does not come back.

import torch
from matplotlib import pyplot as plt
from skimage.transform import rescale

from rat_timm import Grid
from rat_timm.geometry.grid import Tokens
from rat_timm.geometry.resample import resample
from training.cells import MOVIES, Cells

reference = MOVIES["hela"].spacing
frame = Cells("hela", "test")[0].image[0, 200:296, 320:448].numpy()
files = {}
for factor in (0.5, 1, 4):
    files[factor] = torch.from_numpy(rescale(frame, 1 / factor, anti_aliasing=factor > 1)).float()[None, None]

figure, rows = plt.subplots(2, 3, figsize=(9, 5))
for column, (factor, pixels) in zip(rows.T, files.items(), strict=True):
    spacing = [step * factor for step in reference]
    seen = resample(Tokens(pixels.movedim(1, -1), Grid.create(pixels.shape[2:], spacing)), reference)
    for axes, image, name in ((column[0], pixels[0, 0], "file"), (column[1], seen.x[0, ..., 0], "seen")):
        height, width = (n * step for n, step in zip(pixels.shape[2:], spacing, strict=True))
        axes.imshow(image, extent=(0, width, height, 0), vmin=0, vmax=1)
        axes.set(title=f"{name}: {image.shape[0]} x {image.shape[1]} pixels", xlabel="µm")

# %%
# What it is worth
# ----------------
# The digit model, whose images had pixels of 0.5 to 2 units in training, is given fields of view of 32 units in 10 to
# 64 pixels. With ``physical_stem=False`` the same weights see pixels as they are, and positions alone are physical.

import timm

from training.digits import digits, draw, poses, spacing_of

_, held_out = digits()
count, sides = 40, (10, 16, 24, 32, 48, 64)
figure, axes = plt.subplots(figsize=(6, 3.5))
for physical, name in ((True, "brought to the reference"), (False, "pixels as they are")):
    model = timm.create_model("test_rat", pretrained=True, physical_stem=physical).eval()
    right = []
    for side in sides:
        images = draw(held_out.images[:count], (side, side), poses(count, 2, 0, 0, torch.Generator()))
        mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.inference_mode():
            said = model((images - mean) / std, spacing=spacing_of((side, side))).argmax(-1)
        right.append(100 * (said == held_out.labels[:count]).float().mean().item())
    axes.plot([spacing_of((side,))[0] for side in sides], right, "o-", label=name)
    print(f"{name}:", ", ".join(f"{value:.0f}%" for value in right))
axes.set(xscale="log", xlabel="pixel size (units)", ylabel=f"right, of {count} digits (%)", ylim=(0, 103))
axes.set_xticks([0.5, 1, 2, 3.2], ["0.5", "1", "2", "3.2"])
axes.minorticks_off()
axes.set_title("Physical positions alone do not carry to other pixel sizes")
axes.legend()

# %%
# You could resize images yourself, and an ordinary network would then do about as well: the stem does just that, with
# masks and coordinates kept right, and labels at the pixels of your files (:doc:`measured
# </measured/resolution_study/README>`). Much coarser images are better seen in training too:
# ``training_transform(size, factors=(1.0, 4.0), p=0.5)``.
#
# ``torch.export`` and ONNX take the spacing as an input only with ``physical_stem=False``.
#
# Next: :doc:`plot_groups`. Reference: :api:`rat_timm.geometry`.
