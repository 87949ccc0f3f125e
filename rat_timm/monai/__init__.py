r"""MONAI: inference and training by what the affine matrix of a ``MetaTensor`` says, and bundles (extra ``monai``).

    from rat_timm.monai import SpacingInferer

    image = LoadImage(ensure_channel_first=True)("brain.nii.gz")  # a MetaTensor [1, x, y, z]
    logits = SpacingInferer(unit="mm")(image[None], segmenter)  # a MetaTensor with the image's affine matrix

MONAI's own inferers call networks with pixels alone, and its sliding window makes plain tensors of them before. Given
as ``inferer`` of a ``SupervisedTrainer`` or ``SupervisedEvaluator``, `SpacingInferer` tells networks the spacing.

    python -m rat_timm export-bundle models/lesions --output bundles/lesions --unit mm
    python -m monai.bundle run --config_file bundles/lesions/configs/inference.json --bundle_root bundles/lesions \
        --dataset_dir scans --output_dir predictions

makes a bundle of what ``rat_timm.dense.Segmenter.save`` wrote, and runs it on a folder of NIfTI files. In MONAI's own
training, `rat_timm.adapters.register_monai_encoder` gives ``FlexibleUNet`` an encoder for images and volumes.
"""

from .bundle import export_bundle, nifti_files
from .metatensor import SpacingInferer, UnitWriter

__all__ = ["SpacingInferer", "UnitWriter", "export_bundle", "nifti_files"]
