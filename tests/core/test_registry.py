"""Registries: entries from the files of a package, clear messages, and nothing swallowed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deeparc_hf.core.registry import Registry
from deeparc_hf.errors import RegistryError

BASE = """
from deeparc_hf.core.registry import Registry


class Tool:
    pass


tools = Registry("garden tool", __name__.rpartition(".")[0], Tool)
"""
SPADE = """
from .base import Tool, tools


@tools.register("spade")
class Spade(Tool):
    pass
"""


class Tool:
    """Base of the entries that the tests below register by hand."""


@pytest.fixture
def package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Registry]]:
    """Writes a package with these modules to disk; returns its registry, not yet loaded."""
    name = "shed_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules: str) -> Registry:
        folder = tmp_path / name
        folder.mkdir()
        for module, text in {"__init__": "", "base": BASE, **modules}.items():
            (folder / f"{module}.py").write_text(text, "utf-8")
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.base").tools

    yield write
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def tools(package: Callable[..., Registry]) -> Registry[Tool]:
    """A registry over a package whose files register nothing."""
    return Registry("garden tool", package().package, Tool)


def define(tools: Registry[Tool], name: str, qualname: str = "Rake") -> type[Tool]:
    return tools.register(name)(type(qualname, (Tool,), {}))


def test_entry_is_found_by_its_name(tools):
    rake = define(tools, "rake")
    assert tools.get("rake") is rake
    assert rake.name == "rake"


def test_names_and_iteration_are_sorted(tools):
    for name in ("spade", "axe", "rake"):
        define(tools, name, name.title())
    assert tools.names() == ["axe", "rake", "spade"]
    assert [entry.name for entry in tools] == ["axe", "rake", "spade"]


def test_two_entries_of_one_name_are_refused(tools):
    first = define(tools, "rake")
    with pytest.raises(
        RegistryError, match=r"garden tool 'rake' is registered already, by .*Rake.*Give Broom another name"
    ):
        define(tools, "rake", "Broom")
    assert tools.get("rake") is first


def test_the_same_class_may_register_again_as_a_reload_does(tools):
    define(tools, "rake")
    again = define(tools, "rake")
    assert tools.get("rake") is again


@pytest.mark.parametrize(
    "name", ["Rake", "rake-2", "2rake", "", " rake", "rake ", "rake\n", "_rake", "gärtner", "ra.ke"]
)
def test_bad_name_is_refused_with_the_rule(tools, name):
    with pytest.raises(RegistryError, match="not a valid name for a garden tool: use lower case"):
        define(tools, name)
    assert tools.names() == []


@pytest.mark.parametrize(
    "entry", [int, object(), Tool(), lambda: None], ids=["class", "object", "instance", "function"]
)
def test_entry_of_another_base_is_refused(tools, entry):
    with pytest.raises(RegistryError, match=r"cannot be a garden tool: it must derive from Tool"):
        tools.register("rake")(entry)
    assert tools.names() == []


def test_unknown_name_says_what_was_probably_meant(tools):
    define(tools, "rake")
    define(tools, "wheelbarrow", "Barrow")
    with pytest.raises(
        RegistryError,
        match=r"no garden tool named 'wheelbarow'. Did you mean 'wheelbarrow'\? Known: rake, wheelbarrow\.$",
    ):
        tools.get("wheelbarow")


@pytest.mark.parametrize("name", ["zzz", "", None, 3, ["zzz"]])
def test_unknown_name_that_is_like_none_lists_the_names(tools, name):
    define(tools, "rake")
    with pytest.raises(RegistryError, match=r"Known: rake\.$") as caught:
        tools.get(name)
    assert "Did you mean" not in str(caught.value)


def test_a_new_file_in_the_package_is_found_without_being_named_anywhere(package):
    tools = package(spade=SPADE, axe=SPADE.replace("spade", "axe").replace("Spade", "Axe"))
    assert tools.names() == ["axe", "spade"]
    assert tools.get("spade").__name__ == "Spade"


def test_package_is_read_when_first_asked_and_only_once(package):
    tools = package(spade=SPADE)
    loaded = f"{tools.package}.spade"
    assert loaded not in sys.modules
    assert tools.names() == ["spade"]
    del sys.modules[loaded]
    assert tools.names() == ["spade"]
    assert loaded not in sys.modules


def test_missing_dependency_of_a_module_is_raised(package):
    tools = package(spade=SPADE, broken="import a_package_that_is_not_there\n")
    for _ in range(2):  # a second try must not find a half-filled registry
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
            tools.get("spade")


@pytest.mark.parametrize(
    ("text", "error"),
    [("from .base import nothing_like_it\n", ImportError), ("1 / 0\n", ZeroDivisionError), ("def (\n", SyntaxError)],
)
def test_error_in_a_module_is_raised(package, text, error):
    tools = package(broken=text)
    with pytest.raises(error):
        tools.names()


def test_two_files_that_take_one_name_are_refused(package):
    tools = package(spade=SPADE, zspade=SPADE.replace("Spade", "Zspade"))
    with pytest.raises(RegistryError, match=r"registered already, by .*\.spade\.Spade\. Give Zspade another name"):
        tools.names()


def test_an_entry_can_be_taken_out_again(package):
    registry = package(spade=SPADE)
    assert registry.names() == ["spade"]
    registry.unregister("spade")
    assert registry.names() == []
