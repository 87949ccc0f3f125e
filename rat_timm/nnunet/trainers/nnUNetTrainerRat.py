"""What nnU-Net finds on the path of the variable ``nnUNet_extTrainer``."""

from rat_timm.nnunet import nnUNetTrainerRat, nnUNetTrainerRatBase, nnUNetTrainerRatSmall, nnUNetTrainerRatTry

__all__ = ["nnUNetTrainerRat", "nnUNetTrainerRatBase", "nnUNetTrainerRatSmall", "nnUNetTrainerRatTry"]
