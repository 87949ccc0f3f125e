import sys

import pytest

from rat_timm.optional import import_optional


def test_a_package_that_is_there():
    assert import_optional("json.decoder", "data").JSONDecoder


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install 'rat-timm\[data\]'"):
        import_optional("no_such_package", "data")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match="pydicom"):
        import_optional("pydicom", "data")
