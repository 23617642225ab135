"""The errors: one base, each also the builtin that one would catch without knowing deeparc_hf."""

from __future__ import annotations

import inspect

import pytest

from deeparc_hf import errors
from deeparc_hf.errors import DeepArcError, DeepArcWarning

CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
ERRORS = [value for value in CLASSES.values() if not issubclass(value, Warning) and value is not DeepArcError]
WARNINGS = [value for value in CLASSES.values() if issubclass(value, Warning)]

EXPECTED = {
    "CalibrationError": ValueError,
    "ConfigError": ValueError,
    "MissingDependencyError": ImportError,
    "PlanError": ValueError,
    "RecordError": ValueError,
    "RegistryError": LookupError,
    "SparsityError": RuntimeError,
    "SurgeryError": RuntimeError,
    "UnsupportedModelError": TypeError,
}


def test_all_is_sorted_and_complete():
    assert errors.__all__ == sorted(errors.__all__)
    assert set(errors.__all__) == set(CLASSES)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_error_has_the_base_a_builtin_and_a_docstring(error):
    assert issubclass(error, DeepArcError)
    builtin = [
        base
        for base in error.__mro__
        if base.__module__ == "builtins" and base not in (Exception, BaseException, object)
    ]
    assert builtin, f"{error.__name__} is no builtin error too"
    assert error.__doc__


@pytest.mark.parametrize(("name", "builtin"), EXPECTED.items())
def test_error_is_caught_as_its_builtin(name, builtin):
    with pytest.raises(builtin, match=r"^what to do$"):
        raise CLASSES[name]("what to do")


@pytest.mark.parametrize("warning", WARNINGS, ids=lambda w: w.__name__)
def test_warning_can_be_silenced_by_its_base(warning):
    assert issubclass(warning, DeepArcWarning)
    assert issubclass(warning, UserWarning)
    assert not issubclass(warning, DeepArcError)
