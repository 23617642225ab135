"""What the figures of one training are of: its data and settings, and the evaluations after its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..provenance import dataset_facts, training_facts

__all__ = ["RunFacts", "figures_of", "lasting"]

_SPEED = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")


class RunFacts:
    """Facts about one training, for its reports and for the record.

    Args:
        args: the Trainer's arguments.
        loader: the training's data loader.

    Attributes:
        final: evaluations after the training: their metrics and data.
    """

    def __init__(self, args: TrainingArguments, loader: Any) -> None:
        self.final: list[dict[str, Any]] = []
        self._training = training_facts(args)
        self._data = {"training": dataset_facts(getattr(loader, "dataset", None))}

    def notice(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Take note of the data of the first evaluation. Those with a prefix of their own are of other data (a test set, say)."""
        if "evaluation" not in self._data and any(key.startswith("eval_") for key in metrics):
            self._data["evaluation"] = dataset_facts(getattr(loader, "dataset", None))

    def conclude(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note an evaluation after the training's end; one with the same metrics stands for the earlier one."""
        figures = figures_of(metrics)
        self.final = [e for e in self.final if e["metrics"].keys() != figures.keys()]
        self.final.append({"metrics": figures, "data": dataset_facts(getattr(loader, "dataset", None))})

    @property
    def data(self) -> dict[str, Any]:
        """The data, for the record: by use, what is known of it."""
        return {use: dict(facts) for use, facts in self._data.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a report."""
        return {"training": dict(self._training), "data": self.data, "final": [dict(entry) for entry in self.final]}


def figures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics of an evaluation."""
    return {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float)) and key != "epoch"}


def lasting(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that say something of the model: finite, and no times."""
    return {key: value for key, value in figures.items() if not key.endswith(_SPEED) and abs(value) < float("inf")}
