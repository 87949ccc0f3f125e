"""Sphinx's settings for the book, whose pages sphinx-gallery runs: `.ci/docs FOLDER` builds it beside the API pages.

The sources are copied first, since sphinx-gallery writes beside them; this file stays where it is (`sphinx -c`).
"""

import functools
import logging
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import matplotlib

matplotlib.use("agg")

from docutils import nodes
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx_gallery.scrapers import figure_rst, matplotlib_scraper

BOOK = Path(__file__).resolve().parent
EXAMPLES = BOOK.parent
sys.path[:0] = [str(BOOK), str(EXAMPLES)]  # what pages import: `book`, and the packages of the examples

import rat_timm

project = "rat_timm"
author = copyright = "rat_timm contributors"
release = rat_timm.__version__
extensions = ["myst_parser", "sphinx_gallery.gen_gallery"]
html_theme = "furo"
html_title = "rat_timm: the book"
html_show_sphinx = html_copy_source = False
exclude_patterns = ["pages/*"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # of the functions below
MEASURED = ("cells/README.md", "context_study/README.md", "resolution_study/README.md", "benchmarks.md", "layouts.png")
LOOK = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.cmap": "gray",
    "image.interpolation": "nearest",
}


def begin_page(gallery_conf: dict[str, Any], page: str) -> None:
    """Sets how figures look."""
    plt.rcParams.update(LOOK)
    logging.getLogger().setLevel(logging.WARNING)  # some of the packages that pages import lower it
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # PyTorch's, of checkpoints of one process
    warnings.filterwarnings("ignore", "NvImgCodecPydicomReader")  # MONAI's, without a package that it could use


def scrape(block: Any, variables: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Shows the figures of a block: pyplot's, and those that are returned, as those of `rat_timm.explain` are."""
    shown = matplotlib_scraper(block, variables, gallery_conf)
    mine = variables["example_globals"]
    figures = {
        name: value
        for name, value in mine.items()
        if isinstance(value, Figure) and getattr(value, "number", None) is None
    }
    paths = []
    for (name, figure), path in zip(figures.items(), variables["image_path_iterator"], strict=False):
        figure.savefig(path)
        paths.append(path)
        del mine[name]  # it is shown once
    return shown + (figure_rst(paths, gallery_conf["src_dir"]) if paths else "")


sphinx_gallery_conf = {
    "examples_dirs": "pages",
    "gallery_dirs": "built",
    "filename_pattern": r"plot_",
    "nested_sections": False,
    "abort_on_example_error": True,
    "run_stale_examples": True,
    "download_all_examples": False,
    "show_signature": False,
    "capture_repr": (),
    "inspect_global_variables": False,
    "image_scrapers": (scrape,),
    "reset_modules": ("matplotlib", begin_page),
}


def copy_measured(app: Sphinx, config: Any) -> None:
    """Copies what was measured into the book, with its pictures and tables."""
    for name in MEASURED:
        source, target = EXAMPLES / name, Path(app.srcdir, "measured", name)
        if source.name == "README.md":
            shutil.copytree(source.parent, target.parent, ignore=shutil.ignore_patterns("*.py", "*.sh", "__pycache__"))
        else:
            shutil.copy(source, target)


def api(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = None
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """The role that links the API page of a module or of an object, which lies beside the book: ``rat_timm.dense``."""
    environment = inliner.document.settings.env
    up, parts, anchor = "../" * (environment.docname.count("/") + 1), text.split("."), ""
    if not Path(environment.app.outdir.parent, *parts).with_suffix(".html").exists():  # no module
        parts, anchor = parts[:-1], f"#{parts[-1]}"
    target = f"{up}{'/'.join(parts)}.html{anchor}"
    return [nodes.reference(rawtext, "", nodes.literal(text, text), refuri=target)], []


class Targets(HTMLParser):
    """The local links of a page, and the places in it that links may name.

    Attributes:
        links: What they say.
        places: Their names.
    """

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sees a tag."""
        given = dict(attrs)
        self.places.update(name for name in (given.get("id"), given.get("name")) if name)
        link = given.get("href") or given.get("src")
        if link and "://" not in link and not link.startswith(("mailto:", "data:")):
            self.links.append(link)


def check_links(app: Sphinx, exception: Exception | None) -> None:
    """Checks that every local link of the book leads somewhere, to the API pages too.

    Raises:
        ExtensionError: If one does not.
    """
    if exception is not None or app.builder.name != "html":
        return
    read = functools.lru_cache(maxsize=None)(Targets)
    broken = []
    for page in sorted(Path(app.outdir).rglob("*.html")):
        for link in read(page).links:
            path, _, place = unquote(link).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            missing = not target.exists() or (place and target.suffix == ".html" and place not in read(target).places)
            broken += [f"{page.relative_to(app.outdir)}: {link}"] if missing else []
    if broken:
        raise ExtensionError("links to what is not there:\n" + "\n".join(broken))


def setup(app: Sphinx) -> None:
    """Adds the role, the measured pages, and the check of links."""
    app.add_role("api", api)
    app.connect("config-inited", copy_measured)
    app.connect("build-finished", check_links)
