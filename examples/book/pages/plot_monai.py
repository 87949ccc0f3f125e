"""
If you use MONAI
================

Your files have affine matrices, and MONAI's transforms keep them. ``SpacingInferer`` tells networks of this package the
voxel size that the matrix of a ``MetaTensor`` says; no ``Spacingd`` is needed in front of them.

Install: ``python -m pip install '.[monai,predict,train]'``.
"""

# %%
# From labelled volumes to a prediction on your file
# --------------------------------------------------
# ``scans`` is a folder with ``train/images/*.nii.gz``, ``train/labels/*.nii.gz`` and the same in ``validation``. (Here
# they are small drawn balls, and ``short.yaml`` makes the network small and the training short: leave ``--config`` out.
# ``run`` does what a shell does with the command.)

# sphinx_gallery_start_ignore
from stand_ins import make_balls

make_balls("scans")
# sphinx_gallery_end_ignore
from book import run
from monai.transforms import LoadImage, SaveImage, ScaleIntensityRange

run(
    "python examples/train.py --task segmentation --data scans --output runs/ct --model rat_tiny_3d"
    " --pretrained false --intensity data --unit mm --assumed_unit mm --config short.yaml"
)

# %%
# ``--intensity data`` scales all images alike, as Hounsfield units want it; those of MR, which have no unit, want
# ``--intensity sample``. ``assumed_unit`` is for files that do not say that their numbers are millimetres, as many
# don't. RAT has no pretrained weights for volumes, and learns slowly: ``--epochs 100`` and more for a first result.
#
# Arrays of NIfTI files are (x, y, z) in MONAI, and (z, y, x) in the training program: hence ``reverse_axes``. Which
# intensities became 0 and 1 is in the model's folder.

from rat_timm.dense import Segmenter
from rat_timm.monai import SpacingInferer
from rat_timm.predict.facts import read_facts

image = LoadImage("NibabelReader", ensure_channel_first=True)("mine.nii.gz")
scaled = ScaleIntensityRange(*read_facts("runs/ct/model").intensities, 0, 1)(image)
logits = SpacingInferer(unit="mm", assumed_unit="mm", reverse_axes=True)(scaled[None], Segmenter.load("runs/ct/model"))
SaveImage(output_dir="found", output_dtype="uint8", print_log=False)(logits[0].argmax(0, keepdim=True))
print("voxels of", image.pixdim.tolist(), "mm:", int(logits.argmax(1).sum() * image.pixdim.prod()), "mm3 found")

# %%
# ``found/mine/mine_trans.nii.gz`` has the affine matrix of the file. Large volumes: ``SpacingInferer(..., roi_size=96,
# overlap=0.5)`` is MONAI's sliding window, and one command goes from a file to a file, with the same scaling::
#
#     python -m rat_timm predict mine.nii.gz --model runs/ct/model --output found.nii.gz --unit mm --assumed-unit mm
#
# As a bundle
# -----------
# Two commands, the second of which is MONAI's own::
#
#     python -m rat_timm export-bundle runs/ct/model --output bundle --unit mm --assumed-unit mm
#     python -m monai.bundle run --config_file bundle/configs/inference.json --bundle_root bundle \
#         --dataset_dir scans/validation/images --output_dir predictions
#
# In MONAI's own training
# -----------------------
# ``SpacingInferer`` is the ``inferer`` of a ``SupervisedTrainer``, too, and ``FlexibleUNet`` takes an encoder:
# ``rat_timm.adapters.register_monai_encoder("rat_tiny_3d")``.
#
# It is not better than a network on resampled volumes where all can be resampled (:doc:`measured
# </measured/resolution_study/README>`); what you save are the resampling of labels, and its errors.
#
# Reference: :api:`rat_timm.monai`, :api:`rat_timm.adapters`.
