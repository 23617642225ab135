"""What the Hub tells of the base model and the data: their licences. Without a connection nothing is told, and nothing
fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache

from huggingface_hub import HfApi, constants

__all__ = ["licences"]

_TIMEOUT = 5.0  # seconds
_log = logging.getLogger(__name__)


def licences(names: Iterable[str]) -> dict[str, str]:
    """The licences of models ("org/name") and data sets ("datasets/org/name"), where their cards name one."""
    found = {}
    for name in names:
        licence = None if constants.HF_HUB_OFFLINE else _licence(name)
        if licence is not None:
            found[name] = licence
    return found


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
