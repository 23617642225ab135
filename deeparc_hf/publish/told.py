"""What only the person who publishes a model can tell: its licence, its language, the names of its data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import ConfigError
from .vocabulary import check_language, check_license, check_tags, check_task

__all__ = ["Told", "hub_id"]


@dataclass(frozen=True)
class Told:
    """What was told for a card, as `create_model_card` takes it. Of several values a single one may be given as it is.

    Raises:
        ConfigError: if the Hub would refuse it; the message says which word is wrong.
    """

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
        check_tags(self.tags or ())
        check_task(self.tasks or ())
        for name in (self.finetuned_from, *(self.dataset_tags or ())):
            if name is not None and (hub_id(name) is None or os.path.exists(name)):
                raise ConfigError(
                    f"{name!r} is not the id of a repository on the Hub (ORG/NAME). A card must not name local paths."
                )

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """What was told among the arguments of a function that names them as the fields are named."""
        return cls(**{spec.name: arguments[spec.name] for spec in dataclasses.fields(cls)})

    @property
    def keys(self) -> set[str]:
        """The keys of a card's metadata that were told."""
        called = {"finetuned_from": "base_model", "tasks": "pipeline_tag"}
        told = [spec.name for spec in dataclasses.fields(self) if getattr(self, spec.name)]
        return {called.get(name, name) for name in told}


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
