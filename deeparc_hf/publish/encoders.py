"""Cards of sentence encoders: sentence-transformers writes one of its own, which stays, and ours is added to it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump

from ..core.compat import card_of_encoder
from ..core.sentence_encoders import MODULES
from .merging import made_by_us, marked, merged_metadata, unmarked

__all__ = ["TASKS", "joined", "kind_of_folder", "may_add", "their_card", "their_page"]

# task of the Hub by kind, as sentence-transformers' own cards have it
TASKS = {
    "SentenceTransformer": "sentence-similarity",
    "SparseEncoder": "feature-extraction",
    "CrossEncoder": "text-ranking",
}
_THEIRS = "[sentence-transformers](https://www.SBERT.net)"  # in the first sentence of every card of theirs
_BEGIN, _END = "<!-- pruning: begin -->", "<!-- pruning: end -->"
_OURS = re.compile(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", re.DOTALL)
_METADATA = re.compile(r"\s*---[ \t]*\r?\n.*?\r?\n---[ \t]*\r?\n", re.DOTALL)
_PLACEHOLDER = re.compile(r'"(sentence_transformers|cross_encoder|sparse_encoder)_model_id"')
# in our part: the name that was put into their code in place of theirs, for when the card is made under another
_NAMED = re.compile(r"<!-- pruning: named (\w+) (.+?) -->")
_USAGE, _REST = "\n## Use it\n", "\n## What was removed\n"
_RESULTS = "model-index"
_FENCE = re.compile(r"^(```|~~~)")


def kind_of_folder(folder: Path) -> str | None:
    """SentenceTransformer, SparseEncoder or CrossEncoder; None where the folder holds none of them."""
    if not (folder / MODULES).is_file():
        return None
    try:
        told = json.loads((folder / "config_sentence_transformers.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        told = None
    return told if told in TASKS else "SentenceTransformer"  # which version 4 does not tell


def their_page(text: str) -> str | None:
    """A card of sentence-transformers, without what was added to it; None if it is none."""
    if _THEIRS not in text:
        return None
    found = _NAMED.search(text)
    page = _OURS.sub("\n\n", unmarked(text)).rstrip() + "\n"
    return page if found is None else page.replace(f"({found[2]})", f'("{found[1]}_model_id")')


def may_add(file: Path) -> bool:
    """Whether a README.md is a card of sentence-transformers, which holds none of ours or one that nobody has edited
    since.
    """
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    return _THEIRS in text and (_BEGIN not in text or made_by_us(text))


def their_card(model: Any) -> str | None:
    """The card that sentence-transformers makes of a live model; None where it cannot."""
    text = card_of_encoder(model)
    return None if text is None else their_page(text)


def joined(ours: ModelCard, theirs: str, repo_id: str, given: Collection[str] = ()) -> ModelCard:
    """Their card with ours in it: its first screen after theirs, the rest at the end. Their metadata stays, but for
    keys that were given now; tags, data and results add up.

    Args:
        theirs: as `their_page` gives it.
        repo_id: the repository, for the code in their card.
        given: keys of the metadata that were given now.
    """
    unnamed = _PLACEHOLDER.search(theirs)
    name = json.dumps(repo_id)
    theirs = _PLACEHOLDER.sub(lambda found: name, theirs)
    head, title, body = _parts(theirs)
    page = unmarked(str(ours))
    first, _, rest = _METADATA.sub("", page, count=1).partition(_USAGE)
    usage, _, details = rest.partition(_REST)
    first = first.strip().partition("\n")[2].strip()  # without its title
    # whether it is the card of the model that was loaded, and its code loads that one
    of_another = unnamed is None and repo_id not in theirs
    if of_another:
        first += f"\n\n{usage.strip()}\n\nWhat follows was written of the model before it was pruned."
    link = "What was removed, and how, stands under [Pruning](#pruning)."
    parts = [
        title,
        _block(f"{first}\n\n{link}"),
        body.strip(),
        _block(f"## Pruning\n\n#{_REST.strip()}\n{_demoted(details.rstrip())}{_noted(unnamed, name)}"),
    ]
    data = _metadata(ModelCard(page).data.to_dict(), {**head, **({_RESULTS: None} if of_another else {})}, given)
    text = "\n\n".join(part for part in parts if part)
    card = ModelCard(f"---\n{yaml_dump(data, sort_keys=False)}---\n\n{text}\n")  # which writes metadata its own way
    return marked(str(card))


def _metadata(ours: dict[str, Any], theirs: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Both, theirs first; of a result that both tell, ours."""
    results = [_results_of(data) for data in (theirs, ours)]
    known = {_key(result) for result in results[1]}
    data = merged_metadata(ours, {key: value for key, value in theirs.items() if key != _RESULTS}, given)
    tags = [*theirs.get("tags", []), *data.get("tags", [])]
    data["tags"] = list(dict.fromkeys(tag for tag in tags if isinstance(tag, str)))
    together = [*(result for result in results[0] if _key(result) not in known), *results[1]]
    if together:
        data[_RESULTS] = [{"name": _name_of(ours) or _name_of(theirs), "results": together}]
    return data


def _results_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of a model-index, one metric each."""
    entries = [result for model in data.get(_RESULTS) or [] for result in model.get("results", [])]
    return [{**entry, "metrics": [metric]} for entry in entries for metric in entry.get("metrics", [])]


def _key(result: Mapping[str, Any]) -> tuple[str, float | None]:
    (metric,) = result["metrics"]
    value = metric.get("value")
    return str(metric.get("type")), round(value, 9) if isinstance(value, float) else None


def _name_of(data: Mapping[str, Any]) -> str:
    return next((str(model["name"]) for model in data.get(_RESULTS) or [] if model.get("name")), "")


def _parts(page: str) -> tuple[Mapping[str, Any], str, str]:
    """Metadata, what stands before the first section, and the sections."""
    found = _METADATA.match(page)
    head = {} if found is None else ModelCard(found.group(0)).data.to_dict()
    text = page[found.end() :] if found is not None else page
    start = re.search(r"^## ", text, re.MULTILINE)
    place = len(text) if start is None else start.start()
    return head, text[:place].strip(), text[place:]


def _noted(placeholder: re.Match[str] | None, name: str) -> str:
    """A comment that tells which name stands in their code; none where a comment cannot hold it."""
    if placeholder is None or "--" in name or ">" in name:
        return ""
    return f"\n\n<!-- pruning: named {placeholder[1]} {name} -->"


def _block(text: str) -> str:
    return f"{_BEGIN}\n\n{text}\n\n{_END}"


def _demoted(text: str) -> str:
    """Headings one level lower; code stays as it is."""
    lines, inside = [], False
    for line in text.split("\n"):
        inside ^= bool(_FENCE.match(line))
        lines.append(f"#{line}" if line.startswith("##") and not inside else line)
    return "\n".join(lines)
