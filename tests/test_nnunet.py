"""nnU-Net plans, trains, validates and predicts with a resolution-aware network; only where nnunetv2 is installed.

CI does not install it: with it comes an older timm. ``pip install nnunetv2``, then this package, then this file: 90 s.
"""

import copy
import json

import numpy as np
import pytest
import torch

nnunetv2 = pytest.importorskip("nnunetv2")

import nibabel

import rat_timm

SPACINGS = ((2.0, 0.5, 0.5), (2.0, 0.5, 0.5), (1.0, 0.8, 0.8), (2.0, 0.5, 0.6), (3.0, 0.4, 0.5))  # z, y, x
PLANNERS = {"resampled": "nnUNetPlannerResEncM", "native": "nnUNetPlannerResEncL_noResampling"}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A data set of five volumes in nnU-Net's format, planned and preprocessed both ways; plans by their kind."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("nnunet")
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("nnUNet_extTrainer", str(rat_timm.__path__[0] + "/nnunet/trainers"))
        patch.setattr("rat_timm.nnunet.nnUNetTrainerRat.variants", {2: "test_rat", 3: "test_rat_3d"})
        write(root / "raw" / "Dataset001_Balls")
        yield root, {kind: plan(planner, patch) for kind, planner in PLANNERS.items()}


def write(folder):
    chance = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index, spacing in enumerate(SPACINGS):
        size = (16, 40, 36)
        places = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(size, spacing, strict=True)), indexing="ij"))
        middle = (np.array(size) * spacing / 2)[:, None, None, None]
        labels = (np.linalg.norm(places - middle, axis=0) < 5).astype(np.uint8)
        image = (labels + chance.normal(0, 0.2, size)).astype(np.float32)
        for array, file in ((image, f"imagesTr/case_{index}_0000.nii.gz"), (labels, f"labelsTr/case_{index}.nii.gz")):
            nibabel.save(nibabel.Nifti1Image(array.T, np.diag([*spacing[::-1], 1.0])), folder / file)
    described = {"channel_names": {"0": "made"}, "labels": {"background": 0, "ball": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**described, "numTraining": len(SPACINGS)}))


def plan(planner, patch):
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api

    patch.setenv("nnUNet_n_proc_DA", "1")  # its estimate of memory wants threads
    api.extract_fingerprints([1], num_processes=1, check_dataset_integrity=False, clean=False, verbose=False)
    name = api.plan_experiments([1], planner, gpu_memory_target_in_gb=1)
    patch.setenv("nnUNet_n_proc_DA", "0")
    api.preprocess([1], name, ["3d_fullres"], [1], False)
    return name


def trainer(name, kind, planned, short=True):
    from nnunetv2.run.run_training import get_trainer_from_args

    made = get_trainer_from_args("1", "3d_fullres", 0, name, planned[1][kind], False, device=torch.device("cpu"))
    if short:
        made.num_epochs = made.num_val_iterations_per_epoch = 1
        made.num_iterations_per_epoch = 2
    return made


@pytest.mark.parametrize("kind", PLANNERS)
def test_training_validation_and_prediction_know_the_spacing(kind, planned, tmp_path, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from rat_timm.nnunet import RatPredictor

    made = trainer("nnUNetTrainerRat", kind, planned)
    made.initialize()
    assert type(made.network).__name__ == "RatNetwork"
    plan_spacing = [float(step) for step in made.configuration_manager.spacing]
    assert list(made.network.segmenter.reference_spacing) == pytest.approx(plan_spacing)
    told = record_told(monkeypatch)
    before = copy.deepcopy(made.network.state_dict())
    made.run_training()
    changed = [name for name, value in made.network.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) > 0.9 * len(before)
    train, held_out = made.do_split()
    by_case = {f"case_{index}": spacing for index, spacing in enumerate(SPACINGS)}
    check(told, kind, plan_spacing, [by_case[key] for key in [*train, *held_out]])
    told.clear()
    made.perform_actual_validation()
    check(told, kind, plan_spacing, [by_case[key] for key in held_out], all_of_them=True)
    told.clear()
    predictor = (RatPredictor if kind == "native" else nnUNetPredictor)(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(made.output_folder_base, (0,))
    images = planned[0] / "raw" / "Dataset001_Balls" / "imagesTr"
    for index in (2, 4):
        source = images / f"case_{index}_0000.nii.gz"
        predictor.predict_from_files([[str(source)]], [str(tmp_path / f"{index}")], num_processes_preprocessing=1)
        found = nibabel.load(tmp_path / f"{index}.nii.gz")
        assert found.shape == nibabel.load(source).shape
        np.testing.assert_allclose(found.affine, nibabel.load(source).affine)
    check(told, kind, plan_spacing, [SPACINGS[2], SPACINGS[4]], all_of_them=True)


def check(told, kind, plan_spacing, cases, all_of_them=False):
    """Compares what the network was told with the plan's spacing, or with that of the cases."""
    rows = {tuple(round(step, 4) for step in row) for spacing in told for row in spacing}
    if kind == "resampled":
        assert rows == {tuple(round(step, 4) for step in plan_spacing)}
    else:
        own = {tuple(round(step, 4) for step in row) for row in cases}
        assert rows <= own
        assert not all_of_them or rows == own


def record_told(monkeypatch):
    """Returns a list to which each call of a segmenter adds the spacing that it is told, per sample."""
    from rat_timm.dense import Segmenter

    seen, forward = [], Segmenter.forward

    def record(self, x, *, spacing=None, **told):
        rows = torch.as_tensor(spacing, dtype=torch.float32).expand(len(x), x.ndim - 2)
        seen.append(rows.tolist())
        return forward(self, x, spacing=spacing, **told)

    monkeypatch.setattr(Segmenter, "forward", record)
    return seen


def test_nnunet_finds_larger_ones(planned):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    tried = trainer("nnUNetTrainerRatTry", "resampled", planned, short=False)
    assert (tried.num_epochs, tried.num_iterations_per_epoch, tried.num_val_iterations_per_epoch) == (1, 10, 1)
    for size in ("Small", "Base"):
        found = recursive_find_trainer_class_by_name(f"nnUNetTrainerRat{size}")
        assert found.variants[3] == f"rat_{size.lower()}_3d"
