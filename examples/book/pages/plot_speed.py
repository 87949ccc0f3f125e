"""
Speed
=====

How long it takes goes with the number of pixels at the network's own pixel size, and no faster. On GPUs it is slower
than networks of plain windows. This page measures the first with a small network; the second was measured elsewhere.
"""

# %%
# Linear in pixels
# ----------------
# Attention looks at windows and groupings are local, so that twice the side costs four times as much.

import time

import timm
import torch
from matplotlib import pyplot as plt

import rat_timm  # registers the models
from book import pick

model = timm.create_model("test_rat", features_only=True, spacing=1.0).eval()


def seconds(batch, spacing=None, network=model):
    """Returns the best time of three runs."""
    times = []
    with torch.inference_mode():
        for _ in range(3):
            begun = time.perf_counter()
            network(batch, spacing=spacing)
            times.append(time.perf_counter() - begun)
    return min(times)


sides = pick((64, 128, 256, 512), (64, 128, 256, 512, 1024, 2048))
taken = [1000 * seconds(torch.randn(1, 3, side, side)) for side in sides]
for side, milliseconds in zip(sides, taken, strict=True):
    print(f"{side} x {side}: {milliseconds:.1f} ms, {1e6 * milliseconds / side**2:.0f} ns per pixel")
figure, axes = plt.subplots(figsize=(5.5, 3.5))
pixels = [side**2 for side in sides]
axes.loglog(pixels, taken, "o-", label="measured")
axes.loglog(pixels, [taken[-1] * n / pixels[-1] for n in pixels], "--", color="grey", label="in proportion to pixels")
axes.set(title="Time grows as pixels do", xlabel="pixels", ylabel=f"ms, {torch.get_num_threads()} thread(s)")
axes.legend()

# %%
# What pixel sizes cost
# ---------------------
# Images are brought to the network's pixel size first, and cost what the resampled image costs: with pixels of 2 units
# four times as much as with pixels of 1, of which there are fewer. Images of different pixel sizes in one batch are
# computed apart, one after the other: on a GPU, above all, batches of one pixel size are better.

classifier = timm.create_model("test_rat", spacing=1.0).eval()


def classify(spacing):
    """Returns the best time of three runs over eight images."""
    return seconds(torch.randn(8, 3, 96, 96), spacing, classifier)


several = torch.linspace(0.9, 1.1, 8)[:, None].expand(8, 2)
for name, spacing in (
    ("pixels of 0.5", 0.5),
    ("pixels of 1", 1.0),
    ("pixels of 2", 2.0),
    ("eight pixel sizes", several),
):
    print(f"eight images with {name}: {1000 * classify(spacing):.0f} ms")

# %%
# What makes it faster
# --------------------
# - On a GPU: bfloat16 (``torch.autocast``), batches of one pixel size, ``torch.compile(model)``: every image size is
#   compiled anew. NATTEN's kernels are used where they are installed.
# - Few classes of sizes: ``training_transform(size)`` makes crops of one size, ``factors=`` many.
# - ``out=`` of a ``Segmenter`` at coarser pixels than the image's, and a coarser reference ``spacing``: half as many
#   pixels per axis are a quarter of the cost, if what is looked for can still be seen.
# - Large images: ``python -m rat_timm predict``, with ``--background`` for what need not be computed, and
#   ``--workers``.
#
# :doc:`What was measured </measured/benchmarks>`: on a CPU as fast as Swin, on a GPU, with a former layout, far slower,
# compiled or not. ``bash examples/gpu_day.sh FOLDER`` measures on your GPU, ``python examples/benchmark.py`` what you
# ask for.
#
# Next: :doc:`how it works <plot_positions>`. Reference: :api:`rat_timm.set_attention_backend`.
