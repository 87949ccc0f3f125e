import subprocess
import sys

import pytest
import timm

from rat_timm.__main__ import describe, main, names, parse
from rat_timm.timm_api.families import FAMILIES


def test_every_name_is_listed():
    found = names("*")
    assert set(timm.list_models("test_rat*")) | {"rat_tiny", "rat_huge_3d", "rat_classic"} <= set(found)
    assert "rat_vit_base_patch16_dinov3" in found
    assert all("rat_" in name or name in ("test_rat", *FAMILIES["apvit"].variants) for name in found)
    assert sorted(names("rat_*_3d")) == sorted(timm.list_models("rat_*_3d", module="rat"))


def test_a_variant_is_described():
    row = describe("test_rat_3d")
    assert row.weights == "digits"
    assert (row.strides, row.spacing, row.size) == ("4/8/16/32", "1x1x1", "1x16x32x32")
    assert float(row.parameters.split()[0]) == pytest.approx(0.3, abs=0.1)
    assert describe("rat_eva02_tiny_patch14_224").weights == "mim_in22k"


def test_the_list_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rat_timm", "list", "test_rat"])
    main()
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["name", "parameters", "MACs"]
    assert row.split()[0] == "test_rat"
    monkeypatch.setattr(sys, "argv", ["rat_timm", "list", "resnet*"])
    with pytest.raises(SystemExit, match=r"no name matches 'resnet\*'"):  # which exits with 1
        main()


def test_a_script_runs_with_the_models_registered(tmp_path, monkeypatch):
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
    command = [sys.executable, "-m", "rat_timm", "run", str(script), "--flag", "list", "-x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == str([str(script), "--flag", "list", "-x"])
    assert done.returncode == 3
    monkeypatch.setattr(sys, "argv", ["rat_timm", "run", str(tmp_path / "missing.py")])
    with pytest.raises(SystemExit, match="there is no file"):
        main()


def test_a_scripts_flags_are_its_own():
    given = parse(["run", "train.py", "--help", "run"])
    assert given.arguments == ["--help", "run"]
