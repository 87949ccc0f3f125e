"""
If you use transformers
=======================

Classes for transformers hand the pixel size of an image on to the network, and resize nothing. What is saved here is
also opened by its own ``AutoModelForImageClassification``, which takes ``spacing`` when it is called.

Install: ``python -m pip install '.[transformers,train]'``.
"""

# %%
# From a folder of pictures to an answer on yours
# -----------------------------------------------
# ``photos`` has ``train/<class>/*`` and ``validation/<class>/*``. PNG and JPEG do not say how large a pixel is, so
# ``--spacing`` does; OME-TIFF, NIfTI and DICOM do. (Here they are two of the digits, the network is the small one that
# knows digits, and ``short.yaml`` makes the training a short one. ``run`` does what a shell does with the command.) For
# pictures of your own leave ``--config`` out, and add one of
#
# - ``--model rat_vit_small_patch16_rope_mixed_224 --size '[224, 224]'``, which begins with timm's weights from the Hub;
# - ``--model rat_tiny --model_args '{embed_dim: 32}' --pretrained false --size '[48, 48]' --epochs 150 --flip true``: a
#   small network that begins with none and :doc:`learns from tens of pictures </measured/benchmarks>` on a CPU. 48
#   pixels are enough where you can tell the classes apart at that size yourself.

# sphinx_gallery_start_ignore
from stand_ins import make_pictures

make_pictures("photos")
# sphinx_gallery_end_ignore
from book import run
from transformers import pipeline

run("python examples/train.py --data photos --output runs/photos --spacing '[0.5, 0.5]' --config short.yaml")

# %%
# Training brings pictures to ``--size`` pixels, whose own size follows: 64 pixels of 0.5 become 32 of 1. The pipeline,
# which is transformers' own, takes pictures of any size as they are, with their pixel size. It warns if training had no
# such pixels; then shrink the picture as training did, and say so.

from rat_timm.huggingface import RatForImageClassification, RatImageProcessor, RatPipeline

model = RatForImageClassification.from_pretrained("runs/photos/model")
processor = RatImageProcessor.from_pretrained("runs/photos/model")
classify = pipeline("image-classification", model, image_processor=processor, pipeline_class=RatPipeline)
for answer in classify("mine.png", spacing=1.0, top_k=2):
    print(f"{answer['label']}: {answer['score']:.0%}")

# %%
# Weights on the Hub open in the same way: ``from_pretrained("me/digits")`` of what ``rat_timm.hub.push`` wrote
# (:doc:`plot_publish`).
#
# Trainer
# -------
# transformers' ``Trainer`` drops the columns of a data set that a model's ``forward`` does not name, the pixel size
# among them. ``RatForImageClassification`` names it; around other networks,
# ``rat_timm.huggingface_training.RatTrainer`` keeps it. Detectors take ``RatBackbone``.
#
# There are no pretrained weights of RAT: for pictures like ImageNet's, transformers' own models are better, or
# ``rat_vit_*``, which are timm's DINOv3 with physical positions.
#
# Reference: :api:`rat_timm.huggingface`, :api:`rat_timm.huggingface_training`.
