"""What a card tells of a model: plain data, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.record import PrunedConfig
from ..core.markdown import linked, md
from ..pruning.plan import PruningPlan
from ..reports.attempts import Attempt, Evaluation
from ..reports.run_report import RUN_REPORT
from ..sparsity.report import SparsityReport
from .vocabulary import Given, hub_id

__all__ = ["RUN_FILE", "CardContent"]

RUN_FILE = f"{RUN_REPORT}.json"


@dataclass(frozen=True)
class CardContent:
    """Plain data; what is not known is None or empty, and is left out of the card.

    Attributes:
        library: transformers, timm or sentence-transformers.
        encoder: SentenceTransformer, SparseEncoder or CrossEncoder, where it is a model of sentence-transformers.
        architecture: name of the model's class, or timm's name of its architecture.
        model_type: as config.json names it, of the model that a checkpoint of the type deeparc_pruned is of; None for
            timm.
        record: what was done to the model; an empty one where nothing was.
        mark: of the weights (`weights_mark`); None where they are not there.
        labels: names of the classes of a classifier.
        headless: whether a timm model has no classifier.
        processor: "tokenizer", "image processor", or "processor" for both or a tokenizer and a feature extractor,
            where one lies beside the model.
        dtype: of the weights, as torch names it.
        needs_package: whether only deeparc_hf can load it (the model type "deeparc_pruned").
        parameters: number of parameters, before the first pruning and now.
        attempts: the model before, and each pruning that was tried; from the record where there is no report.
        run: metric, baseline, accepted, iterations, max_drop, reason and phase of the run that the model is of.
        config: settings of the last pruning.
        sparsity: the report of what was zeroed. zeroed_in_training: whether a callback did it.
        final: evaluations of the model as it is, the last ones.
        data: what is known of the data, by use ("training", "evaluation").
        training, hardware, versions: settings of the training; what it ran on and with.
        trained_for: seconds of a training after the removal that was one of its own.
        plan: the last plan that was carried out.
        answers: to some prompts ("prompt"), what the model before said ("before") and what this one says ("generated").
        speed: time of one evaluation over that of the model before: ratio, low, high, blocks, turns.
        reports: names of the files that tell of this model.
        given: what only the publisher can tell.
        licences: of the base model and the data, by Hub id ("org/name", "datasets/org/name").
    """

    library: str
    architecture: str | None
    record: PrunedConfig
    model_type: str | None = None
    mark: str | None = None
    labels: tuple[str, ...] = ()
    headless: bool = False
    processor: str | None = None
    dtype: str | None = None
    needs_package: bool = False
    encoder: str | None = None
    parameters: tuple[int | None, int | None] = (None, None)
    attempts: tuple[Attempt, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    sparsity: SparsityReport | None = None
    zeroed_in_training: bool = False
    final: tuple[Evaluation, ...] = ()
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    trained_for: float | None = None
    plan: PruningPlan | None = None
    speed: Mapping[str, float] = field(default_factory=dict)
    answers: tuple[Mapping[str, str], ...] = ()
    reports: tuple[str, ...] = ()
    name: str | None = None
    given: Given = field(default_factory=Given)
    licences: Mapping[str, str] = field(default_factory=dict)

    @property
    def from_run(self) -> bool:
        """Whether the report of a training is of this model."""
        return RUN_FILE in self.reports

    @property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        """What the original calls the blocks of the plan, by stack: those that were left before it."""
        gone, known = self.last_pruning.get("removed") or {}, self.record.stacks
        return {
            name: tuple(sorted({*known[name].kept, *gone.get(name, ())}) if name in known else range(len(stack)))
            for name, stack in ({} if self.plan is None else self.plan.stacks).items()
        }

    @property
    def continued(self) -> bool:
        """Whether there were prunings in trainings before the last one, of which there is no report."""
        return len(self.attempts) > 1 and self.attempts[0].k is not None

    @property
    def removed(self) -> int:
        """Number of blocks that are gone."""
        return sum(map(len, self.record.removed.values()))

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks before the first pruning and now."""
        return sum(s.length for s in self.record.stacks.values()), sum(self.left.values())

    @property
    def left(self) -> dict[str, int]:
        """Number of blocks that are left, by stack."""
        return {name: len(stack.kept) for name, stack in self.record.stacks.items()}

    @property
    def last_pruning(self) -> Mapping[str, Any]:
        """What the record notes of the last pruning; empty where there was none."""
        return self.record.iterations[-1] if self.record.iterations else {}

    @property
    def compared(self) -> bool:
        """Whether the last pruning was found by comparing blocks, and not chosen by hand."""
        return bool((self.config or {}).get("similarity"))

    @property
    def against_original(self) -> bool:
        """Whether figures "before" are of the original, and not of a model that had lost blocks already."""
        began = {evaluation.before_blocks for evaluation in self.final if evaluation.before} - {None}
        return not self.removed or began <= {self.blocks[0]}

    @property
    def base(self) -> str | None:
        """Hub id of the model that was pruned first; None where it is not known."""
        return hub_id(self.given.finetuned_from or self.record.base_model)

    @property
    def datasets(self) -> list[str]:
        """Hub ids of the data, each once."""
        known = [*(self.given.dataset_tags or ()), *(data["id"] for data in self.data.values() if "id" in data)]
        return [name for name in dict.fromkeys(map(hub_id, known)) if name is not None]

    @property
    def one_unnamed_set(self) -> bool:
        """Whether what was given for the data can be for one data set only; its splits are not several."""
        unnamed = [(e.split_of(next(iter(e.metrics), "")), e.data) for e in self.final if "id" not in e.data]
        return all(data == other for split, data in unnamed for same, other in unnamed if split == same)

    def given_for(self, data: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
        """Hub id, name and configuration that were given for some data; None where it is not clear that it is meant."""
        if "id" in data or not self.one_unnamed_set:
            return None, None, None
        ids, names, configs = self.given.dataset_tags, self.given.dataset, self.given.dataset_args
        return ids[0] if len(ids) == 1 else None, names[0] if names else None, configs[0] if configs else None

    def id_of(self, data: Mapping[str, Any]) -> str | None:
        """The Hub id of some data: as the data set itself knows it, else as it was given."""
        return str(data["id"]) if "id" in data else self.given_for(data)[0]

    def words_of(self, data: Mapping[str, Any]) -> list[str]:
        """The name of some data for people and its configuration, as Markdown; empty where it has no name."""
        _, given_name, given_config = self.given_for(data)
        known = self.id_of(data)
        name = linked(known, "datasets/") if known else md(given_name or "") if len(self.given.dataset) == 1 else ""
        config = data.get("config") or (given_config if name else None)
        return [part for part in (name, md(config) if config else "") if part]
