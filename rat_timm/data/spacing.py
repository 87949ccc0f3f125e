"""Pixel size as something that torchvision's transforms (v2) transform, as they do images and masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

_EVEN = 1e-3  # by how much an angle's cosine may differ from a right angle's, and a scale along it from another


class Spacing(tv_tensors.TVTensor):
    """Physical size of an image's pixels, (y, x), that follows the image through ``torchvision.transforms.v2``.

        transform = v2.RandomResizedCrop(224)
        image, spacing = transform(image, Spacing((0.5, 0.5), canvas_size=image.shape[-2:]))

    Resizing, cropping, padding, flipping, rotation and affine maps change it as they change the pixels. What leaves
    pixels without one size or right angles (shears, elastic and perspective maps, anisotropic pixels turned by other
    than right angles) is an error, and so are crops into five and ten. (AutoAugment, RandAugment and their like
    transform the image alone, whatever comes with it: they do not go with a spacing.)

    Other packages do not know it: albumentations hands on what it does not know as it was, beside an image of another
    pixel size (``A.Compose(..., strict=True)`` refuses to; samples refuse it where the image's size changed). There,
    the image's corners go through the transform as key points, and the spacing follows them:

        spacing = Spacing((0.5, 0.5), canvas_size=image.shape[:2])
        points = A.KeypointParams("xy", remove_invisible=False)
        transform = A.Compose([A.RandomResizedCrop((224, 224))], keypoint_params=points)
        done = transform(image=image, keypoints=spacing.corners())
        spacing = spacing.follow(done["keypoints"], canvas_size=done["image"].shape[:2])

    Args:
        data: Two numbers, in array-axis order (y, x).
        canvas_size: The image's height and width.

    Raises:
        ValueError: If it is not two positive numbers.
    """

    canvas_size: tuple[int, int]

    def __new__(cls, data: Tensor | Sequence[float], *, canvas_size: Sequence[int]) -> "Spacing":
        """Reads the numbers."""
        values = torch.as_tensor(data, dtype=torch.float64)
        if tuple(values.shape) != (2,) or not bool((values > 0).all() & values.isfinite().all()):
            raise ValueError(f"spacing must be two positive numbers (y, x), got {data!r}")
        made = values.as_subclass(cls)
        made.canvas_size = (int(canvas_size[0]), int(canvas_size[1]))
        return made

    @classmethod
    def wrap(cls, tensor: Tensor, like: "Spacing", canvas_size: Sequence[int] | None = None) -> "Spacing":
        """Gives a tensor what another spacing has; torchvision calls it."""
        return cls(tensor, canvas_size=like.canvas_size if canvas_size is None else canvas_size)

    def corners(self) -> list[tuple[int, int]]:
        """Returns three of the image's corners, (x, y) in pixels: the first one, and those along x and along y."""
        height, width = self.canvas_size
        return [(0, 0), (width, 0), (0, height)]

    def follow(self, moved: Tensor | Sequence[Sequence[float]], canvas_size: Sequence[int]) -> "Spacing":
        """Returns the spacing of a transformed image.

        Args:
            moved: Where the transform moved the `corners` to, ``[3, 2]``, (x, y) in pixels.
            canvas_size: The transformed image's height and width.

        Raises:
            ValueError: If its pixels have no right angles.
        """
        points, (height, width) = torch.as_tensor(moved, dtype=torch.float64), self.canvas_size
        # columns: where a step of one pixel along x, along y, of the image before, leads to in the image after
        steps = torch.stack((points[1] - points[0], points[2] - points[0]), dim=1) / torch.tensor([width, height])
        # columns: the physical way, x and y, of one step along x, along y, of the image after
        ways = self.as_subclass(Tensor).flip(0)[:, None] * torch.linalg.inv(steps)
        lengths = torch.linalg.vector_norm(ways, dim=0)
        if abs(float((ways[:, 0] * ways[:, 1]).sum() / lengths.prod())) > _EVEN:
            raise ValueError(f"pixels of {self.tolist()} (y, x) would have no right angles")
        return Spacing(lengths.flip(0), canvas_size=canvas_size)

    def __deepcopy__(self, memo: dict[int, object]) -> "Spacing":
        return Spacing(self.as_subclass(Tensor).clone(), canvas_size=self.canvas_size)

    def __repr__(self, **kwargs: object) -> str:
        return self._make_repr(canvas_size=self.canvas_size)


def _follow(map_: Callable, spacing: Spacing, *args: Any, **kwargs: Any) -> Spacing:
    """Transforms a spacing by what happens to the image's corners."""
    corners = torch.tensor(spacing.corners(), dtype=torch.float64)
    if "padding_mode" in kwargs:  # points know one of them, and no other gives other sizes
        kwargs["padding_mode"] = "constant"
    moved = map_(tv_tensors.KeyPoints(corners, canvas_size=spacing.canvas_size), *args, **kwargs)
    try:
        return spacing.follow(moved.as_subclass(Tensor), moved.canvas_size)
    except ValueError as error:
        raise ValueError(f"{map_.__name__}: {error}") from error


def _refuse(map_: Callable, spacing: Spacing, *args: Any, **kwargs: Any) -> Spacing:
    raise ValueError(f"{map_.__name__}: pixels would have no common size")


_FOLLOWED = (
    "resize",
    "crop",
    "center_crop",
    "resized_crop",
    "pad",
    "horizontal_flip",
    "vertical_flip",
    "rotate",
    "affine",
)
_REFUSED = ("perspective", "elastic", "five_crop", "ten_crop")

for _names, _kernel in ((_FOLLOWED, _follow), (_REFUSED, _refuse)):
    for _name in _names:
        _map = getattr(functional, _name)
        functional.register_kernel(_map, Spacing)(functools.partial(_kernel, _map))
