"""The table of families: every name that this package registers with timm, and what makes its model.

A family's package fills it by `register`. `python -m rat_timm list`, the tests and whoever wants all names read it.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from timm.models import generate_default_cfgs, register_model
from torch import nn


class Variant(NamedTuple):
    """A registered name.

    Attributes:
        description: One line, the entry point's docstring.
        defaults: Keywords of the constructor that make the architecture.
        cfgs: timm's pretrained entries by tag, the default first; "" for none.
    """

    description: str
    defaults: Mapping[str, Any]
    cfgs: Mapping[str, Mapping[str, Any]]


class Create(Protocol):
    """What makes a family's models, with the keywords of ``timm.create_model``."""

    def __call__(self, variant: str, pretrained: bool, **kwargs: Any) -> nn.Module: ...  # noqa: D102


class Family(NamedTuple):
    """Variants that one class makes.

    Attributes:
        name: timm's name of the module, as in ``timm.list_models(module=...)``.
        create: Makes a model of it.
        variants: By registered name.
        upgrade: Turns all keywords of a model, as this or an earlier version saved them, into those for timm.
    """

    name: str
    create: Create
    variants: Mapping[str, Variant]
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] = dict


FAMILIES: dict[str, Family] = {}
"""The families by name, in the order of their registration."""


def upgrade(variant: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keywords with which ``timm.create_model`` makes what was saved.

    Args:
        variant: A name of timm's registry; of other packages' models keywords are returned as they are.
        saved: All keywords of the model.
    """
    for family in FAMILIES.values():
        if variant in family.variants:
            return family.upgrade(dict(saved))
    return dict(saved)


def register(family: Family, package: str) -> None:
    """Registers a family's variants with timm and puts it in `FAMILIES`.

    Args:
        family: The family.
        package: The full name of its package. timm takes the last part as the module's name, and reads the pretrained
            entries in the package's ``default_cfgs``, which this sets.
    """
    module = sys.modules[package]
    assert package.rpartition(".")[2] == family.name
    entries = {
        f"{name}.{tag}" if tag else name: dict(cfg)
        for name, variant in family.variants.items()
        for tag, cfg in variant.cfgs.items()
    }
    vars(module)["default_cfgs"] = generate_default_cfgs(entries)
    for name, variant in family.variants.items():
        vars(module)[name] = register_model(_entry_point(family, name, variant.description, package))
    FAMILIES[family.name] = family


def _entry_point(family: Family, name: str, description: str, package: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return family.create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__module__, create.__doc__ = package, description
    return create
