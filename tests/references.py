"""Slow, obvious implementations in loops and explicit matrices, independent of the package's code."""

import itertools
import math

import torch


def places(shape):
    """Every index of a grid, in order."""
    return list(itertools.product(*(range(n) for n in shape)))


def neighborhood_attention(query, key, value, kernel_size, mask=None, bias=None):
    """NATTEN's definition, one query at a time; bias [heads, *(2 kernel - 1)]."""
    grid, scale = query.shape[1:-2], query.shape[-1] ** -0.5
    valid = torch.ones(key.shape[:-2], dtype=torch.bool) if mask is None else mask
    outs = []
    for place in places(grid):
        window, steps = [], [slice(None)]
        for i, n, k in zip(place, grid, kernel_size, strict=True):
            start = min(max(i - k // 2, 0), max(n - k, 0))
            window.append(slice(start, start + min(k, n)))
            steps.append(slice(start - i + k - 1, start - i + k - 1 + min(k, n)))
        keys, values, seen = (t[(slice(None), *window)].flatten(1, len(grid)) for t in (key, value, valid))
        logits = (query[(slice(None), *place)][:, None] * keys).sum(-1) * scale  # [B, window, heads]
        if bias is not None:
            logits = logits + bias[tuple(steps)].flatten(1).T
        weights = logits.exp() * seen[..., None]
        total = weights.sum(1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
        outs.append((weights[..., None] * values).sum(1))
    return torch.stack(outs, dim=1).unflatten(1, grid)


def assignments(query, key, allowed):
    """A and Ah of the design for one head: query [M, d], key [N, d], allowed [M, N]."""
    logits = query @ key.T
    rows = []
    for m in range(len(query)):
        row = torch.zeros(len(key), dtype=query.dtype)
        seen = allowed[m].nonzero().flatten()
        if len(seen):
            row = row.index_put((seen,), logits[m, seen].softmax(0))
        rows.append(row)
    a = torch.stack(rows)
    return a, a / (a.sum(0, keepdim=True) + 1e-100)


def grouping_attention(query, key, value, allowed):
    """query [B, heads, M, d], key and value [B, heads, N, d], allowed [B, M, N]."""
    samples = []
    for b in range(query.shape[0]):
        heads = []
        for h in range(query.shape[1]):
            _, ah = assignments(query[b, h], key[b, h], allowed[b])
            seen = allowed[b].any(0)
            heads.append(ah[:, seen] @ value[b, h][seen])
        samples.append(torch.stack(heads))
    return torch.stack(samples)


def windows(coarse, fine, stride, window):
    """Which token lies in which group's window of cells, [M, N]."""
    rows = [
        [all(abs(m - n // s) <= w // 2 for m, n, s, w in zip(g, t, stride, window, strict=True)) for t in places(fine)]
        for g in places(coarse)
    ]
    return torch.tensor(rows)


def rotate(x, offset, freqs):
    """RoSE by its formula: x [heads, d] of one token at offset [axes], freqs [rotary heads, planes, axes]."""
    out = x.clone()
    for h, p in itertools.product(range(freqs.shape[0]), range(freqs.shape[1])):
        theta = (offset.double() * freqs[h, p].detach().double()).sum().item()
        a, b = x[h, 2 * p], x[h, 2 * p + 1]
        out[h, 2 * p] = a * math.cos(theta) - b * math.sin(theta)
        out[h, 2 * p + 1] = a * math.sin(theta) + b * math.cos(theta)
    return out
