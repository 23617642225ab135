"""The checks of a record's parts, made before blocks are removed: what passes can be told in a card, and what this
version does not know is left alone, and never shown.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..core.checks import MAX_BLOCKS, MAX_TEXT, Entry
from ..core.plain_text import LIMIT

__all__ = ["check_iteration", "check_sparsity"]

_MARK = 64
_MAX_MATRICES = 65536
_MAX_SIZE = 2**40
_STAGES = ("before", "removed", "healed", "retrained")
_TEXTS = ("id", "revision", "config", "split", "use")


def check_iteration(entry: Entry, lengths: Mapping[str, int]) -> None:
    """Check what a record says of one pruning; `lengths` are those of the original model's stacks."""
    for part in _given(entry, "settings", "metrics"):
        part.named()
    for settings in _given(entry, "settings"):
        for k in _given(settings, "k"):
            k.whole()
    for part in _given(entry, "removed", "frozen"):
        for name, blocks in part.named().items():
            length = lengths.get(name, MAX_BLOCKS)
            blocks.wholes(length - 1, most=length)
    for part in _given(entry, "thresholds"):
        for threshold in part.named().values():
            threshold.number()
    for samples in _given(entry, "samples"):
        samples.whole()
    for part in _given(entry, "parameters"):
        for count in part.entries().values():
            count.whole()
    for mark in _given(entry, "weights", "left"):
        mark.text(_MARK)
    for part in _given(entry, "data"):
        for data in part.named(limit=LIMIT).values():
            if data.value is not None:
                for text in _given(data, *_TEXTS):
                    text.text()
                for rows in _given(data, "rows"):
                    rows.whole()
    for part in _given(entry, "stages"):
        part.entries()
        for quality in _given(part, *_STAGES):
            _check_quality(quality)
    for search in _given(entry, "search"):
        search.text(LIMIT)
    for healing in _given(entry, "healing"):
        for site in healing.items(MAX_BLOCKS):
            _check_site(site)


def _given(entry: Entry, *keys: str) -> list[Entry]:
    """Those of these entries of an object that are neither missing nor null."""
    return [found for key in keys if (found := entry.get(key)) is not None]


def _check_quality(quality: Entry) -> None:
    quality["loss"].number()
    quality["samples"].whole()
    quality["data"].text(LIMIT)
    for interval in _given(quality, "loss_interval", "accuracy_interval"):
        interval.numbers(2)
    for accuracy in _given(quality, "accuracy"):
        accuracy.number()
        quality["accuracy_interval"].numbers(2)


def _check_site(site: Entry) -> None:
    site["stack"].text()
    site["removed"].wholes(MAX_BLOCKS - 1)
    for share in _given(site, "held_out", "strength"):
        share.number()
    if site.get("kept") is not None or site["healed"].value:
        site["kept"].whole()
    for reason in _given(site, "reason"):
        good = isinstance(reason.value, str) and len(reason.value) <= MAX_TEXT
        reason.must_be(good, f"a text of at most {MAX_TEXT} characters")


def check_sparsity(sparsity: Entry) -> None:
    """Check what a record says of zeroed weights."""
    matrices = sparsity["matrices"].named(_MAX_MATRICES) if "matrices" in sparsity.entries() else {}
    for matrix in matrices.values():
        size = matrix["size"].whole(0, _MAX_SIZE)
        matrix["zeros"].whole(0, size)
