"""Trains any variant on a folder of images or volumes, or on handwritten digits, with the pixel size.

    python examples/train.py --output runs/digits         # test_rat on digits, half a minute
    python examples/train.py --config mine.yaml --lr 1e-4               # a config, and flags over it
    torchrun --nproc_per_node=4 examples/train.py --config mine.yaml    # DDP
    torchrun --nproc_per_node=4 examples/train.py --config mine.yaml --parallel fsdp
    python examples/train_ray.py --config mine.yaml --num_workers 4     # on a Ray cluster

`--help` lists what a config may hold. The folder has `train/<class>/*` and `validation/<class>/*`: OME-TIFF, OME-Zarr,
NIfTI or DICOM, which say their pixel size, or PNG and JPEG, whose pixel size `--spacing` says. The same command goes on
where it was interrupted, with the same losses as if it had not been. The folder `model` in the output is what
`timm.create_model("local-dir:OUTPUT/model", pretrained=True)` takes. A config is YAML:

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
