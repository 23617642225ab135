"""A README.md that is there already: whose it is, and what of its metadata stays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from ..core.plain_text import plain

__all__ = [
    "bare_metadata",
    "kept_message",
    "made_by_us",
    "marked",
    "may_replace",
    "merged",
    "merged_metadata",
    "unmarked",
]

_MARK = re.compile(r"\n<!-- deeparc_hf ([0-9a-f]{64}) -->\n*\Z")
_STOCK_DRAFT = "This model card has been generated automatically according to the information the Trainer had access to"
_TRL = "It has been trained using [TRL](https://github.com/huggingface/trl)."
_TRL_PARTS = ["Model Card for", "Quick start", "Training procedure", "Framework versions", "Citations"]
_TO_FILL_IN = "More information needed"  # in each of the draft's sections; somebody who edits it writes there
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---\s*", re.DOTALL)
_LONGEST = 100_000
_THEIRS = ("license", "license_name", "license_link", "pipeline_tag", "base_model")
_LISTS = ("language", "tags", "datasets", "metrics")


def marked(body: str) -> ModelCard:
    """A card with the mark by which it is known that nobody has edited it."""
    return ModelCard(f"{body}\n<!-- deeparc_hf {_digest(body)} -->\n")


def unmarked(text: str) -> str:
    """A card without that mark."""
    return _MARK.sub("\n", text).rstrip() + "\n"


def made_by_us(text: str) -> bool:
    """Whether a card is one of `create_model_card`, and as it wrote it: nobody has edited it since."""
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark.group(1)


def may_replace(file: Path) -> bool:
    """Whether a README.md is a card as this package wrote it, a trainer's draft, metadata alone, or not there."""
    text = _text_of(file)
    draft = _STOCK_DRAFT in text and text.count(_TO_FILL_IN) >= 3
    return made_by_us(text) or draft or _is_draft_of_trl(text) or _only_metadata(text) is not None


def _is_draft_of_trl(text: str) -> bool:
    """Whether a page is what TRL's trainers write beside each checkpoint: its sections, and no others."""
    titles = re.findall(r"^#+ (.+?)[ \t]*$", text, re.MULTILINE)
    fitting = len(titles) == len(_TRL_PARTS) and all(map(str.startswith, titles, _TRL_PARTS))
    return _TRL in text and fitting


def bare_metadata(file: Path) -> dict[str, Any]:
    """The metadata of a README.md that holds nothing else (a licence that was set on the Hub's page); else none."""
    return _only_metadata(_text_of(file)) or {}


def _text_of(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def _only_metadata(text: str) -> dict[str, Any] | None:
    """The metadata of a page that holds nothing else; None if it holds more, or what is no metadata."""
    if not text.strip():
        return {}
    page = _METADATA.fullmatch(text)
    if page is None or len(text) > _LONGEST:
        return None
    if not page.group(1).strip():
        return {}
    try:
        data = ModelCard(f"---\n{page.group(1)}\n---\n").data.to_dict()
    except Exception:  # whatever a YAML parser makes of it: it is left alone then
        return None
    return data if data and all(isinstance(key, str) for key in data) else None


def merged(card: ModelCard, theirs: Mapping[str, Any], given: Collection[str] = ()) -> ModelCard:
    """Our card with the metadata that somebody set before: theirs stay, but for keys that were given now; lists add
    up.
    """
    if not theirs:
        return card
    body = unmarked(str(card))
    page = _METADATA.match(body)
    data = merged_metadata(ModelCard(body).data.to_dict(), theirs, given)
    return marked(f"---\n{yaml_dump(data, sort_keys=False)}---\n\n{body[page.end() :] if page is not None else body}")


def merged_metadata(ours: Mapping[str, Any], theirs: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """Our metadata with theirs, as in `merged`."""
    data = dict(ours)
    for key, value in theirs.items():
        if key in _LISTS and key in data:
            named = [entry for entry in _many(value) if isinstance(entry, str)]
            data[key] = list(dict.fromkeys([*_many(data[key]), *named]))
        elif key not in given and (key not in data or key in _THEIRS):
            data[key] = value
    return data


def _many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _digest(body: str) -> str:
    return hashlib.sha256(body.strip().encode()).hexdigest()


def kept_message(where: Any, how: str) -> str:
    """What is told of a README.md that stays."""
    return (
        f"{plain(where)} was written or edited by somebody, so it stays as it is, and the new card is not written. "
        f"To replace it: {how}."
    )
