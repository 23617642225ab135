"""Warnings that name the line of the user's code from which the package was called."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

from ..errors import DeepArcWarning

__all__ = ["warn_caller"]

_PACKAGE = str(Path(__file__).parents[1])


def warn_caller(text: str, category: type[Warning] = DeepArcWarning) -> None:
    """Warn at the innermost line outside the package, however deep in it the reason is found.

    To become `skip_file_prefixes` of `warnings.warn` when Python 3.11 is no longer supported.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
