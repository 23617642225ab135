"""Errors and warnings of deeparc_hf: one base class, each error also the builtin that one would expect.

Every message says what was wrong, what was found, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "CalibrationError",
    "CalibrationWarning",
    "ConfigError",
    "DeepArcError",
    "DeepArcWarning",
    "LaunchError",
    "MissingDependencyError",
    "PlanError",
    "RecordError",
    "RegistryError",
    "SparsityError",
    "SurgeryError",
    "UnsupportedModelError",
]


class DeepArcError(Exception):
    """Base of every error that deeparc_hf raises on purpose."""


class ConfigError(DeepArcError, ValueError):
    """A setting has a value that makes no sense."""


class CalibrationError(DeepArcError, ValueError):
    """The calibration data, or the activations it produced, cannot be compared."""


class PlanError(DeepArcError, ValueError):
    """A plan cannot be made from these similarities, or does not fit this model."""


class RecordError(DeepArcError, ValueError):
    """The pruning record of a checkpoint is missing, malformed or does not fit the model."""


class RegistryError(DeepArcError, LookupError):
    """A name is not registered, is registered twice, or is not a valid name."""


class SurgeryError(DeepArcError, RuntimeError):
    """Blocks could not be removed; the model is as it was before."""


class SparsityError(DeepArcError, RuntimeError):
    """Weights that were zeroed are not zero any more, or cannot be kept zero."""


class UnsupportedModelError(DeepArcError, TypeError):
    """The model is of a kind that deeparc_hf cannot prune correctly."""


class LaunchError(DeepArcError, RuntimeError):
    """A script that was launched has failed."""


class MissingDependencyError(DeepArcError, ImportError):
    """An optional package is needed for what was asked."""


class DeepArcWarning(UserWarning):
    """Base of every warning that deeparc_hf issues."""


class CalibrationWarning(DeepArcWarning):
    """The calibration data can be used, but the result may be poor; the message says how to mend it."""
