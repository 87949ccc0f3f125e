"""Runs timm's own model tests on RAT: the tests of the installed timm's source distribution, out of tree.

    python tests/run_timm_tests.py [NAME ...] [-- PYTEST ARGUMENTS]

Left out are TorchScript, which is deprecated and no target of ours; tests that download weights or expected outputs;
the test of cfgs for plain ViTs, as timm leaves out its own, and for volumes, where it asserts that maps have four
dimensions; and that of the maps' sizes for a volume that is no cube (`test_timm_contract.py` checks the same for five)
and for adaptive patches, which form no map. The variable TIMM_SDIST names an archive that is there already; timm's own
TORCH_DEVICE the device.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

PLAIN = ("rat_vit_small_patch16_rope_mixed_224", "rat_vit_small_patch16_dinov3_qkvb")
ADAPTIVE = ("apvit_tiny_patch16_224",)
NAMES = ("test_rat", "test_rat_3d", "rat_tiny", "rat_tiny_3d", *PLAIN, *ADAPTIVE)
PYTEST = [sys.executable, "-m", "pytest", "-p", "rat_timm", "-q"]
LEFT_OUT = (
    r"torchscript|test_model_inference|_pretrained\[.*(rat_vit|rat_eva|apvit)"
    r"|test_model_default_cfgs.*(_3d|rat_vit|rat_eva|apvit)|test_model_forward_features.*(test_rat_3d|apvit)"
)
SELECT = """

import re


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if re.search({chosen!r}, item.name) and not re.search({left_out!r}, item.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
"""


def download(folder: Path) -> Path:
    """Downloads the source distribution of the installed timm."""
    requirement = f"timm=={timm.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm"]
    subprocess.run([*pip, "--dest", folder, requirement], check=True)
    (archive,) = folder.glob("timm-*.tar.gz")
    return archive


def fetch_tests(folder: Path) -> Path:
    """Unpacks timm's source distribution; returns the test file, with RAT among those it looks at."""
    archive = Path(os.environ["TIMM_SDIST"]) if "TIMM_SDIST" in os.environ else download(folder)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (source,) = folder.glob("timm-*/tests/test_models.py")
    text = source.read_text()
    changed = text.replace("FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['rat', ")
    if changed == text:
        raise RuntimeError(f"{source} has no FEAT_INTER_FILTERS list: timm {timm.__version__} is not what we know")
    # out of timm's source tree, so that the installed timm is the one that is tested
    tests = folder / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text((source.parent / "conftest.py").read_text())
    (tests / "test_models.py").write_text(changed)
    return tests / "test_models.py"


def main() -> int:
    """Runs the tests; returns pytest's exit status."""
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, extra = arguments[:split] or list(NAMES), arguments[split + 1 :]
    chosen = r"\[(?:\d+-)?(?:" + "|".join(names) + r")(?:\.\w+)?(?:-\d+)?\]$"
    with tempfile.TemporaryDirectory() as folder:
        test_file = fetch_tests(Path(folder))
        with test_file.with_name("conftest.py").open("a") as file:
            file.write(SELECT.format(chosen=chosen, left_out=LEFT_OUT))
        command = [*PYTEST, "-p", "no:cacheprovider", "--disable-warnings", *extra, test_file]
        return subprocess.run(command, check=False, cwd=folder).returncode  # 5, not 0, if no test is chosen


if __name__ == "__main__":
    sys.exit(main())
