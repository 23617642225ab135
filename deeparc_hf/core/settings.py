"""What all settings have in common: checks of types and choices, JSON in and out, a hint for names that are unknown."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError
from .caller import warn_caller
from .checks import MalformedError, read_json, unboxed
from .plain_text import did_you_mean, listed, quoted

__all__ = ["Settings", "percent_hint", "setting", "shown"]


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A field with its help. `trainer` marks what only a training can use; `choices` are the words that are allowed;
    `cli` is the help on the command line, where that takes less than Python does.
    """
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class Settings:
    """Base of the settings: frozen dataclasses whose fields are made by `setting`."""

    def _to_tuples(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))

    def replace(self, **settings: Any) -> Self:
        """A copy with other settings."""
        self._refuse_unknown(settings)
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Settings that this version does not know are left out, with a warning."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"Settings are an object of names and values, found {type(data).__name__}.")
        known = {spec.name for spec in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            warn_caller(
                f"Settings that this version of deeparc_hf does not know are ignored: {listed(unknown)}. The file may "
                "come from a newer version: pip install -U deeparc_hf."
            )
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self) -> str:
        """The settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> Self:
        """Read from a JSON text, or from the file at a path."""
        is_text = isinstance(text_or_path, str) and text_or_path.lstrip().startswith("{")
        try:
            return cls.from_dict(read_json(text_or_path if is_text else Path(text_or_path)))
        except MalformedError as error:
            raise ConfigError(f"These settings are not JSON: {error.__cause__ or error}.") from error

    @classmethod
    def from_settings(cls, config: Self | None, settings: Mapping[str, Any]) -> Self:
        """A config from a config object or from keyword settings (as `MPruneCallback` takes them), or both."""
        cls._refuse_unknown(settings)
        if config is None:
            return cls(**settings)
        if not isinstance(config, cls):
            kind = f"{'an' if cls.__name__[:2] == 'MP' else 'a'} {cls.__name__}"
            raise ConfigError(
                f"config must be {kind}, found {type(config).__name__}. Give settings by keyword, or {kind}."
            )
        return config.replace(**settings) if settings else config

    @classmethod
    def _refuse_unknown(cls, settings: Mapping[str, Any]) -> None:
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"{quoted(name)} is not a setting of {cls.__name__}.{did_you_mean(name, known)} "
                    f"Settings: {', '.join(known)}."
                )

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value, hint = unboxed(getattr(self, spec.name)), hints[spec.name]
            object.__setattr__(self, spec.name, value)
            takes_float = float in (hint, *typing.get_args(hint))
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{spec.name} must be a finite number, found {value}.")
            if type(value) is int and takes_float and abs(value) > 1e300:  # no float can hold it, none could be shown
                raise ConfigError(f"{spec.name} must be a finite number, found {shown(value)}.")
            if not _fits(value, hint):
                raise ConfigError(
                    f"{spec.name} must be {_words(hint)}, found {quoted(value)} ({type(value).__name__})."
                )

    def _check_choices(self, more: Mapping[str, str] | None = None) -> None:
        """Check the words of fields with choices; `more` says what else a field takes."""
        for spec in dataclasses.fields(self):
            choices, value = spec.metadata.get("choices"), getattr(self, spec.name)
            if choices and isinstance(value, str) and value not in choices:
                words = f"{', '.join(map(repr, choices))}{(more or {}).get(spec.name, '')}"
                hint = did_you_mean(value, choices)
                raise ConfigError(f"{spec.name} must be one of {words}, found {quoted(value)}.{hint}")


def shown(value: float) -> str:
    """A number in a message, short whatever it is."""
    return f"{value:g}" if abs(value) < 1e300 else "a huge number"


def percent_hint(value: float) -> str:
    """What to add to a message where a percentage may have been meant for a share; nobody means 1.5 %."""
    return f" Did you mean {value / 100:g}?" if 2 <= value <= 100 else ""


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        key, item = typing.get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:  # an int may be too large for one
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:  # written as a list, by those who do not care
        return f"a list of {_words(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
