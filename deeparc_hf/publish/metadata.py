"""The metadata of a card: an explicit list of keys, each checked, through huggingface_hub's own classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.markdown import linked, md
from ..core.plain_text import allowed, plain
from ..reports.attempts import bare
from ..similarity import metrics as similarities
from .facts import CardFacts
from .usage import pipeline_tag, task_of
from .vocabulary import LICENSES, METRICS

__all__ = ["Given", "hub_id", "metadata"]

UNKNOWN = "unknown"
_WORD = re.compile(r"[\w.,:%+/ \[\]-]{1,100}", re.ASCII)


@dataclass(frozen=True)
class Given:
    """What only the person who publishes a model can tell, and what was looked up on the Hub.

    Attributes:
        name: the model's name.
        base_model: Hub id of the model that was pruned, where the record does not know it.
        license, license_name, license_link: of the model; default: that of the base model, where the Hub tells it.
        language, tags, tasks: metadata of the same names (tasks: the pipeline tag).
        datasets: Hub ids of the data.
        dataset_names: how to call them.
        dataset_configs: their configurations.
        command: how the model was made.
        licences: by Hub id ("org/name", "datasets/org/name"), as their cards on the Hub tell.
    """

    name: str | None = None
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    tasks: Sequence[str] = ()
    datasets: Sequence[str] = ()
    dataset_names: Sequence[str] = ()
    dataset_configs: Sequence[str] = ()
    command: str | None = None
    licences: Mapping[str, str] = field(default_factory=dict)

    def base_of(self, facts: CardFacts) -> str | None:
        """Hub id of the model that was pruned first; None where it is not known."""
        return hub_id(self.base_model or facts.record.base_model)

    def datasets_of(self, facts: CardFacts) -> list[str]:
        """Hub ids of the data, each once."""
        known = [*self.datasets, *(found["id"] for found in facts.data.values() if "id" in found)]
        return [name for name in dict.fromkeys(map(hub_id, known)) if name is not None]

    def name_of(self, facts: CardFacts, data: Mapping[str, Any]) -> str | None:
        """The Hub id of some data: as the data set itself knows it, else as it was told, where it is clear which data
        is meant.
        """
        if "id" in data:
            return str(data["id"])
        return self.datasets[0] if len(self.datasets) == 1 and self.tells(facts) else None

    def words_of(self, facts: CardFacts, data: Mapping[str, Any]) -> list[str]:
        """The name of some data for people and its configuration, as Markdown; empty where it has no name."""
        told = "id" not in data and self.tells(facts)
        known = self.name_of(facts, data)
        name = (
            linked(known, "datasets/")
            if known
            else md(self.dataset_names[0])
            if told and len(self.dataset_names) == 1
            else ""
        )
        config = data.get("config") or (self.dataset_configs[0] if told and name and self.dataset_configs else None)
        return [part for part in (name, md(config) if config else "") if part]

    def tells(self, facts: CardFacts) -> bool:
        """Whether what was told of the data is of the data that was evaluated on: of several sets it is not known which
        one is meant.

        The splits of one data set (validation and test, say) are not several.
        """
        unnamed = [(e.split_of(next(iter(e.metrics), "")), e.data) for e in facts.final if "id" not in e.data]
        return all(data == other for split, data in unnamed for same, other in unnamed if split == same)


def hub_id(name: str | None) -> str | None:
    """The name without a revision, if it can be a Hub id."""
    if not name:
        return None
    name = name.partition("@")[0]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def metadata(facts: CardFacts, given: Given) -> ModelCardData:
    """The metadata of the card."""
    base = given.base_of(facts)
    results = _results(facts, given)
    kinds = list(dict.fromkeys(result.metric_type for result in results if not result.metric_type.endswith("loss")))
    known: dict[str, Any] = {
        "language": list(given.language) or None,
        "license": given.license or allowed(given.licences.get(base or ""), LICENSES),
        "license_name": given.license_name,
        "license_link": given.license_link,
        "library_name": facts.library,
        "pipeline_tag": given.tasks[0] if given.tasks else pipeline_tag(facts),
        "tags": _tags(facts, given),
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": given.datasets_of(facts) or None,
        "metrics": kinds or None,
    }
    known = {key: value for key, value in known.items() if value is not None}
    if results:
        known.update(model_name=plain(given.name or "model", 96), eval_results=results)
    return ModelCardData(**known)


def _tags(facts: CardFacts, given: Given) -> list[str]:
    tags = ["deeparc"]
    if facts.removed:
        metric = allowed(
            (facts.config or {}).get("similarity"), list(similarities.names())
        )  # a public word: of those that are known
        tags += ["pruned", "depth-pruning", *([metric] if metric else [])]
    if facts.zeros is not None:
        tags += ["sparse", *([plain(facts.sparsity.config.method, 40)] if facts.sparsity is not None else [])]
    return list(dict.fromkeys([*tags, *(plain(tag, 80) for tag in given.tags)]))


def _results(facts: CardFacts, given: Given) -> list[EvalResult]:
    """Every metric that was measured of the model as it is; of one that is known of test data, not that of validation
    data too.
    """
    task = given.tasks[0] if given.tasks else task_of(facts)[0] or "other"
    results = []
    keys = {key for evaluation in facts.final for key in evaluation.metrics}
    for evaluation in facts.final:
        data = evaluation.data
        given_here = "id" not in data and given.tells(facts)
        known = hub_id(given.name_of(facts, data))
        name = given.dataset_names[0] if given.dataset_names and given_here else known or UNKNOWN
        config = _word(data.get("config")) or (
            given.dataset_configs[0] if given.dataset_configs and given_here else None
        )
        for key, value in evaluation.metrics.items():
            if key.startswith("eval_") and f"test_{key.removeprefix('eval_')}" in keys:
                continue
            kind, called = metric_words(key)
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=known or UNKNOWN,
                    dataset_name=plain(name, 96),
                    dataset_config=config,
                    dataset_split=_word(evaluation.split_of(key)),
                    dataset_revision=_word(data.get("revision")),
                    metric_type=kind,
                    metric_name=called,
                    metric_value=value,
                )
            )
    return results


def _word(value: str | None) -> str | None:
    """The name of a configuration, a split or a commit, if it can be one."""
    return value if value is not None and _WORD.fullmatch(value) else None


def metric_words(key: str) -> tuple[str, str]:
    """Type and name of a metric for the Hub. The type is one that it knows, where the name ends in one: a set's name
    may stand before.
    """
    name = plain(bare(key), 80)
    known = [metric for metric in METRICS if name == metric or name.endswith(f"_{metric}")]
    return max(known, key=len, default=name), name
