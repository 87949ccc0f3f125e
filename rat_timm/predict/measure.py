"""What a prediction costs and how far it may be from the whole image's: measured on a few windows beforehand."""

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry.box import Box
from .network import Network
from .plan import MOST_PIXELS, Plan, Window
from .work import Work, finished

_SAMPLES = 8
_USUAL = 0.999
_FACTOR = 2.0
"""How many times what was measured is said: the samples are few, and the whole is larger than what they were given."""


class Difference(NamedTuple):
    """How far values are from those with more context.

    Attributes:
        usual: What 999 of 1000 values are expected to stay below: twice that quantile of what was measured.
        most: The largest that was measured; of the few values above ``usual``, some may be larger in the whole.
        mean: The mean of what was measured.
        changed: The share of places whose likeliest class changes, measured.
        windows: How many windows were compared.
    """

    usual: float
    most: float
    mean: float
    changed: float
    windows: int


def difference(work: Work, windows: int = _SAMPLES) -> Difference | None:
    """Compares windows with themselves, seen with longer halos (`compared_with`).

    Values are probabilities, of objects the foreground's and the distance's tanh, and features over their largest.

    Args:
        work: The work, whose plan is not exact.
        windows: How many, spread over the region; windows without data do not count.

    Returns:
        None if there is no window with data.
    """
    plan = work.job.plan
    usual, most, means, changes = [], [], [], []
    for window in _spread(plan, work, windows):
        seen = compared_with(plan, window, work.network)
        one, other = (_alone(work, window, box) for box in (window.seen, seen))
        if one is None or other is None:
            continue
        gap = (one - other).abs()
        most.append(float(gap.max()))
        usual.append(float(np.quantile(gap.numpy(), _USUAL)))
        means.append(float(gap.mean()))
        changes.append(float((one.argmax(-1) != other.argmax(-1)).float().mean()))
    if not most:
        return None
    return Difference(_FACTOR * max(usual), max(most), float(np.mean(means)), float(np.mean(changes)), len(most))


def compared_with(plan: Plan, window: Window, network: Network) -> Box:
    """Returns the pixels that a window is compared with: its halo longer by its own part, or by what fits in memory."""
    step = (plan.out.spacing / plan.working.spacing)[0].tolist()
    for eighths in range(8, 0, -1):
        more = [math.ceil(eighths * e * s / 8) for e, s in zip(plan.edge, step, strict=True)]
        seen = plan.seen(window.box, network, [h + m for h, m in zip(plan.halo, more, strict=True)])
        if seen.size <= MOST_PIXELS:
            break
    return seen


def _spread(plan: Plan, work: Work, count: int) -> Iterator[Window]:
    """Yields windows with data, from tiles all over the region."""
    found, seen = 0, set()
    tiles = _evenly(plan.count, 4 * count)
    for tile in tiles:
        windows = list(plan.windows(plan.box(tile), work.network))
        for index in _evenly(len(windows), math.ceil(count / len(tiles)) + 1):
            window = windows[index]
            if window.box in seen or found >= count:
                continue
            seen.add(window.box)
            if work.see(window).levels:
                found += 1
                yield window


def _evenly(count: int, most: int) -> list[int]:
    """Returns numbers below ``count``, at most so many."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _alone(work: Work, window: Window, seen: Box) -> Tensor | None:
    """Returns a window's values without those of others, ``[*box, channels]``."""
    plain = Window(window.box, seen, (0,) * len(seen.start), (0,) * len(seen.start))
    sight = work.see(plain, seen)
    if not sight.levels:
        return None
    values, predicted = work.values(window.box, [sight])
    options = work.job.options
    if options.task == "features":
        return values / values.abs().max().clamp(min=1e-12)
    if options.task == "instances":
        return torch.stack([values[..., 0].sigmoid(), values[..., 1].tanh()], dim=-1)
    return finished("probabilities", values, predicted)


def window_memory(work: Work) -> int | None:
    """Returns the bytes that this process, or the GPU, had at most after a batch of windows as large as any.

    None where the system does not tell.
    """
    plan, network = work.job.plan, work.network
    middle = [n // 2 for n in plan.lattice]
    window = next(iter(_at(plan, work, middle)))
    device = torch.device(work.job.options.device or "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    x = torch.zeros(work.job.options.batch_size, network.in_chans, *window.seen.shape)
    from ..geometry.box import part_of

    grid = part_of(plan.working, window.seen)
    with torch.inference_mode():
        dtype = getattr(torch, work.job.options.dtype)
        network([x.to(device, dtype)], [[grid] * len(x)], [None])
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory()


def _at(plan: Plan, work: Work, place: list[int]) -> Iterator[Window]:
    start = [min(n - 1, max(0, at * e)) for at, e, n in zip(place, plan.edge, plan.region.shape, strict=True)]
    yield from plan.windows(Box(tuple(start), tuple(a + 1 for a in start)), work.network)


def peak_memory() -> int | None:
    """Returns the most bytes that this process has had in memory; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def tile_memory(work: Work) -> int:
    """Returns the bytes of a tile's sums and of what is read ahead."""
    plan = work.job.plan
    known = math.prod(t + 2 * m for t, m in zip(plan.tile, plan.margin, strict=True))
    window = next(_at(plan, work, [n // 2 for n in plan.lattice]))
    seen = work.job.image.source(window.seen).size + window.seen.size
    ahead = (2 * work.job.options.batch_size + 1) * seen * work.network.in_chans
    return 4 * (2 * known * (work.network.channels + 1) + ahead)
