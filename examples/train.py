"""Trains any variant on a folder of images or volumes, or on data of its own, with the pixel size.

    python examples/train.py --output runs/digits         # test_rat on digits, half a minute
    python examples/train.py --output runs/discs --task instances --quick true   # or segmentation, detection
    python examples/train.py --config mine.yaml --lr 1e-4               # a config, and flags over it
    torchrun --nproc_per_node=4 examples/train.py --config mine.yaml    # DDP
    torchrun --nproc_per_node=4 examples/train.py --config mine.yaml --parallel fsdp
    python examples/train_ray.py --config mine.yaml --num_workers 4     # on a Ray cluster

`--help` lists what a config may hold. The folder has `train/<class>/*` and `validation/<class>/*`: OME-TIFF, OME-Zarr,
NIfTI or DICOM, which say their pixel size, or PNG and JPEG, whose pixel size `--spacing` says. The same command goes on
where it was interrupted, with the same losses as if it had not been. The folder `model` in the output is what
`timm.create_model("local-dir:OUTPUT/model", pretrained=True)` takes. What the other tasks save, evaluate.py evaluates,
also at pixel sizes that training did not have.

Segmentation, instances and detection take folders `train/images/*` and `train/labels/*` of the same names, and
`validation/...` and `test/...` likewise, of the same formats and TIFF: labels are classes of pixels, or number objects.
Training sees random crops, `foreground` of which have labels in them (where objects are few, nearly all should), with
the pixel sizes that `factors` allows, and with overviews around them where `levels` says so; validation sees whole
images, in windows of `tile` pixels if they are too large. `--data hela`, `bacteria` and `cho` (volumes) are real cells,
fetched once (see `training.cells`). Nuclei in minutes, and a U-Net to compare:

    python examples/train.py --config hela.yaml
    python examples/train.py --config hela.yaml --output runs/unet --model smp:unet-convnext_atto --model_args "{}"
    python examples/evaluate.py --trained runs/hela --output runs/hela/test --factors 0.5 0.7 1 1.4 2 --resized

    # hela.yaml
    output: runs/hela
    task: instances
    data: hela
    model: rat_tiny
    model_args: {embed_dim: 32}
    pretrained: false
    flip: true
    crops: 40
    epochs: 4
    batch_size: 4
    workers: 0

A config of a classifier:

    output: runs/cells
    model: rat_tiny
    pretrained: false
    data: cells
    unit: um
    size: [224, 224]
    flip: true
    epochs: 100
    batch_size: 64
    precision: bf16
"""

import jsonargparse

from training.config import Config
from training.tasks import task_class
from training.trainer import train


def main() -> None:
    """Reads the command line and trains."""
    config = jsonargparse.auto_cli(Config, as_positional=False, description=__doc__)
    reached = train(config)
    print(f"{task_class(config).score} {reached:.1%}, {config.output / 'model'}")


if __name__ == "__main__":
    main()
