"""A process that tries types, or timm's families, for `python -m tests.census`."""

from __future__ import annotations

import warnings
from typing import Any

from .table import row_of
from .timm_families import try_family
from .trial import Loaders, try_type

__all__ = ["begin", "family_row", "row"]

_loaders: list[Loaders] = []  # of this process


def begin() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _loaders.append(Loaders.started())


def row(kind: str) -> tuple[str, dict[str, Any], str]:
    found = try_type(kind, _loaders[0])
    return kind, row_of(found), found.verdict


def family_row(family: str) -> tuple[str, dict[str, Any]]:
    return family, try_family(family, _loaders[0])
