"""The documentation: its code runs, and the files that it names are there."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import rat_timm

PACKAGE = Path(rat_timm.__file__).parent
ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md"]


def code(file):
    """Returns the fenced Python blocks of a module's docstring, as one program."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


PROGRAMS = {str(file.relative_to(PACKAGE)): code(file) for file in sorted(PACKAGE.rglob("*.py")) if code(file)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_code_in_docstrings_runs(name):
    names = {}
    exec(PROGRAMS[name], names)
    shapes = re.findall(r"^(\w+) = .*  # (\[[\d, ]+\])", PROGRAMS[name], re.MULTILINE)
    assert [str(list(names[variable].shape)) for variable, _ in shapes] == [shape for _, shape in shapes]


def test_some_docstrings_have_code():
    assert len(PROGRAMS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_pages_name_are_there(page):
    text = page.read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    paths = re.findall(r"`((?:rat_timm|examples|tests|\.ci|\.github)/[\w./-]+)`", text)
    paths += re.findall(r"^(?:python|torchrun.*?) ((?:examples)/\w+\.py)", text, re.MULTILINE)
    assert [target for target in links if not (page.parent / target).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert len(links) + len(paths) > 5


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (rat_timm.__version__, "BSD-3-Clause")
