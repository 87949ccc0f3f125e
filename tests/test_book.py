"""The sources of the book, without running them: `.ci/docs` does, and checks the links of what it builds."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "examples/book"
SCRIPTS = sorted((BOOK / "pages").glob("*.py"))
TEXTS = sorted((BOOK / "tools").glob("*.md"))
PAGES = [*SCRIPTS, *TEXTS]
TOOLS = [*TEXTS, *(page for page in SCRIPTS if ast.get_docstring(ast.parse(page.read_text())).startswith("If you use"))]
HIDDEN = re.compile(r"^# sphinx_gallery_start_ignore\n.*?^# sphinx_gallery_end_ignore\n", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```(?:bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FIRST = ("python examples/", "python -m rat_timm", "bash examples/")  # of commands of this repository


def prose(page):
    """What is read: the docstring and the comments of a script without their marks, or the whole of a text."""
    source = HIDDEN.sub("", page.read_text())
    if page.suffix == ".md":
        return source
    comments = re.findall(r"^# ?(.*)$", source, re.MULTILINE)
    return "\n".join([ast.get_docstring(ast.parse(source)), *comments])


def code(page):
    """The lines that a reader has to write or copy: the blocks of a text, one by one, or those of a script.

    A command of a script, which `run` calls, is the reader's one line in a shell, without an import of `run`.
    """
    if page.suffix == ".md":
        return [[line for line in block.splitlines() if line.strip()] for block in SHELL.findall(page.read_text())]
    source = HIDDEN.sub("", page.read_text())
    tree = ast.parse(source)
    lines = source.splitlines()
    written = []
    for node in tree.body[1:]:  # without the docstring
        text = ast.unparse(node)
        if text.startswith("run("):
            written.append(text)
        elif text != "from book import run":
            written += [line for line in lines[node.lineno - 1 : node.end_lineno] if line.strip()]
    return [written]


@pytest.mark.parametrize("page", TOOLS, ids=lambda page: page.stem)
def test_from_a_page_to_a_result_are_ten_lines(page):
    """Each block of a text is a way of its own; of a script all code counts, but stand-ins for the reader's files."""
    blocks = code(page)
    assert blocks
    assert all(0 < len(block) <= 10 for block in blocks)


def test_there_is_a_page_for_each_tool():
    names = {page.stem.removeprefix("plot_") for page in TOOLS}
    assert {"napari", "nnunet", "monai", "transformers", "smp", "lightning"} <= names


def test_every_page_is_in_the_index():
    listed = re.findall(r"^(?:.*<)?((?:built|tools|measured)/[\w/]+)>?$", (BOOK / "index.md").read_text(), re.MULTILINE)
    here = [f"built/{page.stem}" for page in SCRIPTS] + [f"tools/{page.stem}" for page in TEXTS]
    assert sorted(name for name in listed if not name.startswith("measured")) == sorted(here)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.stem)
def test_scripts_have_a_title_and_an_introduction(page):
    """sphinx-gallery runs files of this name; of the introduction it cuts the first 95 letters out, so: no markup."""
    title, line, *rest = ast.get_docstring(ast.parse(page.read_text())).splitlines()
    assert page.stem.startswith("plot_")
    assert title
    assert line == "=" * len(title)
    first = " ".join(rest).strip()[:95]
    assert first.count("``") % 2 == 0
    assert ":`" not in first


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_texts_have_a_title(page):
    assert re.match(r"# \w+", page.read_text())


@pytest.mark.parametrize("page", [*PAGES, BOOK / "index.md"], ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    paths = re.findall(r"\b((?:examples|rat_timm|tests|\.ci)/[\w./-]+\.\w+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    documents = re.findall(r":doc:`(?:[^`<]*<)?([^`>]+)>?`", " ".join(prose(page).split()))
    documents += re.findall(r"\]\((?:\.\./)?(measured/[\w/]+)\.md\)", text)
    assert [name for name in documents if not source_of(name.strip()).exists()] == []


def source_of(name):
    """The file of a document: of what was measured it lies outside of the book."""
    name = name.removeprefix("/")
    if name.startswith("measured/"):
        return ROOT / "examples" / f"{name.removeprefix('measured/')}.md"
    return BOOK / f"{name}.md" if "/" in name or name == "index" else BOOK / "pages" / f"{name}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_are_short(page):
    """Three minutes, at 200 words a minute."""
    assert len(prose(page).split()) <= 600


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_those_of_this_repository(page):
    commands = re.findall(r"^#? *((?:python|bash) .*)$", page.read_text(), re.MULTILINE)
    assert [line for line in commands if not line.startswith((*FIRST, "python -m pip", "python -m monai"))] == []
