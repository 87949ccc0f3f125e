"""
Pretrain on your own images
===========================

There are no pretrained weights of RAT, and labels are few. Images without labels are many: parts of them are hidden,
and the network learns to predict these.
"""

# %%
# A folder of images
# ------------------
# ``train/*`` and ``validation/*``, in any format that says its pixel size. Here, parts of frames of HeLa nuclei.

from pathlib import Path

import tifffile

from training.cells import MOVIES, Cells

movie = MOVIES["hela"]
size = {"axes": "YX", "PhysicalSizeY": movie.spacing[0], "PhysicalSizeX": movie.spacing[1]}
for part in ("train", "validation"):
    Path("unlabelled", part).mkdir(parents=True, exist_ok=True)
    frames = Cells("hela", part)
    for index in range(2):
        pixels = frames[index].image[0, 200:392, 300:556].numpy()
        tifffile.imwrite(f"unlabelled/{part}/{index}.ome.tif", pixels, metadata=size)

# %%
# Hide and predict
# ----------------
# Blocks of a physical size are hidden, in random crops. What is hidden is masked exactly: nothing of it reaches the
# network. "explained" is the share of the variance of hidden pixels, normalised in each block, that is predicted.
#
# (``run`` does what a shell does with the command.)

from book import pick, run

run(
    "python examples/pretrain.py --data unlabelled --output runs/pretrained --model test_rat --size '[64, 64]' "
    "--block 8 --share 0.5 --width 64 --depth 1 --crops 16 --batch_size 8 --lr 2e-3 --flip true --workers 0 "
    f"--epochs {pick(2, 100)}"
)

# %%
# Below zero is worse than the mean: after the few steps of the book's short form nothing is learned yet.

# %%
# What TensorBoard shows of it (``tensorboard --logdir runs``), after the last epoch:

from io import BytesIO

from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

events = EventAccumulator("runs/pretrained").Reload()
last = events.Images("validation/prediction")[-1]
figure, axes = plt.subplots(figsize=(8, 3))
axes.imshow(plt.imread(BytesIO(last.encoded_image_string)))
axes.set_axis_off()
axes.set_title("An image, what is left of it, and what is predicted of the rest")
loss = [scalar.value for scalar in events.Scalars("train/loss")]
print(f"loss {loss[0]:.2f} at the first step, {loss[-1]:.2f} at the last of {len(loss)}")

# %%
# Start from it
# -------------
# What is saved is an ordinary model, which knows the pixel sizes that it has seen::
#
#     python examples/train.py --output runs/mine --data labelled --task instances \
#         --model local-dir:runs/pretrained/model

import timm

import rat_timm

model = timm.create_model("local-dir:runs/pretrained/model", pretrained=True, num_classes=5)
print(model.spacing_range, model.num_features, "features")

# %%
# Is it worth it? In the repository, ``examples/run_pretraining.py`` says what was measured on two movies: fine-tuned
# for 60 steps on one labelled frame, a pretrained network found 6 (HeLa) and 20 (bacteria) of 100 objects more, with
# each of six seeds. With three frames it was 2 and 7 on average, less than seeds differ.
#
# Next: :doc:`plot_publish`. Reference: :api:`rat_timm.pretrain`.
