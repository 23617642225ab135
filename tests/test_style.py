"""How code is written: tests touch no private name of the package, and the package none of another library's, but in
the one file for that.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "deeparc_hf").rglob("*.py"))
OBSERVERS = sorted(path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
ELSEWHERE = {"_parameters", "_repr_html_"}  # of PyTorch and of notebooks


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> set[str]:
    """Private names that a module defines: functions, classes, variables, and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_name(node.value, "self"):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def touched(source: str, names: set[str]) -> Iterator[tuple[int, str]]:
    """Where a file imports one of these names, reads or patches it as an attribute of anything but its own `self`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deeparc_hf"):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute) and node.attr in names and not is_name(node.value, "self"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("attr"):
            given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ((node.lineno, name) for text in given for name in text.split(".")[-1:] if name in names)


def test_no_test_touches_a_private_name_of_the_package():
    names = set().union(*(private_names(path.read_text("utf-8")) for path in PACKAGE)) - ELSEWHERE
    found = {str(path.relative_to(ROOT)): list(touched(path.read_text("utf-8"), names)) for path in OBSERVERS}
    assert {path: places for path, places in found.items() if places} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from deeparc_hf.cli import _parser", ["_parser"]),
        ("callback._run.progress", ["_run"]),
        ("self._run = 1", []),
        ("model._forward_hooks", []),
        ("monkeypatch.setattr(masks, '_sort', 1)", ["_sort"]),
        ("monkeypatch.setattr('deeparc_hf.sparsity.masks._sort', 1)", ["_sort"]),
        ("getattr(callback, '_run')", ["_run"]),
    ],
)
def test_the_rule_sees_what_it_is_to_see(source, found):
    assert [name for _, name in touched(source, {"_parser", "_run", "_sort"})] == found


# the one exception is DistributedDataParallel, whose live wrapper has to follow its model
FOR_OTHERS = {"compat.py", "distributed.py"}


def test_private_names_of_other_libraries_are_touched_in_one_file():
    sources = {path: path.read_text("utf-8") for path in PACKAGE}
    own = set().union(*map(private_names, sources.values())) | set().union(*map(fields_of, sources.values()))
    found = {
        f"{path.relative_to(ROOT)}:{line}": name
        for path, source in sources.items()
        if path.name not in FOR_OTHERS
        for line, name in foreign(source, own | {"_repr_html_", "_exit"})  # of notebooks, and of os, which documents it
    }
    assert found == {}


def fields_of(source: str) -> set[str]:
    """Private fields that classes of a module declare."""
    return {
        node.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def foreign(source: str, own: set[str]) -> Iterator[tuple[int, str]]:
    """Private attributes, and private names that are imported, which the package does not define."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))


@pytest.mark.parametrize(
    ("source", "name"), [("from torch.nn import _Norm", "_Norm"), ("module._parameters['weight']", "_parameters")]
)
def test_the_rule_for_other_libraries_sees_them(source, name):
    assert [found for _, found in foreign(source, {"_own"})] == [name]
    assert list(foreign("module._own", {"_own"})) == []


def test_no_seed_is_set_for_all_devices():
    """torch.manual_seed seeds every GPU, and only the states of the model's are put back (observe/forward.py)."""
    calls = [
        f"{path}:{number}"
        for path in sorted((ROOT / "deeparc_hf").rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "torch.manual_seed(" in line or "cuda.manual_seed_all(" in line
    ]
    assert not calls
