"""Plans: from similarity matrices to the blocks that go, stay and freeze. Pure: no model, no torch. JSON in and out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..core.caller import warn_caller
from ..core.checks import MAX_BLOCKS, Entry, MalformedError, read_json
from ..core.plain_text import plain, quoted
from ..core.tables import html_table, text_table
from ..errors import CalibrationWarning, ConfigError, PlanError
from .choice import Choice
from .clusters import ComparedStack, chains, cluster_blocks, freezing_set, reach_target, removable
from .config import MPruneConfig
from .heatmap import plot_plan
from .may_go import check_reachable

__all__ = [
    "ComparedStack",
    "PruningPlan",
    "StackPlan",
    "check_possible",
    "chosen_plan",
    "first_threshold",
    "freezing_set",
    "make_plan",
    "warn_if_drastic",
]

FORMAT_VERSION = 1
_LARGEST = 1e6  # debiased estimates may lie a little outside [-1, 1], and nothing lies here
_COLUMNS = ["stack", "blocks", "kept", "threshold", "clusters", "removed", "frozen"]


@dataclass(frozen=True)
class StackPlan:
    """The plan for one stack; indices are those of the blocks before the removal.

    Attributes:
        compared: the similarities and what else the plan rests on.
        threshold: the threshold that the clusters were made with (found, where a target was given).
        clusters: consecutive blocks that belong together; the first of each is its leader.
        removed, kept: the blocks that go and stay.
        frozen: those kept blocks that are not trained afterwards; empty if nothing is removed.
        protected: blocks that stay because the user said so.
        leader: path of the first cluster's leader, where that lies in an earlier stack (`across_stacks`).
    """

    compared: ComparedStack
    threshold: float
    clusters: tuple[tuple[int, ...], ...]
    removed: tuple[int, ...]
    frozen: tuple[int, ...] = ()
    protected: tuple[int, ...] = ()
    leader: str | None = None

    def __len__(self) -> int:
        return len(self.compared)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self)) if i not in self.removed)

    @property
    def similarity(self) -> tuple[tuple[float, ...], ...]:
        return self.compared.similarity

    @property
    def pinned(self) -> Mapping[int, str]:
        return self.compared.pinned


@dataclass(frozen=True)
class PruningPlan:
    """Which blocks of which stacks stay, go and freeze, and the similarities behind it.

    Attributes:
        stacks: the plan of each stack, by name, in forward order.
        config: the settings that the plan was made with.
        samples: number of calibration samples behind the similarities; 0 if not known.
        choice: how a search chose the blocks; None: they go by their similarity.
        batch_size: samples of a batch (in each process), where blocks were compared within each batch (rows="flat");
            else 0.
    """

    stacks: Mapping[str, StackPlan]
    config: MPruneConfig
    samples: int = 0
    batch_size: int = 0
    choice: Choice | None = None

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """The blocks that go, for the stacks that lose any."""
        return {name: stack.removed for name, stack in self.stacks.items() if stack.removed}

    @property
    def num_blocks(self) -> int:
        """Blocks before the removal."""
        return sum(map(len, self.stacks.values()))

    @property
    def num_kept(self) -> int:
        return sum(len(stack.kept) for stack in self.stacks.values())

    @property
    def num_frozen(self) -> int:
        return sum(len(stack.frozen) for stack in self.stacks.values())

    @property
    def samples_text(self) -> str:
        """The calibration samples behind the similarities, in words."""
        count = f"{self.samples:,} calibration samples"
        batches = f" in batches of {self.batch_size}" if self.batch_size else ""
        return f"{count}{batches}" if self.samples else "calibration samples whose number is not known"

    @property
    def comparison(self) -> str:
        """How the blocks were compared, or chosen by a search, in words."""
        if self.choice is not None:
            return str(self.choice)
        return f"{self.config.similarity} (rows: {self.config.effective_rows}) on {self.samples_text}"

    def replan(self, **settings: Any) -> PruningPlan:
        """A plan from the same similarities with other settings, at once. What decides the similarities must stay.

        Raises:
            ConfigError: if `similarity`, `rows` or another setting of the calibration would change; run `analyze` for
                that.
        """
        # the new plan is one by similarity, whatever found this one
        config = self.config.replace(**({} if self.config.search is None else {"search": None}), **settings)
        for name in ("similarity", "effective_rows", "calibration_samples", "seed"):
            if getattr(config, name) != getattr(self.config, name):
                raise ConfigError(
                    f"replan cannot change {name.removeprefix('effective_')!r}, because the similarities depend on it. "
                    "Call analyze again."
                )
        compared = {name: stack.compared for name, stack in self.stacks.items()}
        plan = make_plan(compared, config, self.samples, self.batch_size)
        warn_if_drastic(plan)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "samples": self.samples,
            **({"batch_size": self.batch_size} if self.batch_size else {}),
            **({} if self.choice is None else {"choice": self.choice.to_dict()}),
            "stacks": {name: _stack_to_dict(stack) for name, stack in self.stacks.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: if the data is not a plan.
        """
        entry = Entry(data)
        try:
            version = entry["format_version"]
            if type(version.value) is not int or version.value != FORMAT_VERSION:
                raise PlanError(
                    f"This plan has format version {quoted(version.value)}; this version of deeparc_hf reads "
                    f"{FORMAT_VERSION}."
                )
            stacks = {name: _stack_in(stack) for name, stack in entry["stacks"].named().items()}
            config, batch = MPruneConfig.from_dict(entry["config"].value), entry.get("batch_size")
            return cls(
                stacks,
                config,
                entry["samples"].whole(),
                0 if batch is None else batch.whole(),
                entry.optional("choice", Choice.read),
            )
        except (MalformedError, ConfigError) as error:
            raise _no_plan(error) from error

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text; written to `path` too if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> PruningPlan:
        """Read from a JSON text, or from the file at a path."""
        is_text = isinstance(text_or_path, str) and text_or_path.lstrip().startswith(("{", "["))
        try:
            return cls.from_dict(read_json(text_or_path if is_text else Path(text_or_path)))
        except MalformedError as error:
            raise _no_plan(error) from error

    def __str__(self) -> str:
        return "\n".join([text_table([_COLUMNS, *self._rows()]), *self._pins(), self._summary()])

    def _repr_html_(self) -> str:
        return html_table(self._summary(), _COLUMNS, self._rows(), self._pins())

    def plot(self, stack: str | None = None, ax: Any = None) -> Any:
        """Draw the similarities of the blocks as heatmaps: frames are clusters, red labels mark the blocks that go.
        Needs matplotlib.

        Args:
            stack: name of the stack to draw; default: all of them, side by side.
            ax: matplotlib Axes to draw one stack into; default: those of a new figure.

        Returns:
            The Axes; for several stacks an array of them.

        Raises:
            ConfigError: if there is no such stack, or one place for several.
            MissingDependencyError: if matplotlib is not installed.
        """
        return plot_plan(self, stack, ax)

    def _summary(self) -> str:
        verb = "remove" if self.removed else "nothing to remove:"
        batches = f" in batches of {self.batch_size}" if self.batch_size else ""
        summary = f"{verb} {self.num_blocks - self.num_kept} of {self.num_blocks} blocks"
        if self.choice is not None:
            return f"{summary} ({self.choice})"
        return (
            f"{summary} ({self.config.similarity}, rows={self.config.effective_rows}, {self.samples} samples{batches})"
        )

    def _pins(self) -> list[str]:
        return [
            f"{name}.{i} is pinned: {reason}"
            for name, stack in self.stacks.items()
            for i, reason in stack.pinned.items()
        ]

    def _rows(self) -> list[list[str]]:
        return [
            [
                name,
                str(len(stack)),
                str(len(stack.kept)),
                f"{stack.threshold:.4f}",
                " ".join(
                    [
                        *([f"({stack.leader})"] if stack.leader else []),
                        *(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in stack.clusters),
                    ]
                ),
                _list(stack.removed),
                _list(stack.frozen),
            ]
            for name, stack in self.stacks.items()
        ]


def make_plan(
    compared: Mapping[str, ComparedStack], config: MPruneConfig, samples: int = 0, batch_size: int = 0
) -> PruningPlan:
    """Make a plan from what is known of each stack, in forward order; `samples` and `batch_size` are for the record.

    Raises:
        PlanError: if a target cannot be reached, a pattern or a stack name matches nothing, or a similarity is not
            finite.
    """
    for name, stack in compared.items():
        if any(len(row) != len(stack) or not all(map(math.isfinite, row)) for row in stack.similarity):
            raise PlanError(
                f"The similarity matrix of {name} is not square or not finite. Run analyze on other calibration data."
            )
        if not all(map(math.isfinite, itertools.chain.from_iterable(stack.before))):
            raise PlanError(
                f"The similarities of {name} to the stacks before it are not finite. Run analyze on other calibration "
                "data."
            )
    if isinstance(config.num_blocks, tuple):
        raise PlanError(
            f"num_blocks lists {len(config.num_blocks)} targets, one for each iteration of a training with "
            "MPruneCallback. Give one target."
        )
    if config.target in ("speedup", "max_drop"):
        raise PlanError(
            f"{config.target} is no target that similarities can be held against: the blocks are searched for. Use "
            "search_blocks, or give num_blocks."
        )
    protected = _matching(compared, config.protect, "protect")
    if config.target == "threshold":
        thresholds = dict.fromkeys(compared, float(config.threshold))  # type: ignore[arg-type]
        removed = removable(compared, float(config.threshold), protected, config)  # type: ignore[arg-type]
    else:
        thresholds, removed = reach_target(compared, protected, config)
    final = {name: tuple(sorted(removed[name])) for name in compared}
    frozen = _frozen(compared, final, config)
    found = cluster_blocks(compared, thresholds, config)
    stacks = {
        name: StackPlan(
            compared=stack,
            threshold=thresholds[name],
            clusters=found[name].clusters,
            leader=found[name].leader,
            removed=final[name],
            frozen=frozen[name],
            protected=tuple(sorted(protected[name])),
        )
        for name, stack in compared.items()
    }
    return PruningPlan(stacks, config, samples, batch_size)


def chosen_plan(
    plan: PruningPlan, removed: Mapping[str, Sequence[int]], choice: Choice, **settings: Any
) -> PruningPlan:
    """A plan that removes these blocks, which a search chose, from one of the same model. A cluster is a kept block and
    those that go behind it, and the threshold of a stack the least similarity in them.

    Args:
        settings: of `MPruneConfig`, in place of the plan's.
    """
    compared = {name: stack.compared for name, stack in plan.stacks.items()}
    counts = {name: len(stack) - len(removed.get(name, ())) for name, stack in compared.items()}
    config = plan.config.replace(num_blocks=counts, **settings)
    protected = _matching(compared, config.protect, "protect")
    final = {name: tuple(sorted(removed.get(name, ()))) for name in compared}
    frozen = _frozen(compared, final, config)
    stacks = {}
    for name, stack in compared.items():
        starts = [i for i in range(len(stack)) if i == 0 or i not in final[name]]
        clusters = tuple(tuple(range(a, b)) for a, b in itertools.pairwise([*starts, len(stack)]))
        least = [stack.similarity[run[0]][i] for run in clusters for i in run[1:]]
        threshold = min([1.0, *least])
        kept = tuple(sorted(protected[name]))
        stacks[name] = StackPlan(stack, threshold, clusters, final[name], frozen[name], kept)
    return PruningPlan(stacks, config, plan.samples, plan.batch_size, choice)


def check_possible(compared: Mapping[str, ComparedStack], config: MPruneConfig) -> None:
    """Raise the PlanError of `make_plan` if no similarities at all could give a plan; those given do not matter."""
    total, given = sum(map(len, compared.values())), config
    if config.target in ("speedup", "max_drop"):  # any number of blocks will do
        config = config.replace(num_blocks=total)
    if config.search is not None:
        config = config.replace(k=1, num_blocks=total)
    alike: dict[str, ComparedStack] = {}
    for chain in chains(compared):
        before = 0
        for name, stack in chain.items():
            ones = [((1.0,) * width,) * len(stack) for width in (len(stack), before)]
            alike[name] = dataclasses.replace(stack, similarity=ones[0], before=ones[1] if before else ())
            before += len(stack)
    plan = make_plan(alike, config)
    if given.search is not None and given.target in ("num_blocks", "keep_ratio"):
        check_reachable(compared, {name: stack.protected for name, stack in plan.stacks.items()}, given)


def first_threshold(plan: PruningPlan) -> float | None:
    """The highest threshold that would remove a block; None if pinned and protected blocks allow no removal."""
    if plan.num_blocks < 2:
        return None
    try:
        nearest = plan.replan(num_blocks=plan.num_blocks - 1)
    except PlanError:
        return None
    return max(stack.threshold for stack in nearest.stacks.values())


def warn_if_drastic(plan: PruningPlan) -> None:
    """Warn where a threshold, which nobody can know beforehand, takes more than half of the blocks."""
    if plan.config.target == "threshold" and plan.num_kept < plan.num_blocks / 2:
        warn_caller(
            f"The threshold {plan.config.threshold:g} takes {plan.num_blocks - plan.num_kept} of {plan.num_blocks} "
            "blocks, and few models recover from that. The same similarity means different things in different "
            "models: give num_blocks or keep_ratio instead.",
            CalibrationWarning,
        )


def _frozen(
    compared: Mapping[str, ComparedStack], removed: Mapping[str, Sequence[int]], config: MPruneConfig
) -> dict[str, tuple[int, ...]]:
    if config.freeze == "partial":
        lengths = {name: len(stack) for name, stack in compared.items()}
        return freezing_set(removed, lengths, {name: stack.next_stack for name, stack in compared.items()})
    chosen: dict[str, set[int]] = {}
    if config.freeze == "record":
        chosen = {name: set(stack.frozen) for name, stack in compared.items()}
    elif config.freeze != "none":
        chosen = _matching(compared, config.freeze, "freeze")  # refuses a pattern that matches nothing
    if not chosen or not any(removed.values()):
        return dict.fromkeys(compared, ())
    return {name: tuple(sorted(blocks - set(removed[name]))) for name, blocks in chosen.items()}


def _matching(compared: Mapping[str, ComparedStack], patterns: Sequence[str], setting: str) -> dict[str, set[int]]:
    """The blocks that patterns name; of a later pruning's patterns one may be of a block that is gone."""
    matched: dict[str, set[int]] = {name: set() for name in compared}
    gone = any(stack.labels for stack in compared.values())
    for pattern in patterns:
        hits = [
            (name, index)
            for name, stack in compared.items()
            for index, label in enumerate(stack.labels or range(len(stack)))
            if fnmatchcase(f"{name}.{label}", pattern)
        ]
        if not hits and not gone:
            first = next(iter(compared))
            raise PlanError(
                f"{setting}: {quoted(pattern)} matches no block. Blocks are named like {first}.0; patterns may hold * "
                f"and ?, for example {first}.*"
            )
        for name, index in hits:
            matched[name].add(index)
    return matched


def _stack_to_dict(stack: StackPlan) -> dict[str, Any]:
    return {
        "length": len(stack),
        "similarity": [list(row) for row in stack.similarity],
        "pinned": {str(index): reason for index, reason in stack.pinned.items()},
        "parameters": list(stack.compared.parameters),
        "next_stack": stack.compared.next_stack,
        "labels": list(stack.compared.labels),
        "frozen_before": list(stack.compared.frozen),
        **({"before": [list(row) for row in stack.compared.before]} if stack.compared.before else {}),
        "threshold": stack.threshold,
        "clusters": [list(cluster) for cluster in stack.clusters],
        "removed": list(stack.removed),
        "kept": list(stack.kept),
        "frozen": list(stack.frozen),
        "protected": list(stack.protected),
        **({"leader": stack.leader} if stack.leader else {}),
    }


def _no_plan(error: Exception) -> PlanError:
    return PlanError(f"This is not a pruning plan: {plain(error, 400)}. Make one with analyze(...).")


def _stack_in(entry: Entry) -> StackPlan:
    """The plan of a stack, from outside."""
    compared = _compared_in(entry)
    last = len(compared) - 1
    blocks = {key: entry[key].wholes(last) for key in ("removed", "frozen", "protected", "kept")}
    for key, indices in blocks.items():
        entry[key].must_be(len(set(indices)) == len(indices), "block indices, none twice")
    left = set(range(len(compared))) - set(blocks["removed"])
    entry["kept"].must_be(set(blocks["kept"]) == left, "the blocks that are not removed")
    entry["frozen"].must_be(set(blocks["frozen"]) <= left, "among the blocks that are kept")
    clusters = tuple(cluster.wholes(last) for cluster in entry["clusters"].items(len(compared)))
    runs = [index for cluster in clusters for index in cluster]
    entry["clusters"].must_be(runs == list(range(len(compared))), "runs that cover the stack")
    threshold = entry["threshold"].number()
    entry["threshold"].must_be(threshold <= 1 + 1e-6, "at most 1")
    leader = entry.get("leader")
    return StackPlan(
        compared,
        threshold,
        clusters,
        removed=blocks["removed"],
        frozen=blocks["frozen"],
        protected=blocks["protected"],
        leader=None if leader is None else plain(leader.text()),
    )


def _compared_in(entry: Entry) -> ComparedStack:
    rows = entry["similarity"].items(MAX_BLOCKS)
    similarity = tuple(tuple(row.numbers(len(rows))) for row in rows)
    next_stack = entry.get("next_stack")
    # plans of early versions lack these
    labels, frozen, before = (
        entry[key] if key in entry.mapping() else None for key in ("labels", "frozen_before", "before")
    )
    earlier = [] if before is None else before.items(MAX_BLOCKS)
    if before is not None:
        before.must_be(len(earlier) in (0, len(rows)), f"{len(rows)} rows, one for each block, or none")
    width = len(earlier[0].items(MAX_BLOCKS)) if earlier else 0
    similarity_before = tuple(tuple(row.numbers(width)) for row in earlier)
    for row, values in zip((*rows, *earlier), (*similarity, *similarity_before), strict=True):
        row.must_be(all(abs(value) <= _LARGEST for value in values), f"numbers of at most {_LARGEST:g}")
    labelled = () if labels is None else labels.wholes()
    if labels is not None:
        labels.must_be(len(labelled) in (0, len(rows)), f"{len(rows)} numbers, one for each block, or none")
    pinned = entry["pinned"].entries(len(rows))
    indices = {str(index): index for index in range(len(rows))}
    entry["pinned"].must_be(pinned.keys() <= indices.keys(), f"named by block indices from 0 to {len(rows) - 1}")
    return ComparedStack(
        similarity=similarity,
        pinned={indices[name]: plain(reason.value) for name, reason in pinned.items()},
        parameters=entry["parameters"].wholes(),
        next_stack=None if next_stack is None else next_stack.text(),
        labels=labelled,
        frozen=() if frozen is None else frozen.wholes(len(rows) - 1),
        before=similarity_before,
    )


def _list(indices: Sequence[int]) -> str:
    return ",".join(map(str, indices)) or "-"
