"""What is asked for: the settings of a pruning, validated, with help for each, JSON in and out."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
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
    """A field with its help. `trainer` marks what only a training can use; `choices` are the words that are allowed."""
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class MPruneConfig:
    """Settings of similarity pruning.

    Exactly one of `threshold`, `num_blocks` and `keep_ratio` counts; with none given the threshold is 0.98. `k_max`, `iterations`,
    `start_epoch`, `retrain_epochs`, `rewind_lr` and what `max_drop` needs are of use to `MPruneCallback` only.

    Raises:
        ConfigError: if a value makes no sense; the message says which values do.
    """

    threshold: float | None = _setting(
        None, "Blocks this similar to their cluster's leader are redundant; in (0, 1]. Default 0.98 where no target is given."
    )
    k: int = _setting(1, "Stride of removal: of each cluster members 1, 1+k, 1+2k, ... go. 1 leaves the leader only.")
    k_max: int = _setting(
        3, "Largest stride: where max_drop is exceeded, the pruning is taken back and tried again with the next larger k.", trainer=True
    )
    iterations: int = _setting(
        1,
        "Number of prunings in one training, each followed by its own retraining; a list of targets (num_blocks) brings its number along.",
        trainer=True,
    )
    start_epoch: int = _setting(0, "Epochs of training before the first pruning; 0 prunes at once.", trainer=True)
    retrain_epochs: int = _setting(
        3, "Epochs of training after each pruning; without max_drop the last one lasts to the training's end.", trainer=True
    )
    metric: str | None = _setting(
        None,
        "Metric that max_drop bounds and the report shows, named as in metric_for_best_model; default: that one, or else the loss.",
        trainer=True,
    )
    greater_is_better: bool | None = _setting(
        None,
        "Whether a larger metric is better; default: the Trainer's rule, by which smaller is better for names that end in 'loss'.",
        trainer=True,
    )
    max_drop: float | None = _setting(
        None,
        "How much worse than the baseline the metric may be after a retraining, in its own units (0.01 is one point of an accuracy "
        "between 0 and 1); else the pruning is taken back.",
        trainer=True,
    )
    baseline: float | None = _setting(
        None, "The metric before the first pruning; default: measured in the training, before that pruning.", trainer=True
    )
    rewind_lr: bool = _setting(True, "Give each retraining a warm-up and a decay of the learning rate of its own.", trainer=True)
    freeze: str | tuple[str, ...] = _setting(
        "none",
        "'partial' trains the kept blocks beside each removal site and freezes the others, and embeddings and stem (a tied head too). "
        "'record' freezes at once what the checkpoint's record says was frozen. Or the blocks to freeze: patterns, as for protect.",
        choices=("none", "partial", "record"),
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
    protect: tuple[str, ...] = _setting(
        (), "Patterns (fnmatch) of module paths of blocks that must stay, e.g. 'encoder.layer.11', named as when the training begins."
    )
    min_blocks: int = _setting(1, "Fewest blocks that stay in each stack.")
    num_blocks: int | dict[str, int] | tuple[int | dict[str, int], ...] | None = _setting(
        None, "Target: how many blocks stay, over all stacks, or by stack name; a list has one for each iteration. The threshold is found."
    )
    keep_ratio: float | None = _setting(None, "Target: the share of all blocks that stays, in (0, 1]; the threshold is then found.")
    seed: int = _setting(0, "Seed of the choice of calibration samples from a data set.")

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            object.__setattr__(self, "protect", (self.protect,))
        for name in ("protect", "freeze", "num_blocks"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        self._check_types()
        self._check_iterations()
        self._check_target()
        if self.target == "threshold" and self.threshold is None:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        self._check_threshold()
        for name in ("k", "k_max", "calibration_samples", "min_blocks", "retrain_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        self._check_gate()
        for spec in dataclasses.fields(self):
            choices, value = spec.metadata.get("choices"), getattr(self, spec.name)
            if choices and isinstance(value, str) and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                more = " or a list of patterns" if spec.name == "freeze" else ""
                raise ConfigError(f"{spec.name} must be one of {', '.join(map(repr, choices))}{more}, found {value!r}.{hint}")
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

    @property
    def gated(self) -> bool:
        """Whether a pruning is judged after its retraining, and taken back if it cost too much."""
        return self.max_drop is not None

    def for_iteration(self, iteration: int) -> MPruneConfig:
        """The settings with the target of one iteration, counted from 0, where `num_blocks` is a list."""
        return self.replace(num_blocks=self.num_blocks[iteration], iterations=1) if isinstance(self.num_blocks, tuple) else self

    def replace(self, **settings: Any) -> MPruneConfig:
        """A copy with other settings. Giving one of threshold, num_blocks and keep_ratio unsets the other two."""
        targets = ("threshold", "num_blocks", "keep_ratio")
        if any(settings.get(name) is not None for name in targets):
            # a list of targets brought its number of iterations along
            iterations = {"iterations": 1} if isinstance(self.num_blocks, tuple) else {}
            settings = {**dict.fromkeys(targets), **iterations, **settings}
        self._refuse_unknown(settings)
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}

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
        targets = self.num_blocks if isinstance(self.num_blocks, tuple) else [] if self.num_blocks is None else [self.num_blocks]
        counts = [list(target.values()) if isinstance(target, dict) else [target] for target in targets]
        if self.num_blocks is not None and (not counts or any(not group or min(group) < 1 for group in counts)):
            raise ConfigError(f"num_blocks counts the blocks that stay, so it must be at least 1, found {self.num_blocks!r}.")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio must be in (0, 1], found {self.keep_ratio}.{_percent_hint(self.keep_ratio)}")

    def _check_iterations(self) -> None:
        if self.iterations < 1 or self.start_epoch < 0:
            raise ConfigError(f"iterations must be at least 1 and start_epoch at least 0, found {self.iterations} and {self.start_epoch}.")
        if isinstance(self.num_blocks, tuple) and self.iterations != len(self.num_blocks):
            if self.iterations != 1:
                raise ConfigError(
                    f"num_blocks lists {len(self.num_blocks)} targets for {self.iterations} iterations. Give one for each iteration."
                )
            object.__setattr__(self, "iterations", max(1, len(self.num_blocks)))
        totals = [target for target in self.num_blocks if isinstance(target, int)] if isinstance(self.num_blocks, tuple) else []
        if any(later > earlier for earlier, later in itertools.pairwise(totals)):
            raise ConfigError(
                f"num_blocks lists the blocks that stay after each iteration, so it cannot rise, found {list(self.num_blocks)}."
            )

    def _check_gate(self) -> None:
        if self.max_drop is not None and self.max_drop < 0:
            raise ConfigError(f"max_drop must be 0 or more, found {self.max_drop:g}. It says how much worse the metric may become.")
        if self.max_drop is None:
            for name in ("baseline", "greater_is_better"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is of use only with max_drop, which is not set. Set max_drop, or leave {name} out.")

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
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
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
    return " or ".join(_word(option) for option in options)


def _word(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:  # written as a list, by those who do not care
        return f"a list of {_words(typing.get_args(hint)[0])}"
    return "None" if hint is type(None) else hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
