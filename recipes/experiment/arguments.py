"""Arguments of recipes: dataclasses for HfArgumentParser, a YAML file of the same names, and the command line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments, set_seed

from deeparc_hf.core.interrupts import work_begins
from deeparc_hf.core.plain_text import did_you_mean
from deeparc_hf.core.settings import setting
from deeparc_hf.distillation.config import DistillConfig
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.pruning.config import DEFAULT_THRESHOLD, MPruneConfig
from deeparc_hf.publish.vocabulary import check_language, check_license
from deeparc_hf.sparsity.config import WandaConfig

from .metrics import CACHE
from .spread import spread_blocks

__all__ = ["DataArguments", "PruningArguments", "begin", "parse", "parse_settings", "read_config"]


@dataclass
class DataArguments:
    """Model and data. The model is trained and calibrated on one split, judged on another, measured on a third."""

    model: str = field(metadata={"help": "Hub id or folder of the model"})
    model_revision: str | None = setting(None, "commit, tag or branch of the model")
    dataset: str | None = setting(None, "Hub id of the data")
    dataset_config: str | None = setting(None, "its configuration")
    dataset_revision: str | None = setting(None, "its commit")
    train_file: str | None = setting(None, "local file (.csv, .jsonl, .parquet, .txt) or folder, not the Hub")
    validation_file: str | None = setting(None, "local file to judge prunings on")
    test_file: str | None = setting(None, "local file for the figures of the tables")
    train_split: str = setting("train", "split to train and calibrate on")
    validation_split: str = setting(
        "validation", "split to judge prunings on; 10%% of the training split if there is none"
    )
    test_split: str = setting("test", "split for the figures of the tables; the validation split if there is none")
    max_train_samples: int | None = setting(None, "the first so many, shuffled by the seed")
    max_validation_samples: int | None = setting(None, "the first so many, shuffled by the seed")
    max_test_samples: int | None = setting(None, "the first so many, shuffled by the seed")
    evaluate_scripts: str = setting(
        CACHE,
        "where the library evaluate finds its scripts for the metrics: cache (those it has kept), hub (fetched from "
        "the Hub, and run), a folder, or off; without one the libraries beneath give the same values",
    )
    repo_id: str | None = setting(None, "publish the result there, on the Hub")
    repo_private: bool = setting(False, "make that repository private")
    license: str | None = setting(None, "licence of the result, for its card")
    language: str | None = setting(None, "language of the model, for its card")

    def __post_init__(self) -> None:
        check_license(self.license)  # what the Hub would refuse at the end is said before any work is done
        check_language([] if self.language is None else [self.language])


def _several(help: str) -> Any:
    """A field that takes any number of values."""
    return field(default_factory=list, metadata={"help": help})


def _as_in(settings: type, name: str) -> Any:
    """A field with the default and the help of a setting of the package."""
    spec = next(spec for spec in dataclasses.fields(settings) if spec.name == name)
    return setting(spec.default, spec.metadata.get("cli", spec.metadata["help"]))


@dataclass
class PruningArguments:
    """What is done to the model. Names and meanings are those of MPruneConfig, DistillConfig and WandaConfig."""

    finetune_epochs: float = setting(
        1.0, "epochs of fine-tuning before anything is removed; 0: the model is fine-tuned"
    )
    iterations: int = setting(1, "prunings, each with its own retraining and its own row in the table; 0: none")
    retrain_epochs: int = setting(3, "epochs after each pruning; 0: blocks are removed (and healed), no more")
    threshold: float | None = setting(None, "similarity from which blocks are redundant")
    num_blocks: list[str] | None = setting(
        None, "blocks that stay after each iteration: N, or STACK=N,OTHER=M by stack"
    )
    keep_ratio: float | None = setting(None, "share of the blocks that stays, of each iteration")
    speedup: float | None = setting(
        None, "how many times as fast the model becomes, over all iterations: each takes an equal factor"
    )
    search: str | None = _as_in(MPruneConfig, "search")
    objective: str = setting(
        "divergence",
        "what a search makes small: the divergence of the outputs, that of the hidden states, or the loss, on training "
        "data; or the metric, on validation data",
    )
    k: int = _as_in(MPruneConfig, "k")
    k_max: int = _as_in(MPruneConfig, "k_max")
    freeze: str = setting("none", "none, partial (the seed's Part), or a pattern of blocks: model.encoder.layers.*")
    freeze_inputs: bool = _as_in(MPruneConfig, "freeze_inputs")
    similarity: str = setting(
        "cka",
        "cka (debiased; the seed's for images, with rows flat), cka_biased (the seed's for texts), cosine or effect",
    )
    rows: str | None = _as_in(MPruneConfig, "rows")
    linkage: str = _as_in(MPruneConfig, "linkage")
    across_stacks: bool = _as_in(MPruneConfig, "across_stacks")
    keep: str = _as_in(MPruneConfig, "keep")
    spread_evenly: bool = setting(
        False,
        "the blocks that num_blocks leaves are spread evenly over their stack, as in Distil-Whisper",
    )
    heal: str | None = _as_in(MPruneConfig, "heal")
    distill_alpha: float | None = setting(None, "weight of the unpruned model's teaching during the retraining")
    distill_temperature: float = _as_in(DistillConfig, "temperature")
    measure_removal: bool = setting(
        False, "a row of the table for each removal, before the retraining, which is then a training of its own"
    )
    lora_rank: int | None = setting(
        None, "retrain LoRA adapters of this rank on the blocks that stay, and merge them; implies measure_removal"
    )
    lora_alpha: float | None = setting(None, "their scale; default: twice the rank")
    lora_dropout: float = setting(0.0, "dropout of their inputs")
    lora_targets: list[str] = _several("linear maps that get an adapter, by name; default: all but the head")
    metric: str | None = setting(None, "metric of the gate")
    max_drop: float | None = _as_in(MPruneConfig, "max_drop")
    calibration_samples: int = _as_in(MPruneConfig, "calibration_samples")
    protect: list[str] = _several("patterns of blocks that must stay")
    sparsity: list[float] = _several("Wanda grid: shares of zeros, each tried on each model of the table")
    sparsity_pattern: str | None = setting(None, "2:4 or 4:8, one more entry of the grid")
    sparsity_method: str = _as_in(WandaConfig, "method")
    sparsity_retrain: list[float] = _several("shares of the grid that are retrained too; a pattern's is 0.5")
    sparsity_original: bool = setting(True, "zero weights of the original too, not only of the pruned models")
    sparsity_samples: int = _as_in(WandaConfig, "calibration_samples")
    test_each_epoch: bool = setting(
        False, "measure the main metric on the test data after each epoch too, for the table; nothing is decided on it"
    )
    repeats: int = setting(3, "warm evaluations behind each time")

    def __post_init__(self) -> None:
        self._check_retraining()
        self._check_stages()
        self._check_objective()
        self._check_spread()
        for iteration in range(max(1, self.iterations)):
            self.pruning(iteration)  # what makes no sense is said before any work is done
        self.grid()

    def pruning(
        self, iteration: int, baseline: float | None = None, lengths: Mapping[str, int] | None = None
    ) -> MPruneConfig:
        """The settings of one iteration, counted from 0: a training of its own, which prunes at once. Where blocks are
        to be spread evenly, those of stacks of these lengths that do not stay are all that may go.
        """
        teaching = {"alpha": self.distill_alpha, "temperature": self.distill_temperature}
        target = {"num_blocks": self._target(iteration), "keep_ratio": self.keep_ratio, "threshold": self.threshold}
        target["speedup"] = None if self.speedup is None else self.speedup ** (1 / max(1, self.iterations))
        spread = self.spread_evenly and lengths is not None
        if self.search is None and not any(value is not None for value in target.values()):
            target["threshold"] = DEFAULT_THRESHOLD  # here max_drop alone says how much may be lost, not how far to go
        return MPruneConfig(
            **target,
            retrain_epochs=max(1, self.retrain_epochs),  # with 0 no training is there to ask
            baseline=baseline if self.max_drop is not None else None,
            distill=None if self.distill_alpha is None else teaching,
            protect=tuple(self.protect) if not spread else spread_blocks(lengths or {}, target["num_blocks"]),
            freeze=self.freeze if self.freeze in _FROZEN else (self.freeze,),
            **{name: getattr(self, name) for name in _OF_EACH_ITERATION},
        )

    def grid(self) -> list[WandaConfig]:
        """The settings of the Wanda grid."""
        shared = {"method": self.sparsity_method, "calibration_samples": self.sparsity_samples}
        entries = [WandaConfig(sparsity=share, **shared) for share in self.sparsity]
        return entries + ([WandaConfig(pattern=self.sparsity_pattern, **shared)] if self.sparsity_pattern else [])

    def _check_retraining(self) -> None:
        if self.retrain_epochs < 0 or self.finetune_epochs < 0 or self.iterations < 0:
            found = f"{self.retrain_epochs}, {self.finetune_epochs:g} and {self.iterations}"
            raise ConfigError(f"retrain_epochs, finetune_epochs and iterations must be 0 or more, found {found}.")
        if self.retrain_epochs == 0:
            given = [name for name in ("max_drop", "distill_alpha") if getattr(self, name) is not None]
            given += ["freeze"] * (self.freeze != "none") + ["sparsity_retrain"] * bool(self.sparsity_retrain)
            if given:
                raise ConfigError(
                    f"{' and '.join(given)} is about the retraining, and retrain_epochs is 0. Leave one of them out."
                )
        strange = [share for share in self.sparsity_retrain if share not in [config.sparsity for config in self.grid()]]
        if strange:
            raise ConfigError(
                f"sparsity_retrain names shares of the grid, and {strange} is not in sparsity={self.sparsity}."
            )

    @property
    def in_stages(self) -> bool:
        """Whether removals and retrainings are rows of their own."""
        return self.retrain_epochs > 0 and (self.measure_removal or self.lora_rank is not None)

    def _check_stages(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ConfigError(f"lora_rank must be at least 1, found {self.lora_rank}. 8 to 64 are usual.")
        if self.lora_rank is None and (self.lora_alpha is not None or self.lora_targets or self.lora_dropout):
            raise ConfigError("lora_alpha, lora_dropout and lora_targets are of adapters. Give lora_rank.")
        if self.lora_rank is not None and self.freeze != "none":
            raise ConfigError(
                f"lora_rank trains adapters alone, and all else is frozen, found freeze={self.freeze!r} beside it. "
                "Leave one of them out."
            )
        if not self.retrain_epochs and self.lora_rank is not None:
            raise ConfigError("lora_rank is about the retraining, and retrain_epochs is 0. Leave one of them out.")
        if self.in_stages and self.max_drop is not None:
            given = "measure_removal" if self.lora_rank is None else "lora_rank"
            raise ConfigError(
                f"max_drop takes prunings back within one training, and with {given} the retraining is a training of "
                "its own. Leave one of them out."
            )

    def _check_objective(self) -> None:
        if self.objective != METRIC:
            return
        if self.search is None or (self.retrain_epochs and not self.in_stages):
            raise ConfigError(
                "objective='metric' has a search measure each candidate on the validation data, before a retraining of "
                "its own. Give search, and measure_removal or retrain_epochs 0."
            )

    def _check_spread(self) -> None:
        given = [name for name in ("threshold", "keep_ratio", "speedup", "search") if getattr(self, name) is not None]
        given += ["protect"] * bool(self.protect) + ["max_drop"] * (self.max_drop is not None)
        if self.spread_evenly and (given or not self.num_blocks):
            raise ConfigError(
                "spread_evenly says which blocks stay, and num_blocks how many, found "
                f"{' and '.join(given) or 'no num_blocks'}. Give num_blocks, and none of the others."
            )

    def _target(self, iteration: int) -> int | dict[str, int] | None:
        targets = [_target_in(entry) for entry in self.num_blocks or ()]
        if self.iterations <= 1 and targets and all(isinstance(target, dict) for target in targets):
            return {name: count for target in targets for name, count in target.items()}  # type: ignore[union-attr]
        if self.iterations and len(targets) not in (0, 1, self.iterations):
            raise ConfigError(
                f"num_blocks gives {len(targets)} targets for {self.iterations} iterations. Give one for each: N, or "
                "STACK=N,OTHER=M."
            )
        if self.iterations > 1 and len(targets) == 1 and isinstance(targets[0], dict):
            raise ConfigError(
                "num_blocks gives one target by stack for several iterations, and the first would go all the way. Give "
                "STACK=N,OTHER=M for each."
            )
        named = [set(target) for target in targets if isinstance(target, dict)]
        if any(names != named[0] for names in named):
            raise ConfigError(
                f"num_blocks names other stacks for one iteration than for another, found {self.num_blocks}. Give "
                "STACK=N,OTHER=M for each, with the same stacks."
            )
        return targets[min(iteration, len(targets) - 1)] if targets else None


def _target_in(entry: str) -> int | dict[str, int]:
    """A target as the command line gives it: N, or STACK=N,OTHER=M."""
    if entry.strip().isdigit():
        return int(entry)
    counts = {}
    for part in entry.split(","):
        name, sign, number = part.strip().rpartition("=")
        if not sign or not name or not number.strip().isdigit():
            raise ConfigError(
                "num_blocks takes a whole number for each iteration, or STACK=N,OTHER=M with one for each stack, found "
                f"{entry!r}."
            )
        counts[name] = int(number)
    return counts


METRIC = "metric"  # the objective that a model's evaluation gives
_FROZEN = ("none", "partial", "record")  # what is no pattern
# settings of MPruneConfig that are the same in each iteration
_OF_EACH_ITERATION = (
    *(
        "k",
        "k_max",
        "freeze_inputs",
        "similarity",
        "rows",
        "linkage",
        "across_stacks",
        "keep",
        "heal",
        "metric",
        "max_drop",
        "search",
        "objective",
    ),
    "calibration_samples",
)


def begin(
    own: type,
    argv: Sequence[str] | None,
    description: str | None,
    training: type = TrainingArguments,
    default: Path | None = None,
) -> tuple[DataArguments, Any, PruningArguments, Any]:
    """A recipe's settings, as `parse` gives them, with its own in the second place; the Trainer's seed is set. The
    default is the config file that is taken where the arguments name neither one nor a model.
    """
    given_words = sys.argv[1:] if argv is None else list(argv)
    options = {word.partition("=")[0] for word in given_words}
    if default is not None and default.is_file() and not options & {"--config", "--model", "--help", "-h"}:
        sys.stderr.write(f"No --config and no --model: the settings are those of {default}.\n")
        argv = ["--config", str(default), *given_words]
    data, given, pruning, trainer = parse((DataArguments, own, PruningArguments, training), argv, description)
    set_seed(trainer.seed)
    return data, given, pruning, trainer


def parse(types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None) -> tuple[Any, ...]:
    """Parse dataclasses from the command line and from a YAML file that `--config` names; the command line wins.

    `--NAME null` on the command line takes back what the file says: the setting has its default.

    Returns:
        One instance of each type.

    Raises:
        ConfigError: if the file is not a mapping, or it or the command line names something that there is not.
    """
    found = parse_settings(types, argv, description)
    work_begins()  # a recipe has imported its libraries before it parses
    return tuple(each(**{name: found[name] for name in _names([each])}) for each in types)


def parse_settings(
    types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> dict[str, Any]:
    """What `parse` makes its instances of: the settings of all types by name, of their types, not checked further."""
    known = _names(types)
    path, unset, rest = _set_apart(sys.argv[1:] if argv is None else argv, known)
    words = [] if path is None else _words(read_config(path), known, path, unset)
    parser = HfArgumentParser(types, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", help="YAML file with the same names; what is given on the command line wins")
    found, unknown = parser.parse_known_args([*words, *rest])
    if unknown:
        options = [f"--{name}" for name in known]
        raise ConfigError(f"There is no argument {unknown[0]!r}.{did_you_mean(unknown[0].partition('=')[0], options)}")
    return vars(found)


def _names(types: Iterable[type]) -> set[str]:
    return {spec.name for each in types for spec in dataclasses.fields(each) if spec.init}


def _set_apart(argv: Sequence[str], known: Collection[str]) -> tuple[Path | None, set[str], list[str]]:
    """The file that --config names, the settings that `--NAME null` takes back, and the other arguments."""
    path, unset, rest, words = None, set(), [], list(argv)
    while words:
        word = words.pop(0)
        option, sign, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")  # both spellings are the same to the parser
        value = value if sign or not words or words[0].startswith("--") else words[0]
        if option == "--config":
            path = Path(value)
        elif option.startswith("--") and name in known and value == "null":
            unset.add(name)
        else:
            rest.append(word)
            continue
        words = words if sign or not value else words[1:]
    return path, unset, rest


def read_config(path: Path, what: str = "--config") -> Mapping[str, Any]:
    """The names and values in a YAML file, and those of the file beside it that it names as its `base`, which it wins
    over.

    Raises:
        ConfigError: if one is not there, not YAML, or not a mapping, or the base has a base too.
    """
    data = dict(_mapping(path, what))
    if "base" not in data:
        return data
    base = path.parent / str(data.pop("base"))
    shared = _mapping(base, f"{path}: base")
    if "base" in shared:
        raise ConfigError(f"{path}: its base {base} has a base too. Give all settings in one of them.")
    return {**shared, **data}


def _mapping(path: Path, what: str) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError('A config file needs PyYAML: pip install "deeparc_hf[recipes]".') from error
    if not path.is_file():
        raise ConfigError(f"{what}: there is no file {path}.")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must hold names and values, found a {type(data).__name__}.")
    return data


def _word(value: Any) -> str:
    """An entry of a list in a config file as a word; names and numbers as NAME=N,OTHER=M."""
    return ",".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, Mapping) else str(value)


def _words(data: Mapping[str, Any], known: Collection[str], path: Path, unset: Collection[str]) -> list[str]:
    """The entries of a config file as words of a command line, but for those that are taken back."""
    words = []
    for key, value in data.items():
        if key not in known:
            raise ConfigError(f"{path}: there is no setting {str(key)!r}.{did_you_mean(str(key), known)}")
        if key in unset:
            continue
        if isinstance(value, Mapping):
            raise ConfigError(f"{path}: {key} holds a mapping. Give a text, a number or a list.")
        if isinstance(value, list):
            words += [f"--{key}", *map(_word, value)] if value else []
        elif value is not None:
            words.append(f"--{key}={value}")  # in one word, for texts that begin with a dash
    return words
