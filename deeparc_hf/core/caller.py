"""Warnings that name the line of the user's code from which the package was called."""

from __future__ import annotations

import inspect
import warnings

from ..errors import DeepArcWarning

__all__ = ["warn_caller"]

# what may stand between a user's line and the package: a Trainer that calls its callbacks, say
_BETWEEN = ("deeparc_hf", "accelerate", "contextlib", "peft", "torch", "transformers")


def warn_caller(text: str, category: type[Warning] = DeepArcWarning) -> None:
    """Warn at the innermost line that is neither the package's nor of a library that calls it, however deep the reason
    is found.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
