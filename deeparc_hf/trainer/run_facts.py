"""What the figures of one training are of: its data and settings, and the evaluations after its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..checkpoint.weights_mark import mark_of_model
from ..core.environment import hardware
from ..reports.provenance import TIMES, VALIDATION, dataset_facts, same_data, training_facts

__all__ = ["RunFacts", "figures_of", "lasting"]


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
        # auto_find_batch_size may have made it smaller
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        self._training["training_batch"] = size if isinstance(size, int) else self._training["training_batch"]
        self._hardware = hardware(args.device)
        self._validation: set[Any] = set()
        self._data = {"training": dataset_facts(getattr(loader, "dataset", None))}

    def notice(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Take note of the data of an evaluation in the training. Those with a prefix of their own are of other data (a
        test set, say).
        """
        if not any(key.startswith("eval_") for key in metrics):
            return
        dataset = getattr(loader, "dataset", None)
        self._validation.add(same_data(dataset))
        self._data.setdefault("evaluation", dataset_facts(dataset))

    def evaluation(self, model: nn.Module, metrics: Mapping[str, Any], loader: Any) -> dict[str, Any]:
        """An evaluation: its figures, the data, and a mark of the weights that it is of."""
        dataset = getattr(loader, "dataset", None)
        data = dataset_facts(dataset)
        if dataset is not None and same_data(dataset) in self._validation:
            data["use"] = VALIDATION
        return {"metrics": figures_of(metrics), "data": data, "weights": mark_of_model(model)}

    def conclude(self, model: nn.Module, metrics: Mapping[str, Any], loader: Any) -> dict[str, Any]:
        """Note an evaluation after the training's end; one with the same metrics and data stands for the earlier
        one.
        """
        found = self.evaluation(model, metrics, loader)
        same = [e for e in self.final if e["metrics"].keys() == found["metrics"].keys() and e["data"] == found["data"]]
        self.final = [e for e in self.final if e not in same]
        self.final.append(found)
        return found

    @property
    def data(self) -> dict[str, Any]:
        """The data, for the record: by use, what is known of it."""
        return {use: dict(facts) for use, facts in self._data.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a report."""
        final = [dict(entry) for entry in self.final]
        return {"training": dict(self._training), "data": self.data, "final": final, "hardware": dict(self._hardware)}


def figures_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the metrics of an evaluation."""
    return {key: float(value) for key, value in metrics.items() if isinstance(value, (int, float)) and key != "epoch"}


def lasting(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that say something of the model: finite, and no times."""
    return {key: value for key, value in figures.items() if not key.endswith(TIMES) and abs(value) < float("inf")}
