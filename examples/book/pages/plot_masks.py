"""
What is masked changes nothing
==============================

Scans have corners without data, slides have glass, frames have scratches. A mask (True = valid) says which pixels
count. What stands in the others has no influence, not by a bit, even if it is NaN.
"""

# %%
# The same numbers, whatever is masked
# ------------------------------------
# A part of a frame of nuclei with a disc that is not valid. What lies in it is replaced three times.

import torch
from matplotlib import pyplot as plt

from matplotlib.colors import LogNorm

from rat_timm.dense import Segmenter
from training.cells import MOVIES, Cells

torch.manual_seed(0)
spacing = MOVIES["hela"].spacing
network = Segmenter("test_rat", num_classes=2, in_chans=1, width=16, spacing=spacing).eval()  # random weights
image = Cells("hela", "test")[0].image[None, :, 200:296, 320:448]
y, x = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
mask = ((y - 48) ** 2 + (x - 40) ** 2 > 400)[None]
contents = {"zeros": torch.zeros(()), "noise": torch.randn(image.shape), "NaN": torch.tensor(torch.nan)}
filled = {name: torch.where(mask[:, None], image, content) for name, content in contents.items()}
with torch.inference_mode():
    masked = {name: network(pixels, spacing=spacing, mask=mask) for name, pixels in filled.items()}
    unmasked = {name: network(pixels, spacing=spacing) for name, pixels in filled.items()}
for name in ("noise", "NaN"):
    print(f"{name} in place of zeros: with the mask the same bits: {torch.equal(masked['zeros'], masked[name])}")

# %%
# Without a mask, what is in the disc is seen as far as the network looks:

figure, row = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
height, width = (n * step for n, step in zip(image.shape[2:], spacing, strict=True))
row[0].imshow(filled["noise"][0, 0], extent=(0, width, height, 0), vmin=0, vmax=1)
row[0].set(title="noise in place of data", xlabel="µm")
for axes, logits, name in ((row[1], unmasked, "not told"), (row[2], masked, "masked")):
    change = (logits["noise"] - logits["zeros"]).abs().amax(1)[0]
    shown = axes.imshow(change, extent=(0, width, height, 0), cmap="magma", norm=LogNorm(1e-5, 1))
    axes.set_facecolor("black")  # no change at all
    axes.set(title=f"{name}: logits change by up to {change.max():.2g}", xlabel="µm")
    figure.colorbar(shown, ax=axes, label="change", shrink=0.7)

# %%
# Why it holds
# ------------
# Masks travel with the tokens. A convolution takes zeros for what is masked, attention gives it no weight, a group
# takes nothing of it, norms and means leave it out, and resampling gives it no weight either. A coarse token is valid
# if any pixel under it is. Batches of images of different sizes are filled up and masked in the same way
# (``data.collate``), and pretraining hides blocks by masks (:doc:`plot_pretrain`).
#
# Only plain convolutions of ``others`` do not know masks: in networks of other libraries
# (:doc:`plot_smp`), the backbone's part holds and their decoders' does not.
#
# Next: :doc:`plot_pyramids`. Reference: :api:`rat_timm.dense`.
