"""
Positions are physical
======================

Attention has to know where tokens are. In most networks that is an index in the image; here it is a place in the world,
in the unit of the pixel size.
"""

# %%
# Pixels and tokens lie at their centres
# --------------------------------------
# A ``Grid`` says where pixels are: their number, their spacing, and where the first one's centre is. It also knows
# what a convolution does to it, so that tokens lie where their kernels look. Below, an overview of 4 units per pixel,
# a crop of it of 1 unit, and the crop's tokens after two convolutions of stride 2, as in the stem.

from matplotlib import pyplot as plt

from rat_timm import Grid

overview = Grid.create((6, 8), spacing=4.0)
crop = Grid.create((8, 12), spacing=1.0, origin=(8.5, 8.5))
tokens = crop
for _ in range(2):
    tokens = tokens.conv(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
print("tokens:", tokens.shape, "spacing", tokens.spacing[0].tolist(), "first at", tokens.origin[0].tolist())

figure, axes = plt.subplots(figsize=(6.5, 4.5))
for grid, marker, size, color, name in (
    (overview, "s", 60, "tab:gray", "pixels of the overview"),
    (crop, ".", 20, "tab:blue", "pixels of the crop"),
    (tokens, "x", 70, "tab:red", "tokens of the crop"),
):
    y, x = grid.coordinates()[0].flatten(0, 1).T
    axes.scatter(x, y, s=size, c=color, marker=marker, label=name)
axes.set(title="All grids lie in one coordinate system", xlabel="x (units)", ylabel="y (units)", aspect="equal")
axes.invert_yaxis()
figure.legend(loc="outside lower center", ncols=3)

# %%
# Attention turns by distance
# ---------------------------
# Rotary spatial embeddings turn pairs of a query's and a key's channels by angles that grow with the place, so that
# their product depends on how far apart both are: in units, along any direction. Here one row of tokens is rotated on
# grids of three spacings. All queries and keys are alike, so that the products are those of the rotations alone.

import torch

from rat_timm.layers import RotarySpatialEmbedding

rose = RotarySpatialEmbedding(feature_dims=32, num_heads=1, spatial_dims=2, base_theta=100, learnable=False)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for spacing, marker in ((0.5, "."), (1.0, "o"), (2.0, "s")):
    row = Grid.create((1, round(24 / spacing)), spacing, origin=(0.0, 0.0))
    places = row.positions(torch.zeros(1, 2), unit=(1.0, 1.0))
    turned = rose(torch.ones(1, *row.shape, 1, 32), places)[0, 0, :, 0]  # [tokens, channels]
    product = turned @ turned[0] / 32
    for axes, x in ((left, torch.arange(len(product))), (right, row.coordinates()[0, 0, :, 1])):
        axes.plot(x, product, marker=marker, linestyle="-" if axes is left else "none", label=f"spacing {spacing:g}")
left.set(title="over the index: three curves", xlabel="tokens apart", ylabel="product of query and key")
right.set(title="over the distance: one curve", xlabel="units apart")
left.legend()

# %%
# A place has one phase, whatever the pixel size and whichever image of a pyramid shows it. Distances are divided by one
# length per layer, the spacing of its tokens at the model's own pixel size, so that frequencies suit what the layer
# sees.
#
# This is not all: kernels of convolutions count pixels. See :doc:`plot_reference`. Reference: :api:`rat_timm.geometry`,
# :api:`rat_timm.layers`.
