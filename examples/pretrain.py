"""Trains a backbone on images without labels: it predicts hidden blocks of them, or learns a teacher's maps.

    python examples/pretrain.py --output runs/masked --quick true           # drawn discs, seconds
    python examples/pretrain.py --output runs/mine --data mine --model rat_tiny --unit um --epochs 100
    python examples/pretrain.py --output runs/taught --data mine --model rat_tiny --task distillation
    torchrun --nproc_per_node=4 examples/pretrain.py --config mine.yaml     # DDP, or with --parallel fsdp
    python examples/train_ray.py --task masked --pretrained false --output runs/mine --data mine --num_workers 4

`--help` lists what a config may hold; it is that of train.py, and so is the trainer: it goes on where it was
interrupted, and writes TensorBoard's logs, with pictures of what was predicted. The folder has `train/*` and
`validation/*`: OME-TIFF, OME-Zarr, NIfTI or DICOM of any pixel size, or PNG, JPEG and TIFF, whose pixel size
`--spacing` says; also `train/images/*` beside `train/labels/*`, of which those of validation are used for a running
measure ("knn": classes of places, told by their nearest neighbours among features).

Masked images (`--task masked`, the default). In random crops a `share` of blocks of a physical size (`block`) is
hidden; with `levels` also in overviews around a crop, each of which may be hidden whole (`hide_level`). A hierarchical
model is given what is hidden as its mask, which is exact; a plain one (`rat_vit_*`) drops these tokens, so that a step
with 75% hidden takes less than half the time. "explained" is the share of the variance of hidden pixels, normalised in
each block, that is predicted.

Distillation. The teacher is any model of timm's that has maps, or a folder with one that was saved here; by default
DINOv3's small ViT, where the Hugging Face Hub can be reached. A teacher of images teaches volumes by slices, across the
axes that `planes` says, with the pixel size that a slice has in its plane (or with `teacher_spacing`):

    python examples/pretrain.py --output runs/mr --data mr --unit mm --task distillation --model rat_tiny_3d \
        --planes "[0, 1, 2]" --teacher_spacing "[0.5, 0.5]"

What was trained starts other trainings, and is an ordinary model, with the range of pixel sizes that it has seen:

    python examples/train.py --output runs/cells --task instances --data cells --model local-dir:runs/mine/model
    timm.create_model("local-dir:runs/mine/model", pretrained=True, num_classes=5)
"""

import jsonargparse

from training.config import Config
from training.tasks import task_class
from training.trainer import train

DEFAULTS = {"task": "masked", "pretrained": False}


def main() -> None:
    """Reads the command line and trains."""
    config = jsonargparse.auto_cli(Config, as_positional=False, set_defaults=DEFAULTS, description=__doc__)
    reached = train(config)
    print(f"{task_class(config).score} {reached:.1%}, {config.output / 'model'}")


if __name__ == "__main__":
    main()
