"""The settings of similarity pruning."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from ..core.settings import Settings, percent_hint, setting, shown
from ..distillation.config import DistillConfig
from ..errors import ConfigError, RegistryError
from ..similarity import ROW_KINDS, SimilarityMetric, SkippingMetric, metrics

__all__ = ["DEFAULT_THRESHOLD", "MPruneConfig"]

DEFAULT_THRESHOLD = 0.98
_TARGETS = ("threshold", "num_blocks", "keep_ratio", "speedup")
_RETRAIN, _RETRAIN_BY_DROP = 3, 1  # epochs
# what says how blocks are compared: where one of these is set, similarity decides which blocks go
_OF_SIMILARITY = ("similarity", "rows", "linkage", "across_stacks", "keep", "k")


@dataclass(frozen=True)
class MPruneConfig(Settings):
    """Settings of similarity pruning.

    Exactly one of `threshold`, `num_blocks`, `keep_ratio` and `speedup` counts; with none given the threshold is 0.98.
    But with `max_drop` alone, or with it and `search`, the model becomes as small as that allows: the blocks are
    searched for, step by step. `k_max`, `iterations`, `start_epoch`, `retrain_epochs`, `rewind_lr` and what `max_drop`
    needs are of use to `MPruneCallback` only.

    Raises:
        ConfigError: if a value makes no sense; the message says which values do.
    """

    threshold: float | None = setting(
        None,
        "Blocks this similar to their cluster's leader are redundant; in (0, 1]. Default 0.98 where no target is "
        "given.",
    )
    k: int = setting(1, "Stride of removal: of each cluster members 1, 1+k, 1+2k, ... go. 1 leaves the leader only.")
    k_max: int = setting(
        3,
        "Largest stride: where max_drop is exceeded, the pruning is taken back and tried again with the next larger k.",
        trainer=True,
    )
    iterations: int = setting(
        1,
        "Number of prunings in one training, each followed by its own retraining; a list of targets (num_blocks) "
        "brings its number along.",
        trainer=True,
    )
    start_epoch: int = setting(0, "Epochs of training before the first pruning; 0 prunes at once.", trainer=True)
    retrain_epochs: int = setting(
        None,
        "Epochs of training after each pruning; without max_drop the last one lasts to the training's end. Default: 3, "
        "or 1 where max_drop alone decides how far to go.",
        trainer=True,
    )
    metric: str | None = setting(
        None,
        "Metric that max_drop bounds and the report shows, named as in metric_for_best_model; default: that one, or "
        "else the loss.",
        trainer=True,
    )
    greater_is_better: bool | None = setting(
        None,
        "Whether a larger metric is better; default: as its name says (smaller for loss, wer, rmse, perplexity and "
        "other usual errors, larger for usual scores; any other name: larger, with a warning).",
        trainer=True,
    )
    max_drop: float | None = setting(
        None,
        "How much worse than the baseline the metric may be after a retraining, in its own units (0.01 is one point of "
        "an accuracy between 0 and 1); else the pruning is taken back.",
        trainer=True,
    )
    baseline: float | None = setting(
        None,
        "The metric before the first pruning; default: measured in the training, before that pruning.",
        trainer=True,
    )
    rewind_lr: bool = setting(
        True, "Give each retraining a warm-up and a decay of the learning rate of its own.", trainer=True
    )
    freeze: str | tuple[str, ...] = setting(
        "none",
        "'partial' trains the kept blocks beside each removal site and freezes the others, and embeddings and stem (a "
        "tied head too; see freeze_inputs). 'record' freezes at once what the checkpoint's record says was frozen. Or "
        "the blocks to freeze: patterns, as for protect.",
        choices=("none", "partial", "record"),
        cli="What the checkpoint's record notes as not to be retrained: 'none'; 'partial', all kept blocks but those "
        "beside a removal site, and embeddings and stem; 'record', what it notes already.",
    )
    freeze_inputs: bool = setting(
        True,
        "What runs before the lowest trained block (embeddings, a CNN's stem) is frozen with the blocks that freeze "
        "names, so that the backward pass ends there. False: these blocks alone.",
    )
    stock_only: bool = setting(
        False,
        "Remove only blocks that settings of the model's library can leave out. Otherwise, where they cannot leave out "
        "most blocks of a stack, the result may need this package to be loaded, and a warning says so.",
    )
    similarity: str = setting(
        "cka",
        "Similarity metric, by its registered name. 'effect' skips each block and compares what the model puts out.",
    )
    rows: str | None = setting(
        None,
        "Rows that are compared: 'tokens', 'mean', 'first' or 'flat' (a sample's whole output, within each batch; of "
        "'cka'); default: what the metric recommends. Not for 'effect'.",
        choices=ROW_KINDS,
    )
    linkage: str = setting(
        "leader",
        "'leader': a block joins while similar to the cluster's first block; 'adjacent': while similar to the block "
        "before it.",
        choices=("leader", "adjacent"),
    )
    across_stacks: bool = setting(
        False,
        "Let clusters go on into the stack that takes a stack's output (from stage to stage of a CNN): a block's "
        "leader may lie in an earlier stage. Needs rows='flat'.",
    )
    keep: str = setting(
        "leader", "Which member of a cluster is sure to stay: its 'leader' or its 'last'.", choices=("leader", "last")
    )
    heal: str | None = setting(
        None,
        "'lstsq' refits the last linear map of the kept block before each removal site in closed form, on the "
        "calibration samples.",
        choices=("lstsq",),
    )
    search: str | None = setting(
        None,
        "Strategy by which the blocks are searched for that are missed least, by what the model puts out with them "
        "removed and the kept ones healed: 'greedy', 'exchange', 'beam' or 'evolution'. Default: they go by "
        "similarity; with speedup, or max_drop alone, 'greedy' with heal='lstsq'.",
        cli="Strategy by which the blocks are searched for that are missed least, by what the model puts out with them "
        "removed and the kept ones healed: 'greedy', 'exchange', 'beam' or 'evolution'. Default: they go by "
        "similarity; with --speedup 'greedy', healed by 'lstsq'.",
    )
    objective: str = setting(
        "divergence",
        "What a search makes small: the 'divergence' of the outputs from the whole model's, that of the 'hidden' "
        "states, or the 'loss'; of `analyze` and `search_blocks` the 'metric' of evaluate too.",
        cli="What a search makes small: the 'divergence' of the outputs from the whole model's, that of the 'hidden' "
        "states, or the 'loss'.",
    )
    distill: DistillConfig | None = setting(
        None,
        "DistillConfig(...), or a dict of its settings: the unpruned model teaches during the retraining.",
        trainer=True,
    )
    keep_snapshots: bool = setting(
        False,
        "Keep the weights from before a pruning (`_pruning_snapshots`) when the training ends well, as long as a "
        "checkpoint that may be resumed needs them.",
        trainer=True,
    )
    calibration_samples: int = setting(512, "Number of calibration samples to compare blocks on.")
    protect: tuple[str, ...] = setting(
        (),
        "Patterns (fnmatch) of module paths of blocks that must stay, e.g. 'bert.encoder.layer.11', named as when the "
        "training begins.",
        cli="Pattern (fnmatch) of module paths of blocks that must stay, e.g. 'bert.encoder.layer.11'.",
    )
    min_blocks: int = setting(1, "Fewest blocks that stay in each stack.")
    num_blocks: int | dict[str, int] | tuple[int | dict[str, int], ...] | None = setting(
        None,
        "Target: how many blocks stay, over all stacks, or by stack name; a list has one for each iteration. The "
        "threshold is found.",
        cli="Target: how many blocks stay, over all stacks (N) or in one of them (STACK=N). The threshold is found.",
    )
    keep_ratio: float | None = setting(
        None, "Target: the share of all blocks that stays, in (0, 1]; the threshold is then found."
    )
    speedup: float | None = setting(
        None,
        "Target: how many times as fast the model becomes, by the measured times of its blocks; they are searched for.",
    )
    seed: int = setting(0, "Seed of the choice of calibration samples from a data set.")

    def __post_init__(self) -> None:
        if isinstance(self.protect, str):
            object.__setattr__(self, "protect", (self.protect,))
        self._to_tuples("protect", "freeze", "num_blocks")
        if isinstance(self.distill, dict):
            object.__setattr__(self, "distill", DistillConfig.from_settings(None, self.distill))
        self._fill_in()
        self._check_types()
        self._check_iterations()
        self._check_target()
        for name in ("k", "k_max", "calibration_samples", "min_blocks", "retrain_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        self._check_gate()
        self._check_choices({"freeze": " or a list of patterns"})
        self._check_metric()

    def _fill_in(self) -> None:
        """Give what was left open its value: the target, the search that it needs, and the length of retrainings."""
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        alike = any(getattr(self, name) != defaults[name] for name in _OF_SIMILARITY)
        by_drop = not given and self.max_drop is not None and (self.search is not None or not alike)
        if self.search is None and (by_drop or "speedup" in given):
            object.__setattr__(self, "search", "greedy")
            object.__setattr__(self, "heal", self.heal or "lstsq")
        if not given and not by_drop:
            object.__setattr__(self, "threshold", DEFAULT_THRESHOLD)
        if self.retrain_epochs is None:
            object.__setattr__(self, "retrain_epochs", _RETRAIN_BY_DROP if by_drop else _RETRAIN)

    @property
    def target(self) -> str:
        """Which of threshold, num_blocks, keep_ratio and speedup counts; "max_drop" where that alone decides."""
        return next((name for name in _TARGETS if getattr(self, name) is not None), "max_drop")

    @property
    def effective_rows(self) -> str:
        """The rows that are compared; "outputs" where the model's outputs are, not those of its blocks."""
        return self.rows or metrics.get(self.similarity).rows

    @property
    def gated(self) -> bool:
        """Whether a pruning is judged after its retraining, and taken back if it cost too much."""
        return self.max_drop is not None

    def for_iteration(self, iteration: int) -> MPruneConfig:
        """The settings with the target of one iteration, counted from 0, where `num_blocks` is a list."""
        return (
            self.replace(num_blocks=self.num_blocks[iteration], iterations=1)
            if isinstance(self.num_blocks, tuple)
            else self
        )

    def replace(self, **settings: Any) -> MPruneConfig:
        """A copy with other settings. Giving one of the targets (threshold, num_blocks, ...) unsets the others."""
        if any(settings.get(name) is not None for name in _TARGETS):
            # a list of targets brought its number of iterations along
            iterations = {"iterations": 1} if isinstance(self.num_blocks, tuple) else {}
            settings = {**dict.fromkeys(_TARGETS), **iterations, **settings}
        elif self.target == "max_drop" and settings.get("max_drop", self.max_drop) is None:
            settings = {"search": None, **settings}  # nothing says any more how far a search is to go
        return super().replace(**settings)

    def _check_target(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"Exactly one of {', '.join(_TARGETS)} counts, found {' and '.join(given)}. Give one of them."
            )
        if self.search is not None and "threshold" in given:
            raise ConfigError(
                "A search goes by what the model puts out and not by similarity, so no threshold bounds it. Give "
                "num_blocks, keep_ratio, speedup, or max_drop alone, in place of threshold; or leave search out."
            )
        if self.speedup is not None and self.speedup <= 1:
            raise ConfigError(
                f"speedup says how many times as fast the model becomes, so it must be more than 1, found "
                f"{shown(self.speedup)}."
            )
        targets = self.num_blocks if isinstance(self.num_blocks, tuple) else (self.num_blocks,)
        counts = [list(t.values()) if isinstance(t, dict) else [t] for t in targets if t is not None]
        if self.num_blocks is not None and (not counts or any(not group or min(group) < 1 for group in counts)):
            raise ConfigError(
                f"num_blocks counts the blocks that stay, so it must be at least 1, found {self.num_blocks!r}."
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"keep_ratio must be in (0, 1], found {self.keep_ratio}.{percent_hint(self.keep_ratio)}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ConfigError(
                f"threshold must be in (0, 1], found {shown(self.threshold)}.{percent_hint(self.threshold)}"
            )

    def _check_iterations(self) -> None:
        if self.iterations < 1 or self.start_epoch < 0:
            raise ConfigError(
                f"iterations must be at least 1 and start_epoch at least 0, found {self.iterations} and "
                f"{self.start_epoch}."
            )
        if isinstance(self.num_blocks, tuple) and self.iterations != len(self.num_blocks):
            if self.iterations != 1:
                raise ConfigError(
                    f"num_blocks lists {len(self.num_blocks)} targets for {self.iterations} iterations. Give one for "
                    "each iteration."
                )
            object.__setattr__(self, "iterations", max(1, len(self.num_blocks)))
        targets = self.num_blocks if isinstance(self.num_blocks, tuple) else ()
        totals = [target for target in targets if isinstance(target, int)]
        if any(later > earlier for earlier, later in itertools.pairwise(totals)):
            raise ConfigError(
                f"num_blocks lists the blocks that stay after each iteration, so it cannot rise, found {list(targets)}."
            )

    def _check_metric(self) -> None:
        try:
            metric = metrics.get(self.similarity)
        except RegistryError as error:
            raise ConfigError(f"similarity: {error}") from None
        if self.rows is not None and issubclass(metric, SkippingMetric):
            raise ConfigError(
                f"rows says which rows of the blocks' outputs are compared, and similarity={self.similarity!r} "
                f"compares the outputs of the whole model, found rows={self.rows!r} beside it. Leave rows out."
            )
        if issubclass(metric, SimilarityMetric) and self.effective_rows not in metric.row_kinds:
            raise ConfigError(
                f"similarity={self.similarity!r} compares rows of {', '.join(map(repr, metric.row_kinds))}, found "
                f"rows={self.rows!r}. Take one of them, or similarity='cka'."
            )
        if self.across_stacks and self.effective_rows != "flat":
            raise ConfigError(
                "across_stacks compares blocks whose outputs differ in shape, which only whole outputs allow, found "
                f"rows={self.effective_rows!r}. Give rows='flat' (with similarity='cka'), or leave across_stacks out."
            )
        targets = self.num_blocks if isinstance(self.num_blocks, tuple) else (self.num_blocks,)
        if self.across_stacks and any(isinstance(target, dict) for target in targets):
            raise ConfigError(
                "num_blocks by stack finds a threshold for each stack, and with across_stacks there is one for all. "
                "Give the number of blocks of the whole model."
            )

    def _check_gate(self) -> None:
        if self.max_drop is not None and self.max_drop < 0:
            raise ConfigError(
                f"max_drop must be 0 or more, found {self.max_drop:g}. It says how much worse the metric may become."
            )
        for name in ("baseline", "greater_is_better"):
            if self.max_drop is None and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} is of use only with max_drop, which is not set. Set max_drop, or leave {name} out."
                )
