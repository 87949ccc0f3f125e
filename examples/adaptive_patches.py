"""Adaptive against regular patches: handwritten digits of any size, anywhere on a large canvas, among pieces of others.

    python examples/adaptive_patches.py                    # a table, in minutes, and adaptive_patches.png

Both networks are timm's vision transformer and have the same number of tokens and about the same number of
multiplications: the regular one sees the canvas reduced to so many patches and has one block more; the adaptive one
places its patches itself. Digits that are tested are none that are trained on.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import timm
import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import rat_timm  # noqa: F401  (registers the models)
from rat_timm.cost import count_macs

CANVAS = 96  # pixels per axis
SIZES = (16, 40)  # of a digit, in pixels
PIECES = 10  # of other digits on a canvas
PATCH = 16
SMALL = {"embed_dim": 96, "num_heads": 3, "in_chans": 1, "num_classes": 10, "patch_size": PATCH, "global_pool": "avg"}


class Digits(NamedTuple):
    """Handwritten digits of 8 x 8 pixels: scikit-learn's, from the UCI repository.

    Attributes:
        x: ``[N, 1, 8, 8]``, from 0 to 1.
        label: ``[N]``.
    """

    x: Tensor
    label: Tensor


def load() -> tuple[Digits, Digits]:
    """Returns digits to train on, and others to test on."""
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    label = torch.from_numpy(data.target)
    return Digits(x[:1300], label[:1300]), Digits(x[1300:], label[1300:])


def place(x: Tensor, size: Tensor, center: Tensor) -> Tensor:
    """Draws images ``[N, 1, h, w]`` on empty canvases, ``size`` ``[N]`` pixels large around ``center`` ``[N, 2]``."""
    scale = (CANVAS / size)[:, None, None]
    to_image = torch.cat((torch.eye(2) * scale, -(2 * center / CANVAS - 1).unsqueeze(-1) * scale), dim=-1)
    grid = F.affine_grid(to_image, [len(x), 1, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def scatter(digits: Digits, count: int) -> tuple[Tensor, Tensor]:
    """Draws canvases with a whole digit each, and pieces of others; returns ``[count, 1, *CANVAS]`` and labels."""
    chosen = torch.randint(len(digits.x), (count,))
    size = torch.empty(count).uniform_(*SIZES)
    canvas = place(digits.x[chosen], size, size[:, None] / 2 + torch.rand(count, 2) * (CANVAS - size)[:, None])
    for _ in range(PIECES):
        others = digits.x[torch.randint(len(digits.x), (count,))]
        corner = torch.randint(0, 5, (count, 2))
        near = (torch.arange(8) - corner.unsqueeze(-1)) // 4 == 0  # four pixels along each axis
        piece = others * (near[:, 0, :, None] & near[:, 1, None, :]).unsqueeze(1)
        spread = place(piece, torch.empty(count).uniform_(*SIZES), torch.rand(count, 2) * CANVAS)
        canvas = torch.maximum(canvas, spread)
    return canvas + 0.05 * torch.randn_like(canvas), digits.label[chosen]


class Regular(nn.Module):
    """A vision transformer that sees the canvas reduced to ``tokens`` patches."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.size = PATCH * round(tokens**0.5)
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=self.size, depth=5, **SMALL)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies canvases."""
        return self.model(F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True))


def adaptive(tokens: int) -> nn.Module:
    """Makes a vision transformer that cuts ``tokens`` patches out of the canvas."""
    return timm.create_model(
        "apvit_tiny_patch16_224",
        img_size=CANVAS,
        depth=4,
        num_patches=tokens,
        scaling="isotropic",
        max_scale=CANVAS / PATCH,
        **SMALL,
    )


NETWORKS = {"regular": Regular, "adaptive": adaptive}


def train(model: nn.Module, digits: Digits, steps: int, batch: int = 64) -> None:
    """Trains a model on ever new canvases."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        x, label = scatter(digits, batch)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, digits: Digits, batches: int = 8) -> float:
    """Returns the percentage of 256 canvases per batch that are told right."""
    torch.manual_seed(12345)
    right = []
    for _ in range(batches):
        x, label = scatter(digits, 256)
        right.append((model(x).argmax(-1) == label).float().mean())
    return 100 * torch.stack(right).mean().item()
