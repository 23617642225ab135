"""The metadata of a card: an explicit list of keys, each checked, through huggingface_hub's own classes."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData, constants

from ..core.plain_text import allowed, plain
from ..reports.attempts import bare
from ..similarity import metrics as similarities
from .content import CardContent
from .usage import NOT_ON_THE_HUB, task_of
from .vocabulary import LICENSES, METRICS, hub_id

__all__ = ["licences", "metadata"]

UNKNOWN = "unknown"
_TIMEOUT = 5.0  # seconds
_log = logging.getLogger(__name__)
_WORD = re.compile(r"[\w.,:%+/ \[\]-]{1,100}", re.ASCII)


def metadata(content: CardContent) -> ModelCardData:
    """The metadata of the card."""
    given, base, task = content.given, content.base, task_of(content)[0]
    results = _results(content)
    kinds = list(dict.fromkeys(result.metric_type for result in results if not result.metric_type.endswith("loss")))
    known: dict[str, Any] = {
        "language": list(given.language) or None,
        "license": given.license or allowed(content.licences.get(base or ""), LICENSES),
        "license_name": given.license_name,
        "license_link": given.license_link,
        "library_name": content.library,
        "pipeline_tag": next(iter(given.tasks), None) or (None if task in NOT_ON_THE_HUB else task),
        "tags": _tags(content),
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": content.datasets or None,
        "metrics": kinds or None,
    }
    known = {key: value for key, value in known.items() if value is not None}
    if results:
        known.update(model_name=plain(content.name or "model", 96), eval_results=results)
    return ModelCardData(**known)


def _tags(content: CardContent) -> list[str]:
    tags = ["deeparc"]
    if content.removed:
        # a public word: of those that are known
        config = content.config or {}
        metric = allowed(config.get("similarity"), list(similarities.names())) if not config.get("search") else "search"
        tags += ["pruned", "depth-pruning", *([metric] if metric else [])]
    if content.record.zeros is not None:
        tags += ["sparse", *([plain(content.sparsity.config.method, 40)] if content.sparsity is not None else [])]
    tags += ["sentence-transformers"] if content.encoder else []
    return list(dict.fromkeys([*tags, *(plain(tag, 80) for tag in content.given.tags)]))


def _results(content: CardContent) -> list[EvalResult]:
    """Every metric of the model as it is; of one that is known of test data, not that of validation data too."""
    task = next(iter(content.given.tasks), None) or task_of(content)[0] or "other"
    keys = {key for evaluation in content.final for key in evaluation.metrics}
    results = []
    for evaluation in content.final:
        data, known = evaluation.data, hub_id(content.id_of(evaluation.data))
        _, given_name, given_config = content.given_for(data)
        for key, value in evaluation.metrics.items():
            if key.startswith("eval_") and f"test_{key.removeprefix('eval_')}" in keys:
                continue
            name = plain(bare(key), 80)
            # a metric that the Hub knows, where the name ends in one: a set's name may stand before
            kinds = [metric for metric in METRICS if name == metric or name.endswith(f"_{metric}")]
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=known or UNKNOWN,
                    dataset_name=plain(given_name or known or UNKNOWN, 96),
                    dataset_config=_word(data.get("config")) or given_config,
                    dataset_split=_word(evaluation.split_of(key)),
                    dataset_revision=_word(data.get("revision")),
                    metric_type=max(kinds, key=len, default=name),
                    metric_name=name,
                    metric_value=value,
                )
            )
    return results


def _word(value: str | None) -> str | None:
    """The name of a configuration, a split or a commit, if it can be one."""
    return value if value is not None and _WORD.fullmatch(value) else None


def licences(content: CardContent) -> dict[str, str]:
    """The licences of base model ("org/name") and data ("datasets/org/name"), where the Hub is there and knows them."""
    if constants.HF_HUB_OFFLINE:
        return {}
    names = [*filter(None, [content.base]), *(f"datasets/{each}" for each in content.datasets)]
    return {name: licence for name in names if (licence := _licence(name)) is not None}


@lru_cache(maxsize=256)
def _licence(name: str) -> str | None:
    kind, repo_id = ("dataset", name.removeprefix("datasets/")) if name.startswith("datasets/") else ("model", name)
    try:
        data = HfApi().repo_info(repo_id, repo_type=kind, timeout=_TIMEOUT).card_data
    except Exception as error:  # whatever a network does: a licence that is not known is left out
        _log.info("The licence of %s is not known: %s", name, type(error).__name__)
        return None
    licence = None if data is None else data.get("license")
    return licence if isinstance(licence, str) and licence not in ("", "unknown") else None
