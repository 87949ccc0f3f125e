"""The wheel: small, whole, and as good as the tree it was built from."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import pathlib, sys
import timm
import rat_timm
assert pathlib.Path(rat_timm.__file__).is_relative_to(sys.argv[1]), rat_timm.__file__
for name in ("test_rat", "test_rat_3d"):
    timm.create_model(name, pretrained=True)
"""


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_the_weights(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("rat_timm-*.whl")
    assert wheel.stat().st_size < 5e6
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"rat_timm"}
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)  # what an installation of Python alone is
    check = [sys.executable, "-c", CHECK, target]
    subprocess.run(check, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(target)})
