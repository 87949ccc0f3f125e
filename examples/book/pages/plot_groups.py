"""
Tokens are grouped
==================

Between its stages a network gets coarser. Most take the mean of a square, or a strided convolution. Spatial grouping
attention lets each token choose among the groups near it, so that groups can follow what is in the image.
"""

# %%
# Which token went where
# ----------------------
# The digit model that the package ships looks at a page of digits, at stride 4. Each token has a share in the groups
# around it; colours show the group with the largest share.

import timm
import torch

from rat_timm import explain
from training.digits import digits, draw, poses, spacing_of

model = timm.create_model("test_rat", pretrained=True).eval()
_, held_out = digits()
mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
drawn = (draw(held_out.images[:8], (32, 32), poses(8, 2, 0, 0, torch.Generator())) - mean) / std
page = drawn.unflatten(0, (2, 4)).permute(2, 0, 3, 1, 4).reshape(1, 3, 64, 128)
groups = explain.group_tokens(model, page, fine=0, coarse=1, spacing=spacing_of((32, 32)))
picture = explain.plot_groups(page, groups)

# %%
# A group is not a square
# -----------------------
# The tokens that four neighbouring groups are made of. A strided convolution takes the same of every square; here
# shares differ with what is in the image (lines: the digits).

from matplotlib import pyplot as plt

height, width = groups.coarse.shape
extent = (0, 128, 64, 0)
figure, axes = plt.subplots(2, 2, figsize=(9, 5))
for index, panel in enumerate(axes.flat):
    number = (height // 4 + index // 2) * width + width // 4 + index % 2
    shown = panel.imshow(groups.shares[0, ..., number], extent=extent, cmap="viridis", vmin=0, vmax=0.4)
    ink = {"levels": [float(page.mean())], "colors": "white", "linewidths": 0.7, "linestyles": "solid"}
    panel.contour(page[0, 0], extent=extent, origin="upper", **ink)
    panel.set(title=f"group {number}", xlabel="x (units)", ylabel="y (units)", xlim=(0, 64), ylim=(48, 0))
figure.colorbar(shown, ax=axes, label="share of a token", shrink=0.8)
print(f"{groups.shares.shape[-1]} groups; a token's largest share is {groups.shares.amax(-1).mean():.0%} on average")

# %%
# Shares of several stages multiply, so that each pixel belongs to a group of the coarsest stage: a segmentation that no
# decoder makes. Groups see tokens within a window alone (``sga_attention_type="sparse"``), which keeps cost linear;
# ``"dense"`` lets every token go anywhere and is quadratic.
#
# Do they help? Not where it was measured: on real cells a network with strided convolutions in their place
# (``sga_attention_type="none"``) is :doc:`no worse </measured/cells/README>`.
#
# Next: :doc:`plot_masks`. Reference: :api:`rat_timm.explain`, :api:`rat_timm.ops`.
