"""A card's metadata as the Hub reads it: what is refused, what is doubtful, and the tags that follow from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .vocabulary import LANGUAGES_BY_NAME, LICENSES, PIPELINES, RELATIONS

_FRONT = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclass
class Verdict:
    """What the Hub says about a card; with errors, it takes no commit that holds the card."""

    metadata: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> str:
        return "\n".join(
            [*(f"- Error: {each}" for each in self.errors), *(f"- Warning: {each}" for each in self.warnings)]
        )


class _OnceLoader(yaml.SafeLoader):
    """YAML lets a key stand twice; the Hub does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key {twice[0]!r}", node.start_mark)
        return super().construct_mapping(node, deep)


def judge(content: str, kind: str = "models") -> Verdict:
    """Validate the metadata block at the start of a README.md."""
    block = _FRONT.match(content)
    if not block or not block[1].strip():
        return Verdict(warnings=["empty or missing yaml metadata in repo card"])
    try:
        metadata = yaml.load(block[1], Loader=_OnceLoader)  # a SafeLoader with one more rule
    except yaml.YAMLError as error:
        return Verdict(errors=[f"Invalid YAML: {error}"])
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        return Verdict(errors=["the metadata must be a mapping with strings as keys"])
    verdict = Verdict(metadata)
    for key, check in _CHECKS.items():
        if metadata.get(key) is not None:
            verdict.errors.extend(check(key, metadata[key]))
    if kind == "spaces" and "sdk" not in metadata:
        verdict.errors.append('"sdk" is required')
    return verdict


def metadata_of(content: str) -> dict[str, Any]:
    """The metadata of a card that was taken, or nothing."""
    verdict = judge(content)
    return {} if verdict.errors else verdict.metadata


def _text(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f'"{key}" must be a string'


def _each(check: Callable[[str, Any], Iterator[str]], *, single: bool = True) -> Callable[[str, Any], Iterator[str]]:
    """A check of each item; a bare item may stand for a list of one where `single`."""

    def checked(key: str, value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield from check(f"{key}[{index}]", item)
        elif single:
            yield from check(key, value)
        else:
            yield f'"{key}" must be an array'

    return checked


def _one_of(words: frozenset[str] | tuple[str, ...]) -> Callable[[str, Any], Iterator[str]]:
    def checked(key: str, value: Any) -> Iterator[str]:
        if not isinstance(value, str) or value not in words:
            yield f'"{key}" must be one of [{", ".join(sorted(words))}]'

    return checked


def _repo_id(where: str) -> Callable[[str, Any], Iterator[str]]:
    def checked(key: str, value: Any) -> Iterator[str]:
        if not isinstance(value, str):
            yield f'"{key}" must be a string'
        elif not _REPO_ID.fullmatch(value):
            yield f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co/{where}.'

    return checked


def _language(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f'"{key}" must be a string'
    elif not _LANGUAGE.fullmatch(value) and value not in LANGUAGES_BY_NAME:
        yield (
            f'"{key}" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code (two or three '
            "letters)"
        )


def _model_index(key: str, value: Any) -> Iterator[str]:
    if not isinstance(value, list):
        yield f'"{key}" must be an array'
        return
    for index, model in enumerate(value):
        place = f"{key}[{index}]"
        yield from _required(place, model, "name")
        results = model.get("results") if isinstance(model, Mapping) else None
        if not isinstance(results, list):
            yield f'"{place}.results" must be an array'
            continue
        for number, result in enumerate(results):
            yield from _result(f"{place}.results[{number}]", result)


def _result(place: str, result: Any) -> Iterator[str]:
    parts = result if isinstance(result, Mapping) else {}
    yield from _required(f"{place}.task", parts.get("task"), "type")
    yield from _required(f"{place}.dataset", parts.get("dataset"), "type", "name")
    metrics = parts.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f'"{place}.metrics" must be an array with at least one item'
        return
    for index, metric in enumerate(metrics):
        yield from _required(f"{place}.metrics[{index}]", metric, "type")
        if not isinstance(metric, Mapping) or metric.get("value") is None:
            yield f'"{place}.metrics[{index}].value" is required'


def _required(place: str, value: Any, *names: str) -> Iterator[str]:
    for name in names:
        found = value.get(name) if isinstance(value, Mapping) else None
        if not isinstance(found, str) or not found:
            yield f'"{place}.{name}" is required and must be a string'


_CHECKS: dict[str, Callable[[str, Any], Iterator[str]]] = {
    "base_model": _each(_repo_id("models")),
    "base_model_relation": _one_of(RELATIONS),
    "datasets": _each(_repo_id("datasets")),
    "language": _each(_language),
    "library_name": _text,
    "license": _each(_one_of(LICENSES)),
    "license_link": _text,
    "license_name": _text,
    "metrics": _each(_text),
    "model-index": _model_index,
    "model_name": _text,
    "pipeline_tag": _one_of(PIPELINES),
    "tags": _each(_text, single=False),
}


def tags_of(metadata: Mapping[str, Any]) -> list[str]:
    """The tags that a repository's page shows, but for those that follow from its files."""
    relation = metadata.get("base_model_relation")
    bases = [f"base_model:{base}" for base in _listed(metadata, "base_model")]
    bases += [f"base_model:{relation}:{base}" for base in _listed(metadata, "base_model") if relation]
    found = [
        metadata.get("library_name"),
        metadata.get("pipeline_tag"),
        *_listed(metadata, "tags"),
        *_listed(metadata, "language"),
    ]
    found += [f"dataset:{each}" for each in _listed(metadata, "datasets")] + bases
    found += [f"license:{each}" for each in _listed(metadata, "license")]
    return list(dict.fromkeys(tag for tag in found if tag))


def _listed(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]
