"""
A slide with its overview
=========================

What a cell is may depend on the tissue around it, which is wider than a network's window. A pyramid, the window and an
overview around it, goes in at once; both are placed by their physical coordinates.
"""

# %%
# A slide on disk
# ---------------
# The photograph of stained tissue that scikit-image ships stands for a slide. Nobody says its pixel size: let it be 0.5
# micrometres. The file has two levels, as slides do.

import numpy as np
import tifffile
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from skimage.data import immunohistochemistry
from skimage.transform import downscale_local_mean

from rat_timm.data import crop_levels, read_levels

photograph = immunohistochemistry()  # [512, 512, 3]
coarse = downscale_local_mean(photograph, (4, 4, 1)).astype(np.uint8)
size = {"axes": "YXS", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.5}
with tifffile.TiffWriter("slide.ome.tif", ome=True) as file:
    file.write(photograph, subifds=1, metadata=size, photometric="rgb")
    file.write(coarse, subfiletype=1, photometric="rgb")

levels = read_levels("slide.ome.tif")  # no pixel is read yet
for level in levels:
    print(level.grid.shape, "pixels of", level.grid.spacing[0].tolist(), "um")

# %%
# A window and what is around it
# ------------------------------
# Both are cut around one point; of the stored levels the one with the wanted pixels is read, and nothing is resampled.

crop = crop_levels(levels, center=(120, 150), size=(64, 64), spacings=(0.5, 2.0))
figure, row = plt.subplots(1, 2, figsize=(8, 3.8))
for axes, image, spacing, origin, name in zip(row, crop.image, crop.spacing, crop.origin, ("window", "overview")):
    top, left = (origin - spacing / 2).tolist()
    height, width = (spacing * 64).tolist()
    axes.imshow(image.movedim(0, -1), extent=(left, left + width, top + height, top))
    axes.set(title=f"{name}: pixels of {spacing[0]:g} µm", xlabel="x (µm)", ylabel="y (µm)")
    if name == "window":
        box = Rectangle((left, top), width, height, fill=False, color="red", linewidth=2)
row[1].add_patch(box)

# %%
# Train on pyramids
# -----------------
# The labels are made by a rule, the brown stain, so that there is something to learn. ``context=True`` brings what is
# decoded of the overview to the window's pixels by position, and ``level_ratios`` says by how much its pixels are
# larger.

import torch
from skimage.color import rgb2hed

from book import pick
from rat_timm.data import collate_crops
from rat_timm.dense import Segmenter

stained = torch.from_numpy(rgb2hed(photograph)[..., 2] > 0.06)
torch.manual_seed(0)
network = Segmenter("test_rat", 2, width=16, context=True, spacing=0.5, level_ratios=(1, 4))
optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
steps = pick(18, 400)
for step in range(steps):
    crops = [crop_levels(levels, (40 + 176 * torch.rand(2)).tolist(), (64, 64), (0.5, 2.0)) for _ in range(2)]
    rows = [[round(float(at) / 0.5 - 0.5) for at in one.origin[0]] for one in crops]
    target = torch.stack([stained[y : y + 64, x : x + 64] for y, x in rows]).long()
    batch = collate_crops(crops)
    images = [image / 255 - 0.5 for image in batch.image]
    logits = network(images, spacing=batch.spacing, origin=batch.origin, mask=batch.mask)
    loss = torch.nn.functional.cross_entropy(logits, target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % (steps // 3) == 0:
        print(f"step {step}: loss {loss:.2f}")
network.save("runs/stain")

# %%
# Predict the slide
# -----------------
# Tile by tile, from a file to a file, in bounded memory; ``levels`` says which overview each tile sees, and
# ``intensities`` which pixel values become 0 and 1, as in training.

from book import run
from rat_timm.data import read

run(
    "python -m rat_timm predict slide.ome.tif --model runs/stain --output stained.ome.tif --levels 2.0 --tile 64 "
    "--intensities 127.5 382.5 --region 190:318,240:368 --quiet"
)
found = read("stained.ome.tif").pixels[0]
right = stained[190:318, 240:368]
print(f"{(found == right).float().mean():.1%} of {found.numel()} pixels as the rule says")
figure, row = plt.subplots(1, 3, figsize=(10, 3.4))
part = photograph[190:318, 240:368]
for axes, pixels, title in zip(row, (part, right, found), ("slide", "brown by the rule", "predicted")):
    axes.imshow(pixels, extent=(120, 184, 159, 95))
    axes.set(title=title, xlabel="x (µm)")
row[0].set_ylabel("y (µm)")

# %%
# Colour needs no overview. Where it decides, and where not, is in :doc:`what was measured
# </measured/context_study/README>`: on drawn tissue whose regions a window cannot tell apart. Levels that are placed
# wrongly mislead it.
#
# Your own slides
# ---------------
# ``python examples/train.py --levels '[1, 4]' --task segmentation --data mine ...`` trains on such pyramids, and
# ``--workers 8`` or ``--scheduler dask`` of ``predict`` computes tiles side by side.
#
# Next: :doc:`plot_pretrain`. Reference: :api:`rat_timm.data`, :api:`rat_timm.predict`.
