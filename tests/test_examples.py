"""Every example runs, in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("name", "expected"), [("quickstart.py", "70.4 x 64 x 64 mm"), ("pyramid.py", "130.5 x 250.5")]
)
def test_table_and_picture(name, expected, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    assert expected in run(name, tmp_path / "picture.png")
    picture = image.imread(tmp_path / "picture.png")
    assert min(picture.shape[:2]) > 500
    assert picture.std() > 0.1


def test_the_code_of_the_readme_runs():
    pytest.importorskip("segmentation_models_pytorch")
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    names = {}
    exec("\n".join(blocks), names)
    assert names["logits"].shape == (2, 5)
    assert names["labels"].shape == (1, 224, 224)


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []
