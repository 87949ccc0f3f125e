import subprocess
import sys

import pytest
import timm

from rat_timm.__main__ import describe, names, parse
from rat_timm.timm_api.families import FAMILIES


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "rat_timm", *map(str, arguments)], capture_output=True, text=True)


def test_every_name_is_listed():
    found = names("*")
    assert set(timm.list_models("test_rat*")) | {"rat_tiny", "rat_huge_3d", "rat_classic"} <= set(found)
    assert "rat_vit_base_patch16_dinov3" in found
    assert all("rat_" in name or name in ("test_rat", *FAMILIES["apvit"].variants) for name in found)
    assert names("rat_*_3d") == timm.list_models("rat_*_3d", module="rat")


def test_a_variant_is_described():
    row = describe("test_rat_3d")
    assert row.weights == "digits"
    assert (row.strides, row.spacing, row.size) == ("4/8/16/32", "1x1x1", "1x16x32x32")
    assert float(row.parameters.split()[0]) == pytest.approx(0.3, abs=0.1)
    assert describe("rat_eva02_tiny_patch14_224").weights == "mim_in22k"


def test_the_list_on_the_command_line():
    done = run("list", "test_rat")
    header, row = done.stdout.splitlines()
    assert header.split()[:3] == ["name", "parameters", "MACs"]
    assert row.split()[0] == "test_rat"
    missing = run("list", "resnet*")
    assert missing.returncode == 1
    assert "no name matches 'resnet*'" in missing.stderr


def test_a_script_runs_with_the_models_registered(tmp_path):
    (tmp_path / "helper.py").write_text("name = 'test_rat'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, helper\n"
        "import timm\n"
        "if __name__ == '__main__':\n"
        "    timm.create_model(helper.name)\n"
        "    print(sys.argv)\n"
        "    sys.exit(3)\n"
    )
    done = run("run", script, "--flag", "list", "-x")
    assert done.stdout.strip() == str([str(script), "--flag", "list", "-x"])
    assert done.returncode == 3
    assert "there is no file" in run("run", tmp_path / "missing.py").stderr


def test_a_scripts_flags_are_its_own():
    given = parse(["run", "train.py", "--help", "run"])
    assert given.arguments == ["--help", "run"]
