r"""
Install
=======

The package is installed from a checkout, with Python 3.10 or newer::

    python -m pip install '.[examples]'

Extras bring what a part needs: ``data`` reads files, ``dense`` segments, ``predict`` goes through large images,
``train`` and ``lightning`` train, ``explain`` draws what a network looks at, ``napari``, ``monai`` and ``transformers``
are for these tools. ``python -m pip install '.[train,predict,explain]'`` is all that the first steps of this book ask
for.

On a GPU, ``python -m pip install --no-build-isolation natten``, after PyTorch, adds NATTEN's kernels for attention.
"""

# %%
# Is it there?
# ------------
# Importing the package registers its models with timm.

import timm
import torch

import rat_timm

print(f"rat_timm {rat_timm.__version__}, PyTorch {torch.__version__}, timm {timm.__version__}")
print(len(timm.list_models("rat*")) + len(timm.list_models("apvit*")), "models")

# %%
# The command lists them: parameters, multiplications of an image, and which have weights. ``test_rat`` and
# ``test_rat_3d`` are small, for tests, and the only ones with weights of RAT itself: handwritten digits. The pages of
# this book train networks of this size. ``rat_vit_*`` load timm's weights from the Hugging Face Hub.

from book import run

run("python -m rat_timm list 'test_rat*'")

# %%
# (``run`` does what a shell does with the command, in the process that builds this book.)
#
# Every image has a pixel size
# ----------------------------
# A model is called with an image of any size and the size of its pixels: a number, or one per axis in the order of the
# array's axes, (y, x) or (z, y, x). The unit is yours, as long as it is that of the model's ``spacing``.

model = timm.create_model("rat_tiny", num_classes=5, spacing=0.5).eval()  # random weights, for pixels of 0.5 um
image = torch.randn(1, 3, 96, 128)
print(model(image, spacing=0.25).shape)

# %%
# Next: :doc:`plot_classify`. Reference: :api:`rat_timm`.
