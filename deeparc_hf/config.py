"""What is asked for: the settings of a pruning, validated, with help for each, JSON in and out."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigError, DeepArcWarning, RegistryError
from .similarity import ROW_KINDS, metrics

__all__ = ["MPruneConfig"]

DEFAULT_THRESHOLD = 0.98


def _setting(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class MPruneConfig:
    """Settings of similarity pruning.

    Exactly one of `threshold`, `num_blocks` and `keep_ratio` counts; with none given the threshold is 0.98.

    Raises:
        ConfigError: if a value makes no sense; the message says which values do.
    """

    threshold: float | None = _setting(
        None, "Blocks this similar to their cluster's leader are redundant; in (0, 1]. Default 0.98 where no target is given."
    )
    k: int = _setting(1, "Stride of removal: of each cluster members 1, 1+k, 1+2k, ... go. 1 leaves the leader only.")
    freeze: str = _setting(
        "none",
        "'partial' trains the kept blocks beside each removal site and freezes the others, and embeddings and stem (a tied head too).",
        choices=("none", "partial"),
    )
    similarity: str = _setting("cka", "Similarity metric, by its registered name.")
    rows: str | None = _setting(
        None, "Rows that are compared: 'tokens', 'mean' or 'first'; default: what the metric recommends.", choices=ROW_KINDS
    )
    linkage: str = _setting(
        "leader",
        "'leader': a block joins while similar to the cluster's first block; 'adjacent': while similar to the block before it.",
        choices=("leader", "adjacent"),
    )
    keep: str = _setting("leader", "Which member of a cluster is sure to stay: its 'leader' or its 'last'.", choices=("leader", "last"))
    calibration_samples: int = _setting(512, "Number of calibration samples to compare blocks on.")
    protect: tuple[str, ...] = _setting((), "Patterns (fnmatch) of module paths of blocks that must stay, e.g. 'encoder.layer.11'.")
    min_blocks: int = _setting(1, "Fewest blocks that stay in each stack.")
    num_blocks: int | dict[str, int] | None = _setting(
        None, "Target: how many blocks stay, over all stacks, or by stack name; the threshold is then found."
    )
    keep_ratio: float | None = _setting(None, "Target: the share of all blocks that stays, in (0, 1]; the threshold is then found.")
    seed: int = _setting(0, "Seed of the choice of calibration samples from a data set.")

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            object.__setattr__(self, "protect", (self.protect,))
        elif isinstance(self.protect, Sequence):
            object.__setattr__(self, "protect", tuple(self.protect))
        self._check_types()
        self._check_target()
        if self.target == "threshold" and self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        self._check_threshold()
        for name in ("k", "calibration_samples", "min_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        for spec in dataclasses.fields(self):
            choices, value = spec.metadata.get("choices"), getattr(self, spec.name)
            if choices and value is not None and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{spec.name} must be one of {', '.join(map(repr, choices))}, found {value!r}.{hint}")
        try:
            metrics.get(self.similarity)
        except RegistryError as error:
            raise ConfigError(f"similarity: {error}") from None

    @property
    def target(self) -> str:
        """Which of "threshold", "num_blocks" and "keep_ratio" counts."""
        return next((n for n in ("num_blocks", "keep_ratio") if getattr(self, n) is not None), "threshold")

    @property
    def effective_rows(self) -> str:
        """The rows that are compared."""
        return self.rows or metrics.get(self.similarity).rows

    def replace(self, **settings: Any) -> MPruneConfig:
        """A copy with other settings. Giving one of threshold, num_blocks and keep_ratio unsets the other two."""
        targets = ("threshold", "num_blocks", "keep_ratio")
        if any(settings.get(name) is not None for name in targets):
            settings = {**dict.fromkeys(targets), **settings}
        self._refuse_unknown(settings)
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "protect": list(self.protect)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MPruneConfig:
        """The inverse of `to_dict`. Settings that this version does not know are left out, with a warning."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"Settings are an object of names and values, found {type(data).__name__}.")
        known = {spec.name for spec in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            warnings.warn(
                f"Settings that this version of deeparc_hf does not know are ignored: {', '.join(unknown)}. The file may come from a newer "
                "version: pip install -U deeparc_hf.",
                DeepArcWarning,
                stacklevel=2,
            )
        return cls(**{key: value for key, value in data.items() if key in known})

    def to_json(self) -> str:
        """The settings as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> MPruneConfig:
        """Read from a JSON text, or from the file at a path."""
        text = (
            text_or_path
            if isinstance(text_or_path, str) and text_or_path.lstrip().startswith("{")
            else Path(text_or_path).read_text("utf-8")
        )
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"These settings are not JSON: {error}.") from error
        return cls.from_dict(data)

    @classmethod
    def from_settings(cls, config: MPruneConfig | None, settings: Mapping[str, Any]) -> MPruneConfig:
        """A config from a config object or from keyword settings (as `MPruneCallback` takes them), or both."""
        cls._refuse_unknown(settings)
        if config is None:
            return cls(**settings)
        if not isinstance(config, cls):
            raise ConfigError(
                f"config must be an {cls.__name__}, found {type(config).__name__}. Give settings by keyword, or an {cls.__name__}."
            )
        return config.replace(**settings) if settings else config

    @classmethod
    def _refuse_unknown(cls, settings: Mapping[str, Any]) -> None:
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"{name!r} is not a setting of {cls.__name__}.{hint} Settings: {', '.join(known)}.")

    def _check_types(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if not _fits(value, hints[spec.name]):
                raise ConfigError(f"{spec.name} must be {_words(hints[spec.name])}, found {value!r} ({type(value).__name__}).")

    def _check_target(self) -> None:
        given = [name for name in ("threshold", "num_blocks", "keep_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"Exactly one of threshold, num_blocks and keep_ratio counts, found {' and '.join(given)}. Give one of them.")
        counts = self.num_blocks.values() if isinstance(self.num_blocks, dict) else [self.num_blocks]
        if self.num_blocks is not None and (not counts or min(counts) < 1):
            raise ConfigError(f"num_blocks counts the blocks that stay, so it must be at least 1, found {self.num_blocks!r}.")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio must be in (0, 1], found {self.keep_ratio}.{_percent_hint(self.keep_ratio)}")

    def _check_threshold(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConfigError(f"threshold must be in (0, 1], found {_short(self.threshold)}.{_percent_hint(self.threshold)}")


def _short(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e300 else "a huge number"


def _percent_hint(value: float) -> str:
    return f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(isinstance(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        key, item = typing.get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    if hint is float:
        # an int may be too large for a float
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (isinstance(value, int) or math.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = ["None" if o is type(None) else o.__name__ if isinstance(o, type) and not typing.get_args(o) else str(o) for o in options]
    return " or ".join(names)
