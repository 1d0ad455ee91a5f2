"""`dlm.NAME`: one name, one thing, whatever has been imported before."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import dlm
from dlm.train import config, loop

PUBLIC = [name for name in dlm.__all__ if name != "__version__"]
SMALL = ["steps=2", "layers=1", "heads=2", "width=16", "window=32", "context=8", "batch=4", "eval_windows=4"]


def import_everything() -> None:
    for found in pkgutil.walk_packages(dlm.__path__, "dlm."):
        if found.name not in ("dlm.__main__", "dlm.serve.ray_app"):  # one runs, one needs a cluster
            importlib.import_module(found.name)


def test_a_name_is_the_same_before_and_after_all_modules_are_imported() -> None:
    before = {name: getattr(dlm, name) for name in PUBLIC}
    import_everything()
    after = {name: getattr(dlm, name) for name in PUBLIC}
    assert [name for name in PUBLIC if before[name] is not after[name]] == []


def test_no_public_name_is_a_submodule() -> None:
    assert [name for name in PUBLIC if importlib.util.find_spec(f"dlm.{name}") is not None] == []


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(dlm.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    names = [alias.asname or alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names) == sorted(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        dlm.magic  # noqa: B018


def test_train_is_the_package_and_fit_the_function(text_file: Path, tmp_path: Path) -> None:
    settings = config.TrainConfig(data=str(text_file)).with_settings(SMALL)
    assert dlm.train.loop is loop
    for name in ("first", "second"):
        assert dlm.fit(settings, tmp_path / name).step == 2
