"""Text of others in a Markdown page: names of models, data and labels may hold markup, and must do no harm."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .plain_text import LIMIT, plain

__all__ = ["code", "fenced", "folded", "json_block", "linked", "made_with", "md", "plain", "shared", "table"]

_ENTRIES, _DEPTH = 64, 6  # of data that is shown as JSON

# an underscore within a word is no markup
_PUNCTUATION = re.compile(r"([\\`*{}\[\]()#+!|<>~&$:@^=-]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_BAR = re.compile(r"(?<!\\)\|")  # one that is not escaped yet
_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)


def md(value: Any, limit: int = LIMIT) -> str:
    """Text that Markdown shows as it is: nothing in it is markup, HTML or a link."""
    shown = plain(value, limit)
    if (
        re.fullmatch(r"([A-Za-z0-9 ,;./'%-]|(?<=[A-Za-z0-9])_(?=[A-Za-z0-9]))*", shown)
        and not re.match(r"\s*(-|\d+[.)])\s", shown)
        and "www." not in shown.lower()
    ):
        return shown  # nothing to escape, and easier to read as it is
    return re.sub(r"(?i)www\.", r"www\\.", _PUNCTUATION.sub(r"\\\1", shown))


def code(value: Any, limit: int = LIMIT) -> str:
    """Text as code, where code can hold it (in a table too)."""
    shown = plain(value, limit)
    return md(shown, limit) if not shown or "`" in shown or "|" in shown else f"`{shown}`"


def linked(repo_id: str | None, kind: str = "") -> str:
    """The name of a repository, with a link to it on the Hub where it can be one."""
    if repo_id is None:
        return ""
    if not _ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        return md(repo_id)
    return f"[{md(repo_id)}](https://huggingface.co/{kind}{repo_id})"


def fenced(text: str, language: str = "") -> str:
    """A block of code whose end is not in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def json_block(data: Any) -> str:
    """Data as a block of JSON, ASCII only; what is long in it is shortened."""
    return fenced(json.dumps(_short(data, _DEPTH), indent=2), "json")


def _short(data: Any, depth: int) -> Any:
    if isinstance(data, Mapping) and depth:
        return {plain(key, 60): _short(value, depth - 1) for key, value in list(data.items())[:_ENTRIES]}
    if isinstance(data, (list, tuple)) and depth:
        return [_short(value, depth - 1) for value in data[:_ENTRIES]]
    is_short = data is None or isinstance(data, (bool, float)) or (isinstance(data, int) and abs(data) < 2**63)
    return data if is_short else plain(data)


def folded(title: str, text: str) -> str:
    """A part that opens at a click; its title is ours."""
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def table(header: Sequence[str], rows: Iterable[Iterable[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table of cells that are Markdown already; columns that are not in `left` are of numbers."""
    marks = ["---" if column in left else "---:" for column in range(len(header))]
    lines = [map(_cell, header), marks, *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return _BAR.sub(r"\\|", text).replace("\n", " ")


def shared(values: Mapping[str, Any]) -> str:
    """Values as one line: "learning rate 0.0002, seed 7"."""
    return ", ".join(f"{md(key)} {md(value)}" for key, value in values.items())


def made_with(*known: Mapping[str, Any]) -> str:
    """The section of a report that lists what its figures were made with. Of ours alone: nothing in it is escaped."""
    lines = [f"- {key}: {value}" for values in known for key, value in values.items()]
    return "\n\n".join(["## Made with", "\n".join(lines)])
