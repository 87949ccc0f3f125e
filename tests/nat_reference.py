"""NAT (arXiv 2204.07143) written down from the paper, in loops over windows, under its published names."""

import math

import torch
from torch.nn import functional as F

import references

# width, depths, heads, MLP ratio, whether there is a layer scale
ARCHITECTURES = {
    "mini": (64, (3, 4, 6, 5), (2, 4, 8, 16), 3, False),
    "tiny": (64, (3, 4, 18, 5), (2, 4, 8, 16), 3, False),
    "small": (96, (3, 4, 18, 5), (3, 6, 12, 24), 2, True),
    "base": (128, (3, 4, 18, 5), (4, 8, 16, 32), 2, True),
}
KERNEL = 7


def shapes(width, depths, heads, ratio, scaled, classes=1000):
    """Names and shapes of the published parameters."""
    found = {}

    def add(name, *shape, bias=True):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    add("patch_embed.proj.0", width // 2, 3, 3, 3)
    add("patch_embed.proj.1", width, width // 2, 3, 3)
    add("patch_embed.norm", width)
    for level, (depth, count) in enumerate(zip(depths, heads, strict=True)):
        dim = width * 2**level
        for block in range(depth):
            prefix = f"levels.{level}.blocks.{block}"
            add(f"{prefix}.norm1", dim)
            found[f"{prefix}.attn.rpb"] = (count, 2 * KERNEL - 1, 2 * KERNEL - 1)
            add(f"{prefix}.attn.qkv", 3 * dim, dim)
            add(f"{prefix}.attn.proj", dim, dim)
            add(f"{prefix}.norm2", dim)
            add(f"{prefix}.mlp.fc1", ratio * dim, dim)
            add(f"{prefix}.mlp.fc2", dim, ratio * dim)
            if scaled:
                found[f"{prefix}.gamma1"] = found[f"{prefix}.gamma2"] = (dim,)
        if level < len(depths) - 1:
            add(f"levels.{level}.downsample.reduction", 2 * dim, dim, 3, 3, bias=False)
            add(f"levels.{level}.downsample.norm", 2 * dim)
    add("norm", width * 2 ** (len(depths) - 1))
    add("head", classes, width * 2 ** (len(depths) - 1))
    return found


def random_weights(*architecture, **kwargs):
    """Weights with which attention is far from uniform and every parameter shows."""
    weights = {}
    for name, shape in shapes(*architecture, **kwargs).items():
        x = torch.randn(shape, dtype=torch.float64)
        if len(shape) in (2, 4):
            x = x / math.sqrt(math.prod(shape[1:]))
        if ("norm" in name and name.endswith("weight")) or "gamma" in name:
            x = 0.5 + 0.1 * x
        weights[name] = x
    return weights


def nat(weights, x, heads):
    """Returns the logits, and the map of each level before it is made coarser, ``[B, C, H, W]``."""

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def conv(name, x):
        bias = weights.get(f"{name}.bias")
        return F.conv2d(x.movedim(-1, 1), weights[f"{name}.weight"], bias, stride=2, padding=1).movedim(1, -1)

    def attention(name, x, count):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, max(0, KERNEL - width), 0, max(0, KERNEL - height)))
        dim = x.shape[-1]
        qkv = linear(f"{name}.qkv", x)
        query, key, value = (
            torch.stack([part[..., i * dim // count : (i + 1) * dim // count] for i in range(count)], dim=-2)
            for part in (qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :])
        )
        out = references.neighborhood_attention(query, key, value, (KERNEL, KERNEL), None, weights[f"{name}.rpb"])
        return linear(f"{name}.proj", out.flatten(-2)[:, :height, :width])

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    x = norm("patch_embed.norm", conv("patch_embed.proj.1", conv("patch_embed.proj.0", x.movedim(1, -1))))
    maps = []
    for level, count in enumerate(heads):
        block = 0
        while f"{(prefix := f'levels.{level}.blocks.{block}')}.attn.rpb" in weights:
            scales = [weights.get(f"{prefix}.gamma{i}", 1.0) for i in (1, 2)]
            x = x + scales[0] * attention(f"{prefix}.attn", norm(f"{prefix}.norm1", x), count)
            hidden = gelu(linear(f"{prefix}.mlp.fc1", norm(f"{prefix}.norm2", x)))
            x = x + scales[1] * linear(f"{prefix}.mlp.fc2", hidden)
            block += 1
        maps.append(x.movedim(-1, 1))
        if level < len(heads) - 1:
            name = f"levels.{level}.downsample"
            x = norm(f"{name}.norm", conv(f"{name}.reduction", x))
    return linear("head", norm("norm", x).mean((1, 2))), maps
