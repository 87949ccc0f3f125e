"""MetaTensors into networks that take the spacing, and out of them; files that keep their unit."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ..data.volumes import metatensor_spacing
from ..evaluation import sliding_window
from ..optional import import_optional

if TYPE_CHECKING:
    from monai.data import MetaTensor

_Inferer: Any = import_optional("monai.inferers", "monai").Inferer
_Writer: Any = import_optional("monai.data", "monai").NibabelWriter


class SpacingInferer(_Inferer):
    """Calls networks with the spacing that the affine matrices of images say.

    Pixel sizes are those along the array's own axes, however these are turned or flipped in the world. What a network
    makes of an image's own pixels comes out as a ``MetaTensor`` with the image's metadata, also in lists and dicts.

    Args:
        unit: Of the network's reference spacing.
        assumed_unit: Of images whose metadata do not say theirs; None makes that an error.
        roi_size: Pixels of a window, one number or one per axis of the image; None runs the network on whole images.
        reverse_axes: Whether the network was made for arrays (z, y, x): MONAI has the axes of NIfTI files as (x, y, z).
            Images are handed over in reverse, and maps come back in the image's own order.
        **options: Of `rat_timm.evaluation.sliding_window`, with windows.
    """

    def __init__(
        self,
        unit: str = "mm",
        assumed_unit: str | None = None,
        roi_size: Sequence[int] | int | None = None,
        reverse_axes: bool = False,
        **options: Any,
    ) -> None:
        if options and roi_size is None:
            raise ValueError(f"roi_size must be given with options of windows, got None and {sorted(options)}")
        super().__init__()
        self.unit, self.assumed_unit, self.roi_size = unit, assumed_unit, roi_size
        self.reverse_axes, self.options = reverse_axes, options

    def __call__(self, inputs: "MetaTensor", network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a network.

        Args:
            inputs: ``[B, C, *grid]``.
            network: Is called with images, ``spacing`` ``[B, axes]``, and the further arguments.
            *args: Of the network.
            **kwargs: Of the network.

        Raises:
            ValueError: If images have no affine matrix, or no unit is known.
        """
        spacing = self.spacing(inputs)
        image = self._turned(inputs.as_tensor())
        spacing = (spacing.flip(-1) if self.reverse_axes else spacing).to(image.device)
        if self.roi_size is None:
            out = network(image, *args, spacing=spacing, **kwargs)
        else:
            roi = self.roi_size if isinstance(self.roi_size, int) or not self.reverse_axes else self.roi_size[::-1]
            out = sliding_window(
                lambda windows, **told: network(windows, *args, **told, **kwargs),
                image,
                roi,
                spacing=spacing,
                **self.options,
            )
        return self._brought_back(out, inputs)

    def spacing(self, inputs: "MetaTensor") -> Tensor:
        """Returns the spacing ``[B, axes]`` of images ``[B, C, *grid]``, in the order of their own axes."""
        affine = getattr(inputs, "affine", None)
        if affine is not None and affine.ndim == 2:  # of one image to which an axis was added, or of all
            row = metatensor_spacing(cast(Any, inputs[0]), self.unit, self.assumed_unit)
            return torch.as_tensor(row).expand(len(inputs), -1)
        return torch.as_tensor(metatensor_spacing(inputs, self.unit, self.assumed_unit))

    def _brought_back(self, out: Any, inputs: "MetaTensor") -> Any:
        """Returns an output in the image's own order of axes; maps of its pixels as ``MetaTensor``."""
        if isinstance(out, Mapping):
            return {name: self._brought_back(part, inputs) for name, part in out.items()}
        if isinstance(out, (list, tuple)):
            return [self._brought_back(part, inputs) for part in out]
        if not isinstance(out, Tensor) or out.ndim != inputs.ndim:
            return out
        out = self._turned(out)
        if out.shape[2:] != inputs.shape[2:]:
            return out
        return import_optional("monai.utils", "monai").convert_to_dst_type(out, inputs, out.dtype)[0]

    def _turned(self, x: Tensor) -> Tensor:
        """Brings ``[B, C, *grid]`` from the image's order to the network's, and back."""
        return x.permute(0, 1, *range(x.ndim - 1, 1, -1)) if self.reverse_axes else x


class UnitWriter(_Writer):
    """MONAI's writer of NIfTI files, which also writes the unit that the image's own file stated."""

    def set_metadata(self, meta_dict: dict[str, Any] | None, resample: bool = True, **options: Any) -> None:
        """See MONAI."""
        code = (meta_dict or {}).get("xyzt_units")
        self.unit = 0 if code is None else int(code) & 7
        super().set_metadata(meta_dict, resample=resample, **options)

    def write(self, filename: str | PathLike, verbose: bool = False, **kwargs: Any) -> None:
        """See MONAI."""
        header = import_optional("nibabel", "monai").Nifti1Header()
        header["xyzt_units"] = self.unit
        header.set_data_dtype(
            import_optional("monai.utils", "monai").get_equivalent_dtype(self.output_dtype, np.ndarray)
        )
        super().write(filename, verbose=verbose, **{"header": header, **kwargs})
