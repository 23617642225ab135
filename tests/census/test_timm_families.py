"""Every family of timm: what can be pruned is proven, what cannot says why, and a row of the table that changes is
noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import timm
from packaging.version import Version

from . import table, timm_table
from .parts import of_this_part
from .timm_families import families, try_bare, try_family, try_wrapped
from .trial import BAD

KEPT = timm_table.read()
same_timm = KEPT["versions"]["timm"] == timm.__version__
# one of each way in which blocks are counted, or are not: a number, one a stage, stages in one list, lists in lists,
# values, an entry that follows, by the package alone, not at all
QUICK = (
    "vision_transformer",
    "convnext",
    "hiera",
    "convit",
    "senet",
    "lowformer",
    "xception_aligned",
    "cspnet",
    "metaformer",
    "dpn",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries
    pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="no arguments are recorded before"),
]


def without_reasons(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what may be worded anew."""
    row = copy.deepcopy(dict(row))
    row.pop("why", None)
    for kind in ("bare", "wrapped"):
        row[kind].pop("reason", None)
        for stack in row[kind].get("stacks", {}).values():
            stack.pop("why", None)
            stack.pop("why_uses", None)
    return row


def test_the_table_has_all_families():
    if same_timm:
        assert list(KEPT["families"]) == sorted(families())


def middles(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: (stack["blocks"], stack["pinned"], stack["removals"].get("middle"))
        for name, stack in row.get("stacks", {}).items()
    }


@pytest.mark.parametrize("family", QUICK)
def test_a_family_loses_a_middle_block_as_the_table_says(family, loaders):
    kept = KEPT["families"][family]
    wrapped = table.verdict(kept["bare"]) == "refused"
    tried = (try_wrapped if wrapped else try_bare)(kept["architecture"], loaders, ["middle"])
    assert tried.verdict not in BAD, f"{family}: {tried.reason or tried.stacks}"
    if same_timm:
        row, expected = table.row_of(tried), kept["wrapped" if wrapped else "bare"]
        assert row["state"] == expected["state"]
        assert middles(row) == middles(expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", of_this_part(families()))
def test_each_family_is_what_the_table_says(family, loaders):
    row = try_family(family, loaders)
    for kind in ("bare", "wrapped"):
        assert table.verdict(row[kind]) not in BAD, f"{family}, {kind}: {row[kind]}"
    if same_timm:
        assert without_reasons(row) == without_reasons(KEPT["families"][family])


def test_most_families_can_be_pruned(capsys):
    """Of the families that have a stack of blocks: how many can be loaded, and how many by stock timm alone."""
    rows = KEPT["families"]
    stacked, good, by_stock = timm_table.shares(rows, table.verdict)
    with capsys.disabled():
        print(f"\nOf {len(rows)} families of timm, {len(stacked)} have a stack of blocks;", end=" ")
        print(f"{len(good)} of these can be pruned, {len(by_stock)} by stock timm alone. The rest:")
        for family in sorted(rows.keys() - by_stock):
            row = rows[family]
            told = row.get("why") or row["bare"].get("reason", "")
            print(f"  {family}: {timm_table.verdict_of(row, table.verdict)}; {told}")
    assert not {table.verdict(row[kind]) for row in rows.values() for kind in ("bare", "wrapped")} & set(BAD)
    assert len(stacked) >= 0.8 * len(rows)
    assert len(good) >= 0.9 * len(stacked)
    assert len(by_stock) >= 0.75 * len(stacked)
