"""Every type of transformers: what can be pruned is proven, what cannot says why, and a row of the table that changes
is noticed.
"""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from . import table, tiny
from .parts import of_this_part
from .popular import POPULAR
from .trial import BAD, Row, try_type

KEPT = table.read()
same_transformers = KEPT["versions"]["transformers"] == transformers.__version__
# what no tiny model of can be run, or be loaded again, says nothing of the package
UNTRIED = ("not built", "no inputs", "stock differs")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, about tiny models
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.24"), reason="the tiny models are made for newer configs"
    ),
]


def assert_sound(row: Row) -> None:
    """No removal is wrong, fails in another process, or ends in an error that is not ours."""
    assert row.verdict not in BAD, f"{row.kind}: {row.reason or row.stacks}"


def test_the_popular_types_are_types():
    assert len(POPULAR) == len(set(POPULAR)) == 100
    assert set(POPULAR) <= set(tiny.types())


@pytest.mark.parametrize("kind", POPULAR)
def test_a_popular_type_loses_a_middle_block_as_the_table_says(kind, loaders):
    row = try_type(kind, loaders, only=["middle"])
    assert_sound(row)
    if same_transformers:
        kept = KEPT["types"][kind]
        assert row.state == kept["state"]
        assert {name: (stack["blocks"], stack["pinned"]) for name, stack in row.stacks.items()} == {
            name: (stack["blocks"], stack["pinned"]) for name, stack in kept.get("stacks", {}).items()
        }
        found = table.row_of(row).get("stacks", {})
        middle = {name: stack["removals"].get("middle") for name, stack in kept.get("stacks", {}).items()}
        assert {name: stack["removals"].get("middle") for name, stack in found.items()} == middle


@pytest.mark.slow
@pytest.mark.parametrize("kind", of_this_part(tiny.types()))
def test_each_type_is_what_the_table_says(kind, loaders):
    row = try_type(kind, loaders)
    assert_sound(row)
    if same_transformers:
        found, kept = table.row_of(row), KEPT["types"].get(kind)
        assert kept is not None, "no row for it: python -m tests.census"
        for entry in (found, kept):  # reasons may be worded anew
            entry.pop("reason", None)
            for stack in entry.get("stacks", {}).values():
                stack.pop("why", None)
                stack.pop("why_uses", None)
        assert found == kept


def test_the_page_is_made_from_the_table():
    assert table.PAGE.read_text("utf-8") == table.page(KEPT)


def test_most_types_can_be_pruned(capsys):
    """Of the types that could be tried: how many can be loaded, and how many by stock transformers alone."""
    rows = KEPT["types"]
    tried = {kind: table.verdict(row) for kind, row in rows.items() if table.verdict(row) not in UNTRIED}
    tried = {kind: what for kind, what in tried.items() if what != "nothing to remove"}
    good = {kind for kind, what in tried.items() if what.startswith(("stock", "package"))}
    by_stock = {kind for kind in good if "stock" in table.results(rows[kind])}
    with capsys.disabled():
        print(
            f"\n{len(good)} of {len(tried)} types can be pruned, {len(by_stock)} of them by stock transformers alone;"
        )
        print(f"whole: {sum(what in ('stock', 'package') for what in tried.values())}, ", end="")
        print(f"whole by stock: {sum(what == 'stock' for what in tried.values())}. The rest:")
        print(", ".join(sorted(set(tried) - good)))
    assert not set(tried.values()) & set(BAD)
    assert len(good) >= 0.95 * len(tried)
    assert len(by_stock) >= 0.88 * len(tried)
