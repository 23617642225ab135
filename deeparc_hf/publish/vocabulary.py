"""What only the person who publishes a model can tell, in words that the Hub takes: others are refused here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..core.plain_text import did_you_mean, quoted
from ..errors import ConfigError

__all__ = ["ERRORS", "LICENSES", "METRICS", "Given", "check_language", "check_license", "hub_id"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = _words(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw openrail openrail++ osl-3.0 other pddl postgresql unknown
    unlicense wtfpl zlib
    """
)
ERRORS = _words("brier_score cer character loss mae mape mse perplexity rmse smape ter wer")  # the lower the better
TASKS = _words(
    """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition depth-estimation
    document-question-answering feature-extraction fill-mask graph-ml image-classification image-feature-extraction
    image-segmentation image-text-to-image image-text-to-text image-text-to-video image-to-3d image-to-image
    image-to-text image-to-video keypoint-detection mask-generation multiple-choice object-detection other
    question-answering reinforcement-learning robotics sentence-similarity summarization table-question-answering
    table-to-text tabular-classification tabular-regression tabular-to-text text-classification text-generation
    text-ranking text-retrieval text-to-3d text-to-audio text-to-image text-to-speech text-to-video
    time-series-forecasting token-classification translation unconditional-image-generation video-classification
    video-text-to-text video-to-video visual-document-retrieval visual-question-answering voice-activity-detection
    zero-shot-classification zero-shot-image-classification zero-shot-object-detection
    """
)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_LONGEST_TAG = 80
# names of metrics that the Hub and the evaluate library know
METRICS = _words(
    """
    accuracy balanced_accuracy bertscore bleu brier_score cer character chrf exact_match f1 loss mae mape map
    matthews_correlation mean_iou meteor mse pearsonr perplexity precision recall rmse roc_auc rouge1 rouge2 rougeL
    rougeLsum sacrebleu sari smape spearmanr ter top_5_accuracy wer
    """
)


def check_license(license: str | None) -> None:
    """Refuse a licence that the Hub would refuse, by a ConfigError that names the nearest id."""
    if license is None or license in LICENSES:
        return
    raise ConfigError(
        f"The Hub knows no licence {quoted(license)}.{did_you_mean(license.lower(), LICENSES)} Give its id "
        "(apache-2.0, mit, cc-by-4.0, ...; they are listed at https://huggingface.co/docs/hub/repositories-licenses), "
        "or 'other' with license_name and license_link."
    )


def check_language(languages: Iterable[str]) -> None:
    """Refuse what is no code of a language, by a ConfigError."""
    for language in languages:
        if not _LANGUAGE.fullmatch(language):
            raise ConfigError(
                f"A language is given by its code of two or three letters (en, deu), found {quoted(language)}."
            )


@dataclass(frozen=True)
class Given:
    """What was given for a card, as `create_model_card` takes it; what the Hub would refuse is a ConfigError."""

    model_name: str | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    tags: str | Sequence[str] | None = None
    finetuned_from: str | None = None
    tasks: str | Sequence[str] | None = None
    dataset_tags: str | Sequence[str] | None = None
    dataset: str | Sequence[str] | None = None
    dataset_args: str | Sequence[str] | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        for name in ("language", "tags", "tasks", "dataset_tags", "dataset", "dataset_args"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        check_license(self.license)
        check_language(self.language or ())
        for tag in self.tags or ():
            if not 0 < len(tag) <= _LONGEST_TAG or not tag.isprintable():
                raise ConfigError(f"A tag is a visible text of at most {_LONGEST_TAG} characters, found {quoted(tag)}.")
        for task in self.tasks or ():
            if task not in TASKS:
                raise ConfigError(
                    f"The Hub knows no task {quoted(task)}.{did_you_mean(task, TASKS)} They are listed at "
                    "https://huggingface.co/tasks."
                )
        for name in (self.finetuned_from, *(self.dataset_tags or ())):
            if name is not None and (hub_id(name) is None or os.path.exists(name)):
                raise ConfigError(
                    f"{name!r} is not the id of a repository on the Hub (ORG/NAME). A card must not name local paths."
                )

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """What was given among the arguments of a function that names them as the fields are named."""
        return cls(**{spec.name: arguments[spec.name] for spec in dataclasses.fields(cls)})

    @property
    def keys(self) -> set[str]:
        """The keys of a card's metadata that were given."""
        called = {"finetuned_from": "base_model", "tasks": "pipeline_tag"}
        given = [spec.name for spec in dataclasses.fields(self) if getattr(self, spec.name)]
        return {called.get(name, name) for name in given}


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
