"""The checks of a record's parts: its stacks, and what each pruning noted.

A record that passes here can be told in a card, so that what is wrong with it is found before blocks are removed, and
not after.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.plain_text import is_plain, plain
from ..errors import RecordError

__all__ = ["MAX_ENTRIES", "MAX_TEXT", "check_iterations", "check_name", "check_stack", "refuse_full"]

MAX_ENTRIES = 256
MAX_TEXT = 512
_MAX_BLOCKS = 4096
_STAGES = ("before", "removed", "healed", "retrained")
_TEXTS = ("id", "revision", "config", "split", "use")

Expect = Callable[[bool, str, Any, str], None]


def refuse_full(count: int, more: int) -> None:
    """Refuse to add to a record of so many prunings what could not be read again.

    Raises:
        RecordError: if it would list more than `MAX_ENTRIES`.
    """
    if count + more > MAX_ENTRIES:
        raise RecordError(
            f"The model's record lists {count} prunings, and one of more than {MAX_ENTRIES} is not read again. Nothing "
            f"was removed. Set pruning_config to None in the model's config to begin a new record."
        )


def check_name(name: Any, expect: Expect) -> str:
    """The name of a stack."""
    expect(
        is_plain(name, MAX_TEXT) and name.strip() == name != "",
        "stacks",
        name,
        f"names of at most {MAX_TEXT} visible characters",
    )
    return str(name)


def check_stack(name: Any, value: Any, expect: Expect) -> tuple[int, tuple[int, ...]]:
    """Number of original blocks of a stack, and the indices of those that are left."""
    where = f"stacks.{plain(name, 80)}"
    expect(isinstance(value, Mapping), where, value, "an object with length and kept")
    length, kept = value.get("length"), value.get("kept")
    expect(
        type(length) is int and 1 <= length <= _MAX_BLOCKS,
        f"{where}.length",
        length,
        f"a whole number from 1 to {_MAX_BLOCKS}",
    )
    expect(
        isinstance(kept, Sequence)
        and not isinstance(kept, str)
        and 1 <= len(kept) <= length
        and all(type(index) is int for index in kept),
        f"{where}.kept",
        kept,
        f"a list of 1 to {length} whole numbers",
    )
    rising = all(a < b for a, b in itertools.pairwise(kept))
    good = rising and kept[0] >= 0 and kept[-1] < length
    expect(good, f"{where}.kept", kept, f"rising block indices from 0 to {length - 1}, none twice")
    return length, tuple(kept)


def check_iterations(iterations: Sequence[Mapping[str, Any]], lengths: Mapping[str, int], expect: Expect) -> None:
    """Check what a downloaded record says of each pruning. What this version does not know is left alone, and never
    shown.

    Args:
        lengths: number of blocks of each stack of the original model.
        expect: raises where its first argument is false; the others say where, what was found and what was expected.
    """
    for number, entry in enumerate(iterations):
        where = f"iterations[{number}]"
        for key in ("settings", "metrics"):
            found = _object(entry, key, where, expect)
            expect(
                all(is_plain(name, MAX_TEXT) for name in found), f"{where}.{key}", found, "named by short visible texts"
            )
        for key in ("removed", "frozen"):
            for name, blocks in _object(entry, key, where, expect).items():
                length = lengths.get(name, _MAX_BLOCKS)
                expect(
                    is_plain(name, MAX_TEXT),
                    f"{where}.{key}",
                    name,
                    f"named by stacks, of at most {MAX_TEXT} visible characters",
                )
                expect(
                    _blocks(blocks, length),
                    f"{where}.{key}",
                    blocks,
                    f"lists of original block indices from 0 to {length - 1}",
                )
        for name, value in _object(entry, "thresholds", where, expect).items():
            expect(is_plain(name, MAX_TEXT) and _number(value), f"{where}.thresholds", value, "a number for each stack")
        expect(
            entry.get("samples") is None or _whole(entry["samples"]),
            f"{where}.samples",
            entry.get("samples"),
            "a whole number",
        )
        counts = _object(entry, "parameters", where, expect)
        expect(all(map(_whole, counts.values())), f"{where}.parameters", counts, "whole numbers")
        k = _object(entry, "settings", where, expect).get("k")
        expect(k is None or _whole(k), f"{where}.settings.k", k, "a whole number")
        for key in ("weights", "left"):
            mark = entry.get(key)
            expect(mark is None or is_plain(mark, 64), f"{where}.{key}", mark, "null or a short text")
        _check_data(_object(entry, "data", where, expect), f"{where}.data", expect)
        _check_stages(_object(entry, "stages", where, expect), f"{where}.stages", expect)
        _check_healing(entry.get("healing"), f"{where}.healing", expect)


def _object(entry: Mapping[str, Any], key: str, where: str, expect: Expect) -> Mapping[str, Any]:
    found = entry.get(key)
    expect(
        found is None or (isinstance(found, Mapping) and len(found) <= MAX_ENTRIES),
        f"{where}.{key}",
        found,
        "null or an object",
    )
    return found or {}


def _check_data(data: Mapping[str, Any], where: str, expect: Expect) -> None:
    for use, facts in data.items():
        expect(is_plain(use), where, use, "named by its use")
        known = facts or {}
        good = isinstance(known, Mapping) and all(
            known.get(key) is None or is_plain(known[key], MAX_TEXT) for key in _TEXTS
        )
        expect(good, f"{where}.{use}", facts, "an object of short visible texts")
        expect(
            known.get("rows") is None or _whole(known["rows"]),
            f"{where}.{use}.rows",
            known.get("rows"),
            "a whole number",
        )


def _check_stages(stages: Mapping[str, Any], where: str, expect: Expect) -> None:
    for stage in _STAGES:
        found = stages.get(stage)
        if found is None:
            continue
        place = f"{where}.{stage}"
        expect(isinstance(found, Mapping), place, found, "an object")
        accuracy, pairs = found.get("accuracy"), [found.get(key) for key in ("loss_interval", "accuracy_interval")]
        figures = (
            _number(found.get("loss")) and (accuracy is None or _number(accuracy)) and _whole(found.get("samples"))
        )
        expect(
            figures and is_plain(found.get("data")),
            place,
            found,
            "a loss, an accuracy or null, the number of samples, and their data",
        )
        expect(all(pair is None or _pair(pair) for pair in pairs), place, pairs, "intervals of two numbers")
        expect(accuracy is None or pairs[1] is not None, place, accuracy, "an accuracy with its interval")


def _check_healing(healing: Any, where: str, expect: Expect) -> None:
    expect(
        healing is None or (isinstance(healing, (list, tuple)) and len(healing) <= _MAX_BLOCKS),
        where,
        healing,
        "null or a list",
    )
    for site in healing or ():
        good = (
            isinstance(site, Mapping)
            and is_plain(site.get("stack"), MAX_TEXT)
            and _blocks(site.get("removed"), _MAX_BLOCKS)
        )
        good = good and all(site.get(key) is None or _number(site[key]) for key in ("held_out", "strength"))
        good = (
            good
            and (site.get("kept") is None or _whole(site["kept"]))
            and (site.get("kept") is not None or not site.get("healed"))
        )
        good = good and (
            site.get("reason") is None or (isinstance(site["reason"], str) and len(site["reason"]) <= MAX_TEXT)
        )
        expect(good, where, site, "an object for each removal site: stack, removed, kept, healed, held_out, reason")


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_number, value))


def _blocks(value: Any, length: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) <= length
        and all(type(index) is int and 0 <= index < length for index in value)
    )
