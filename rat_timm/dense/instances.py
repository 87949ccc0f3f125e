"""Instances from two maps: foreground, and the distance to the boundary of objects, in physical units.

A network for instances has two channels, ``[B, 2, *size]``: the logit of the foreground, and r, where ``scale * r`` is
the distance of a pixel's centre to the boundary of its object. What is compared in training is tanh(r), which
saturates: how far the middle of a large object is from its boundary need not be known. ``scale`` is a length: about the
distance that the middle of a typical object has.

```python
import torch

from rat_timm.dense.instances import instance_loss, instance_targets, instances

labels = torch.zeros(1, 32, 32, dtype=torch.int64)
labels[:, 4:16, 4:16], labels[:, 16:28, 4:16] = 1, 2  # two objects that touch
targets = instance_targets(labels, spacing=0.5, scale=2.0)  # [1, 2, 32, 32]
logits = torch.stack([20 * targets[:, 0] - 10, targets[:, 1].atanh()], dim=1)  # of a network that is right
assert float(instance_loss(logits, targets)) < 1e-3
assert instances(logits, spacing=0.5, scale=2.0).max() == 2
```

All is the same in 2D and 3D, and lengths are physical: with pixels and lengths twice as large, numbers are what they
were.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry.grid import Scalars, per_axis
from ..ops.masking import check_mask
from ..optional import import_optional

Combine: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What makes of two arrays one of their shape."""


def instance_targets(labels: Tensor, spacing: Scalars, scale: float, mask: Tensor | None = None) -> Tensor:
    """Returns what a network for instances learns of an image: the foreground, and tanh(distance / ``scale``).

    The distance is that of a pixel's centre to the nearest face between pixels of different labels. Labels that are
    given with smaller pixels (each label repeated) have the same distances at the same places. Where the image ends,
    and where pixels are masked, an object is cut: its boundary is not there, and distances are those to the boundary
    inside.

    Args:
        labels: ``[B, *size]``, whole numbers, 0 = background. Negative: not annotated, such as a margin in which
            objects have no labels. Objects that have some end there.
        spacing: Physical pixel size in array-axis order (z, y, x): a number, one per axis, or ``[B, axes]``.
        scale: A length, in the unit of the spacing.
        mask: ``[B, *size]``, bool, True = valid: whose labels are right. Labels elsewhere are not looked at.

    Returns:
        ``[B, 2, *size]``, float32: 1 in the foreground, 0 in the background, -1 where not annotated; and a number
        between 0 and 1 in the foreground, else 0. Both are 0 where masked.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If the package edt is not installed; with the extra that installs it.
    """
    if labels.ndim not in (3, 4) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be whole numbers [B, *size], got {labels.dtype} {list(labels.shape)}")
    _check_length(scale, "scale")
    check_mask(mask, labels.shape)
    labels = labels.long()  # there is little that PyTorch does with uint16
    rows = per_axis(spacing, "spacing", labels.ndim - 1, len(labels), positive=True).expand(len(labels), -1).tolist()
    valid = labels.new_ones(labels.shape, dtype=torch.bool) if mask is None else mask
    arrays = zip(labels.clamp(min=0).cpu().numpy(), rows, valid.cpu().numpy(), strict=True)
    distance = torch.stack([torch.from_numpy(_distance(*each)) for each in arrays]).to(labels.device)
    foreground = torch.where(valid, labels.sign(), 0).float()
    return torch.stack([foreground, torch.tanh(distance / scale) * (foreground > 0)], dim=1)


def _distance(labels: np.ndarray, spacing: Sequence[float], valid: np.ndarray) -> np.ndarray:
    """Returns the distances of pixels' centres to the nearest face between labels; infinite without any.

    It is that on a lattice with a place for each pixel's centre and for each face, edge and corner between pixels: the
    place of a box that is nearest to a pixel's centre is always one of them.
    """
    edt = import_optional("edt", "dense").edt
    unique, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(valid.shape).astype(np.int32)
    low, high = np.where(valid, labels, len(unique)), np.where(valid, labels, -1)
    for axis in range(valid.ndim):
        low, high = _with_faces(low, axis, np.minimum), _with_faces(high, axis, np.maximum)
    inside = np.ascontiguousarray(low >= high)  # all valid pixels at this place have one label
    distance = edt(inside, anisotropy=tuple(step / 2 for step in spacing), black_border=False)
    return np.ascontiguousarray(distance[(slice(None, None, 2),) * valid.ndim])


def _with_faces(values: np.ndarray, axis: int, combine: Combine) -> np.ndarray:
    """Puts between neighbours along an axis what ``combine`` makes of both: n values become 2 n - 1."""
    values = np.moveaxis(values, axis, 0)
    out = np.empty((2 * len(values) - 1, *values.shape[1:]), values.dtype)
    out[::2], out[1::2] = values, combine(values[:-1], values[1:])
    return np.moveaxis(out, 0, axis)


def instance_loss(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the loss of a network for instances, over the pixels that are valid and annotated.

    It is the binary cross entropy and the Dice loss (MONAI's, of the batch as a whole) of the foreground, and the
    smooth L1 loss of the distance, tanh(r) against the target's, whose mean over the foreground and over the background
    count alike: distances that are large outside an object would be seeds of objects where the foreground is too large.

    Args:
        logits: ``[B, 2, *size]``.
        targets: ``[B, 2, *size]``, from `instance_targets`.
        mask: ``[B, *size]``, bool, True = valid. Logits elsewhere change nothing, infinite ones and NaN included.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If MONAI is not installed; with the extra that installs it.
    """
    _check_maps(logits, "logits")
    if targets.shape != logits.shape:
        raise ValueError(f"targets must have the shape of logits, {list(logits.shape)}, got {list(targets.shape)}")
    check_mask(mask, (len(logits), *logits.shape[2:]))
    dice = import_optional("monai.losses", "dense").DiceLoss(sigmoid=True, batch=True)
    annotated = targets[:, 0] >= 0
    chosen = annotated if mask is None else annotated & mask
    logits, targets = (maps.movedim(1, -1)[chosen] for maps in (logits, targets))  # [chosen, 2]
    if not len(logits):
        return logits.sum()  # 0, with a gradient
    logits, targets = logits.float(), targets.float()
    foreground, distance = targets.unbind(-1)
    inside = foreground > 0.5
    error = F.smooth_l1_loss(logits[:, 1].tanh(), distance, beta=0.1, reduction="none")
    error = (_mean(error, inside) + _mean(error, ~inside)) / 2
    entropy = F.binary_cross_entropy_with_logits(logits[:, 0], foreground)
    return entropy + dice(logits[None, None, :, 0], foreground[None, None]) + error


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def instances(
    logits: Tensor,
    spacing: Scalars,
    *,
    scale: float,
    threshold: float = 0.5,
    depth: float | None = None,
    smoothing: float | None = None,
    min_distance: float = 0.0,
    min_size: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the objects that a network for instances sees, on the grid of its logits.

    The foreground is cut by a watershed (scikit-image) from the maxima of the distance, after a Gaussian. Two maxima
    are one if the distance falls by less than ``depth`` on the best way between them, as along a rod, or if they are
    nearer than ``min_distance``. Each part of the foreground has at least one.

    Args:
        logits: ``[B, 2, *size]``, see the module.
        spacing: Physical pixel size in array-axis order (z, y, x): a number, one per axis, or ``[B, axes]``.
        scale: The length of the targets.
        threshold: The probability of the foreground is above it.
        depth: A length, of distances that saturate at ``scale``: scale * tanh(r). Default: a fifth of ``scale``.
        smoothing: Standard deviation of the Gaussian, a length. 0: none. Default: a tenth of ``scale``.
        min_distance: A length.
        min_size: Least area or volume of an object, in the unit of the spacing squared or cubed.
        mask: ``[B, *size]``, bool, True = valid. There are no objects elsewhere.

    Returns:
        ``[B, *size]``, int32: 0 = background, objects numbered from 1 in each sample.

    Raises:
        ValueError: If an argument does not fit.
        ImportError: If scikit-image is not installed; with the extra that installs it.
    """
    _check_maps(logits, "logits")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    depth, smoothing = (scale / n if value is None else value for value, n in ((depth, 5), (smoothing, 10)))
    _check_length(scale, "scale")
    _check_length(depth, "depth")
    for value, name in ((smoothing, "smoothing"), (min_distance, "min_distance"), (min_size, "min_size")):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must not be negative, and finite, got {value}")
    check_mask(mask, (len(logits), *logits.shape[2:]))
    rows = per_axis(spacing, "spacing", logits.ndim - 2, len(logits), positive=True).expand(len(logits), -1).tolist()
    maps = logits.detach().cpu().double()
    foreground = maps[:, 0].sigmoid() > threshold  # zeros, which stand for masked places, are outside
    foreground = foreground if mask is None else foreground & mask.cpu()
    distance = torch.where(foreground, scale * maps[:, 1].clamp(min=0).tanh(), 0.0)
    found = []
    for inside, map_, row in zip(foreground.numpy(), distance.numpy(), rows, strict=True):
        smooth = _smoothed(map_, inside, [smoothing / step for step in row])
        labels = _cut(smooth, inside, row, depth, min_distance)
        found.append(torch.from_numpy(_without_small(labels, min_size / math.prod(row))))
    return (torch.stack(found) if found else foreground.int()).to(logits.device)


def _smoothed(distance: np.ndarray, inside: np.ndarray, deviation: Sequence[float]) -> np.ndarray:
    """Returns the distance after a Gaussian over the foreground: what lies outside has no weight."""
    if not max(deviation):
        return distance
    gaussian = import_optional("scipy.ndimage", "dense").gaussian_filter
    weight = gaussian(inside.astype(np.float64), deviation, mode="constant")
    return np.where(inside, gaussian(distance, deviation, mode="constant") / np.where(inside, weight, 1.0), 0.0)


def _cut(
    distance: np.ndarray, inside: np.ndarray, spacing: Sequence[float], depth: float, min_distance: float
) -> np.ndarray:
    """Returns the watershed's basins of the distance's maxima."""
    if not inside.any():
        return np.zeros(inside.shape, np.int32)
    morphology = import_optional("skimage.morphology", "dense")
    watershed = import_optional("skimage.segmentation", "dense").watershed
    # what lies outside is far below the foreground, so that its every part has a maximum
    above = np.pad(np.where(inside, distance, -2 * depth), 1, constant_values=-2 * depth)
    everywhere = np.ones((3,) * inside.ndim)
    filled = morphology.reconstruction(above - depth, above, footprint=everywhere)
    maxima = morphology.local_maxima(filled)[(slice(1, -1),) * inside.ndim]
    seeds = import_optional("skimage.measure", "dense").label(maxima)
    if min_distance:
        seeds = _joined(seeds, distance, inside, spacing, min_distance)
    return watershed(-distance, seeds, connectivity=everywhere, mask=inside).astype(np.int32)


def _joined(
    seeds: np.ndarray, distance: np.ndarray, inside: np.ndarray, spacing: Sequence[float], min_distance: float
) -> np.ndarray:
    """Gives one number to seeds in one part of the foreground whose highest pixels are nearer than ``min_distance``."""
    ndimage, sparse = import_optional("scipy.ndimage", "dense"), import_optional("scipy.sparse", "dense")
    tree = import_optional("scipy.spatial", "dense").cKDTree
    tops = np.array(ndimage.maximum_position(distance, seeds, range(1, int(seeds.max()) + 1)))  # [seeds, axes]
    part = import_optional("skimage.measure", "dense").label(inside)[tuple(tops.T)]
    places = tree(tops * np.asarray(spacing) / min_distance)
    a, b = places.query_pairs(np.nextafter(1.0, 0.0), output_type="ndarray").T
    a, b = a[part[a] == part[b]], b[part[a] == part[b]]
    graph = sparse.coo_array((np.ones(len(a)), (a, b)), (len(tops),) * 2)
    _, number = sparse.csgraph.connected_components(graph, directed=False)
    return np.append(0, number + 1)[seeds]


def _without_small(labels: np.ndarray, least: float) -> np.ndarray:
    """Removes objects of fewer pixels than ``least``; numbers the others from 1."""
    keep = np.bincount(labels.ravel()) >= least
    keep[0] = False
    return np.where(keep, keep.cumsum(), 0).astype(np.int32)[labels]


def _check_maps(maps: Tensor, name: str) -> None:
    if maps.ndim not in (4, 5) or maps.shape[1] != 2 or not maps.is_floating_point():
        raise ValueError(f"{name} must be floating-point maps [B, 2, *size], got {maps.dtype} {list(maps.shape)}")


def _check_length(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive length, got {value}")
