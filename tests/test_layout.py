"""The house: imports point one way, and one table names all families."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import rat_timm
from rat_timm.__main__ import names
from rat_timm.timm_api.families import FAMILIES

PACKAGE = Path(rat_timm.__file__).parent
# a part of the package may import itself, what every part may, and what stands in its row
ANYWHERE = {"optional"}
ALLOWED = {
    "optional": set(),
    "geometry": set(),
    "ops": {"geometry"},
    "layers": {"geometry", "ops"},
    "timm_api": {"geometry"},
    "models": {"geometry", "ops", "layers", "timm_api"},
    "data": {"geometry"},
    "cost": set(),
    "evaluation": {"data"},
    "dense": {"geometry", "ops", "layers", "models", "timm_api", "adapters"},
    "adapters": {"geometry", "ops", "layers", "models"},
    "pretrain": {"geometry", "ops", "layers", "models", "dense"},
    "predict": {"geometry", "layers", "models", "data", "dense", "timm_api"},
    "huggingface": {"data", "geometry", "timm_api"},
    "explain": {"dense", "evaluation", "geometry", "models", "ops"},
    "napari": {"data", "geometry", "predict"},
    "huggingface_training": {"geometry"},
    "monai": {"data", "dense", "evaluation", "predict"},
    "nnunet": {"dense", "geometry", "nnunet"},
    "__main__": {"cost", "monai", "predict", "timm_api"},
}


def imported(file):
    """Yields the parts of the package that a file imports, as names under ``rat_timm``."""
    package = file.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            modules = [".".join((*base, *(node.module or "").split(".")))]
            modules = [f"{m.strip('.')}.{alias.name}" for m in modules for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "rat_timm" and len(parts) > 1:
                yield parts[1:]


FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    part = file.parts[0].removesuffix(".py")
    allowed = ALLOWED[part] | ANYWHERE | {part, "__version__"}
    assert {target[0] for target in imported(PACKAGE / file)} <= allowed


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_do_not_know_each_other(family):
    for file in (PACKAGE / "models" / family).rglob("*.py"):
        others = [t[1] for t in imported(file) if t[0] == "models" and t[1] in FAMILIES]
        assert set(others) <= {family}


def test_only_its_backend_touches_natten():
    files = [f for f in PACKAGE.rglob("*.py") if "natten" in {t.partition(".")[0] for t in third_party(f)}]
    assert {f.relative_to(PACKAGE / "ops").parts[0] for f in files} <= {"neighborhood"}


def third_party(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_importing_is_cheap_and_loads_nothing_optional():
    optional = ("natten", "monai", "zarr", "pydicom", "transformers", "onnx", "ray", "matplotlib", "rich")
    optional += ("tifffile", "imagecodecs", "nibabel", "ome_zarr", "dask", "edt", "skimage", "scipy", "torchmetrics")
    optional += ("distributed",)
    code = (
        "import sys, time, timm; start = time.process_time(); import rat_timm; seconds = time.process_time() - start; "
        "import rat_timm.data, rat_timm.dense, rat_timm.pretrain, rat_timm.predict.engines, rat_timm.predict.stitch; "
        f"print(seconds, *(name for name in {optional} if name in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    seconds, *loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert float(seconds) < 0.5
    assert loaded == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_table_holds_what_timm_knows(family):
    ours = {name for name in FAMILIES[family].variants if timm.model_entrypoint(name).__module__.endswith(family)}
    assert ours == set(FAMILIES[family].variants) == set(timm.list_models(module=family))


@pytest.mark.parametrize("pattern", ["*rat*", "apvit*", "rat_vit*", "test_*rat*"])
def test_the_command_lists_what_timm_lists(pattern):
    known = {name for family in FAMILIES.values() for name in family.variants}
    assert (
        sorted(names(pattern))
        == sorted(set(timm.list_models(pattern)) & known)
        == sorted(fnmatch.filter(known, pattern))
    )
    assert names(pattern)


def public_functions(file):
    """Yields the functions that a file defines for others: no underscore in front, also of their class."""
    pending = list(ast.parse(file.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            pending += node.body
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield node


@pytest.mark.parametrize("file", FILES, ids=str)
def test_public_signatures_say_what_they_take(file):
    """``Any`` alone says nothing; what is handed on to somebody else's function (``**kwargs``) may be anything."""
    bare = []
    for function in public_functions(PACKAGE / file):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        annotations = {argument.arg: argument.annotation for argument in arguments} | {"return": function.returns}
        bare += [
            f"{function.name}: {name}"
            for name, annotation in annotations.items()
            if isinstance(annotation, ast.Name) and annotation.id == "Any"
        ]
    assert bare == []


@pytest.mark.parametrize("file", FILES, ids=str)
def test_functions_are_short(file):
    tree = ast.parse((PACKAGE / file).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {}
    for function in functions:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        if lines > 60:
            long[function.name] = lines
    assert long == {}
