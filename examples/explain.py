"""What the model of handwritten digits that the package ships looks at: four pictures, in seconds.

    python examples/explain.py [--output FOLDER] [--model test_rat | test_rat_3d]

`groups.png` shows which group each token of a page of digits went to, `levels.png` how much attention goes to an
overview of the page and to one of its digits, `class.png` what speaks for the digit that is recognised, `spacing.png`
how many are recognised when the pixel size that is told is wrong. (No pyramids were seen in training.) Of volumes, in
which digits are plates, pictures show the middle slice.
"""

import argparse
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import rat_timm  # noqa: F401  (registers the models)
from rat_timm import explain
from rat_timm.data import Sample, collate
from rat_timm.geometry.grid import Grid, Tokens
from rat_timm.geometry.resample import resample
from training.digits import FIELD, Digits, digits, draw, poses, spacing_of

ROWS, COLUMNS = 3, 4


def drawn(data: Digits, size: tuple[int, ...], model: nn.Module) -> Tensor:
    """Draws digits in so many pixels, as the model takes them, ``[N, C, *size]``."""
    pose = poses(len(data.labels), len(size), 0, 0, torch.Generator())
    x = draw(data.images, size, pose).expand(-1, model.in_chans, *size)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, *[1] * len(size)) for name in ("mean", "std"))
    return (x - mean) / std


def page(x: Tensor) -> Tensor:
    """Puts ``[ROWS * COLUMNS, C, ..., h, w]`` side by side, ``[1, C, ..., ROWS * h, COLUMNS * w]``."""
    rows = [torch.cat(list(x[start : start + COLUMNS]), dim=-1) for start in range(0, len(x), COLUMNS)]
    return torch.cat(rows, dim=-2)[None]


def main() -> None:
    """Explains and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("explained"))
    parser.add_argument("--model", choices=["test_rat", "test_rat_3d"], default="test_rat")
    parser.add_argument("--digits", type=int, default=200, help="for the accuracy at wrong pixel sizes")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    model = timm.create_model(given.model, pretrained=True).eval()
    _, held_out = digits()
    size = (32, 32) if given.model == "test_rat" else (16, 32, 32)
    spacing = spacing_of(size)
    single = drawn(Digits(*(part[: ROWS * COLUMNS] for part in held_out)), size, model)
    whole = page(single)

    groups = explain.group_tokens(model, whole, fine=0, coarse=2, spacing=spacing)
    explain.plot_groups(whole, groups).savefig(given.output / "groups.png")

    tokens = Tokens(whole.movedim(1, -1), Grid.create(whole.shape[2:], spacing))
    coarse = resample(tokens, [2 * step for step in spacing])
    levels = [coarse.x.movedim(-1, 1), single[:1]]
    told = [tuple(2 * step for step in spacing), spacing]
    origin = [tuple(step for step in spacing), tuple(step / 2 for step in spacing)]
    attention = explain.attend_levels(model, levels, spacing=told, origin=origin)
    explain.plot_levels(levels, attention).savefig(given.output / "levels.png")

    fine = tuple(2 * n for n in size)
    large = drawn(Digits(*(part[:1] for part in held_out)), fine, model)
    activation = explain.map_class(model, large, stage=1, spacing=spacing_of(fine))
    seen = model(large, spacing=spacing_of(fine)).argmax().item()
    figure = explain.plot_class(large, activation, name=f"a {seen} (it is a {int(held_out.labels[0])})")
    figure.savefig(given.output / "class.png")

    tested = Digits(*(part[: given.digits] for part in held_out))
    samples = [
        Sample(image, torch.tensor(spacing), target=int(label))
        for image, label in zip(drawn(tested, size, model), tested.labels, strict=True)
    ]
    rows = explain.spacing_sensitivity(model, [collate(samples)])
    explain.plot_sensitivity(rows, "accuracy").savefig(given.output / "spacing.png")
    right = next(row.metric for row in rows if row.factor == 1.0)
    print(f"{given.output}: {groups.shares.shape[-1]} groups; {right:.1%} of {len(samples)} digits of {FIELD:g} units")


if __name__ == "__main__":
    main()
