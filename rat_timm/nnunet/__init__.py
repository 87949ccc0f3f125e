r"""nnU-Net v2 with a resolution-aware network; planning, data, augmentation, losses and prediction stay nnU-Net's.

    pip install nnunetv2
    pip install rat-timm  # afterwards: it brings timm up to date, of which nnunetv2 asks for an older one
    export nnUNet_extTrainer=$(python -c "import rat_timm; print(rat_timm.__path__[0])")/nnunet/trainers
    nnUNetv2_plan_and_preprocess -d 1 -pl nnUNetPlannerResEncM --verify_dataset_integrity
    nnUNetv2_train 1 3d_fullres 0 -p nnUNetResEncUNetMPlans -tr nnUNetTrainerRat
    nnUNetv2_predict -d 1 -c 3d_fullres -f 0 -p nnUNetResEncUNetMPlans -tr nnUNetTrainerRat -i IMAGES -o PREDICTIONS

``nnUNetTrainerRat`` trains a `rat_timm.dense.Segmenter` on ``rat_tiny`` or ``rat_tiny_3d``, ``nnUNetTrainerRatSmall``
and ``nnUNetTrainerRatBase`` on larger ones. The reference spacing is the plan's. nnU-Net resamples all cases to it, so
that the spacing of a batch is the plan's too; where a plan leaves cases as they are
(``nnUNetPlannerResEncL_noResampling``), each sample of a batch is told its own, and ``nnUNetv2_predict`` must be
replaced by `RatPredictor`, since nnU-Net's own hands pixels alone to networks.

On crops of 160 x 160 pixels of the HeLa nuclei of `examples/cells` (19 for training), 60 steps of two patches gave a
Dice of 0.953 on 16 crops of other frames with ``nnUNetTrainerRat`` (28.4 M parameters, 1.1 s of a core per step), and
0.870 with nnU-Net's own ResEnc-M under its own settings (71.8 M, 2.5 s); one seed. So few steps tell that both work and
how RAT begins, not which is better in the end: nnU-Net's schedule has 250 000.

(nnU-Net's dependency dynamic-network-architectures asks for ``timm<1.0.23``, and this package for a newer one, so that
there is no extra for both. In two commands pip warns and installs them; with nnunetv2 2.8.1 and timm 1.0.31 they work.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..dense.segmenter import Segmenter
from ..geometry.read import geometry, what_is_told

NATIVE = "no_resampling_hack"  # nnU-Net's name of the function that leaves cases as they are


class RatNetwork(nn.Module):
    """A segmenter that is called with pixels alone.

    Args:
        segmenter: The network.
        spacing: Of images that are told no other by `rat_timm.geometry`, in array-axis order.

    Attributes:
        spacing: May be set before a case is predicted.
    """

    def __init__(self, segmenter: Segmenter, spacing: Sequence[float]) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.spacing = tuple(spacing)

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits ``[B, classes, *size]`` of patches ``[B, C, *size]``."""
        told = what_is_told(x).spacing
        return self.segmenter(x, spacing=self.spacing if told is None else told)


def is_native(configuration: ConfigurationManager) -> bool:
    """Tells whether a plan leaves cases at their own pixel size."""
    return configuration.configuration.get("resampling_fn_data") == NATIVE


def spacing_of(properties: dict[str, Any], plans: PlansManager, axes: int) -> tuple[float, ...]:
    """Returns a case's own spacing, in the order of the axes that the network is given."""
    spacing = [float(properties["spacing"][axis]) for axis in plans.transpose_forward]
    return tuple(spacing[-axes:])


class nnUNetTrainerRat(nnUNetTrainer):  # noqa: N801  (nnU-Net finds trainers by such names)
    """nnU-Net's trainer with a `Segmenter`, AdamW and no deep supervision.

    Attributes:
        variants: Names of backbones, by the number of axes.
        options: Further keywords of `Segmenter`.
        schedule: Attributes of nnU-Net's trainer that say how long training is; it has its own for the others.
    """

    variants: ClassVar[dict[int, str]] = {2: "rat_tiny", 3: "rat_tiny_3d"}
    options: ClassVar[dict[str, Any]] = {}
    schedule: ClassVar[dict[str, int]] = {}
    dataset_class: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net reads this signature)
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr, self.weight_decay = 5e-4, 0.05
        for name, value in self.schedule.items():
            setattr(self, name, value)
        self._own_spacing: dict[str, tuple[float, ...]] = {}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> RatNetwork:
        """See nnU-Net."""
        spacing = tuple(float(step) for step in configuration_manager.spacing)
        axes = len(configuration_manager.patch_size)
        segmenter = Segmenter(
            cls.variants[axes],
            num_output_channels,
            in_chans=num_input_channels,
            **{"spacing": spacing[-axes:], **cls.options},
        )
        return RatNetwork(segmenter, spacing[-axes:])

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """See nnU-Net."""
        optimizer = create_optimizer_v2(self.network, "adamw", lr=self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Does nothing: there is one output."""

    def train_step(self, batch: dict) -> dict:
        """See nnU-Net."""
        with self._told(batch["keys"]):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """See nnU-Net."""
        with self._told(batch["keys"]):
            return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """See nnU-Net."""
        own = self.dataset_class
        if is_native(self.configuration_manager):
            self.dataset_class = lambda *args, **kwargs: _Telling(own(*args, **kwargs), self._tell)
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self.dataset_class = own

    def _do_i_compile(self) -> bool:
        return not is_native(self.configuration_manager) and super()._do_i_compile()

    def _told(self, keys: Iterable[str]) -> AbstractContextManager:
        """Tells the network the samples' own spacing, where a plan leaves cases as they are."""
        if not is_native(self.configuration_manager):
            return nullcontext()
        rows = [self._spacing(str(key)) for key in keys]
        return geometry(spacing=torch.tensor(rows, dtype=torch.float32, device=self.device))

    def _spacing(self, key: str) -> tuple[float, ...]:
        if key not in self._own_spacing:
            properties = self.dataset_class(self.preprocessed_dataset_folder, [key]).load_case(key)[-1]
            axes = len(self.configuration_manager.patch_size)
            self._own_spacing[key] = spacing_of(properties, self.plans_manager, axes)
        return self._own_spacing[key]

    def _tell(self, properties: dict[str, Any]) -> None:
        network = self.network.module if self.is_ddp else self.network
        network.spacing = spacing_of(properties, self.plans_manager, len(self.configuration_manager.patch_size))


class _Telling:
    """A data set of nnU-Net that tells the network the spacing of each case that is loaded."""

    def __init__(self, data: Any, tell: Callable[[dict[str, Any]], None]) -> None:
        self.data, self.tell, self.identifiers = data, tell, data.identifiers

    def load_case(self, key: str) -> tuple:
        case = self.data.load_case(key)
        self.tell(case[-1])
        return case


class nnUNetTrainerRatSmall(nnUNetTrainerRat):  # noqa: N801
    """With ``rat_small`` and ``rat_small_3d``."""

    variants: ClassVar[dict[int, str]] = {2: "rat_small", 3: "rat_small_3d"}


class nnUNetTrainerRatBase(nnUNetTrainerRat):  # noqa: N801
    """With ``rat_base`` and ``rat_base_3d``."""

    variants: ClassVar[dict[int, str]] = {2: "rat_base", 3: "rat_base_3d"}


class nnUNetTrainerRatTry(nnUNetTrainerRat):  # noqa: N801
    """Ten steps, to see in minutes whether data, plan and network go together; what it learns is of no use."""

    schedule: ClassVar[dict[str, int]] = {
        "num_epochs": 1,
        "num_iterations_per_epoch": 10,
        "num_val_iterations_per_epoch": 1,
    }


class RatPredictor(nnUNetPredictor):
    """nnU-Net's predictor for plans that leave cases as they are: each is told its own spacing.

    predictor = RatPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(FOLDER, use_folds=(0,))
    predictor.predict_from_files(IMAGES, PREDICTIONS)
    """

    def predict_from_data_iterator(self, data_iterator: Iterable[dict], *args: Any, **kwargs: Any) -> list:
        """See nnU-Net."""
        return super().predict_from_data_iterator(self._telling(data_iterator), *args, **kwargs)

    def _telling(self, cases: Iterable[dict]) -> Iterator[dict]:
        axes = len(self.configuration_manager.patch_size)
        for case in cases:
            if is_native(self.configuration_manager):
                self.network.spacing = spacing_of(case["data_properties"], self.plans_manager, axes)
            yield case
