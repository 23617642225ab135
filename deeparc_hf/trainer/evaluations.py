"""The evaluations of one training: what they are of, which of them count, and what the Trainer's logs show of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainingArguments

from ..core.environment import hardware
from ..reports.attempts import Evaluation
from ..reports.provenance import VALIDATION, origin_of, same_data, training_settings

__all__ = ["Evaluations", "compared_metrics", "last_evaluation", "value_text"]


class Evaluations:
    """What the figures of one training are of, for its reports and for the record.

    Attributes:
        loader: the Trainer's data loader of its first evaluation; None before.
    """

    def __init__(self, args: TrainingArguments, loader: Any) -> None:
        self.loader: Any = None
        self._final: list[Evaluation] = []  # evaluations after the training
        self._training = training_settings(args)
        # auto_find_batch_size may have made it smaller
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        self._training["training_batch"] = size if isinstance(size, int) else self._training["training_batch"]
        self._hardware = hardware(args.device)
        self._validation: set[Any] = set()
        self._data = {"training": origin_of(getattr(loader, "dataset", None))}

    def notice(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Take note of the data of an evaluation. Those with a prefix of their own are of other data (a test set)."""
        if not any(key.startswith("eval_") for key in metrics):
            return
        self.loader = loader if self.loader is None else self.loader
        dataset = getattr(loader, "dataset", None)
        self._validation.add(same_data(dataset))
        self._data.setdefault("evaluation", origin_of(dataset))

    def evaluation(self, metrics: Mapping[str, Any], loader: Any, mark: str | None, **known: Any) -> Evaluation:
        """An evaluation: its figures, the data, and a mark of the weights that it is of (None: not known)."""
        dataset = getattr(loader, "dataset", None)
        data = origin_of(dataset)
        if dataset is not None and same_data(dataset) in self._validation:
            data["use"] = VALIDATION
        figures = {key: float(v) for key, v in metrics.items() if isinstance(v, (int, float)) and key != "epoch"}
        return Evaluation.of(figures, data=data, mark=mark, **known)

    def conclude(self, metrics: Mapping[str, Any], loader: Any, mark: str | None) -> Evaluation:
        """Note an evaluation after the training, in the place of an earlier one with the same metrics and data."""
        new = self.evaluation(metrics, loader, mark)
        others = [e for e in self._final if e.figures.keys() != new.figures.keys() or e.data != new.data]
        self._final = [*others, new]
        return new

    def take_over(self, data: Mapping[str, Any], validation: Iterable[str], epochs: float) -> None:
        """Take over what earlier links of a training of so many epochs know of its evaluations."""
        self._data = {**self._data, **data}
        self._validation |= set(validation)
        self._training["epochs"] = epochs

    def know_as_validation(self, data: Any) -> None:
        """Take note of data that earlier links have evaluated on: a data set, or several by name."""
        for dataset in data.values() if isinstance(data, dict) else [data]:
            self._validation.add(same_data(dataset))

    @property
    def validation(self) -> list[str]:
        """What tells the data sets that were evaluated on, in another process too."""
        return sorted(known for known in self._validation if isinstance(known, str))

    @property
    def data(self) -> dict[str, Any]:
        """The data, for the record: by use, what is known of it."""
        return {use: dict(known) for use, known in self._data.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for a report."""
        final = [evaluation.to_dict() for evaluation in self._final]
        return {"training": dict(self._training), "data": self.data, "final": final, "hardware": dict(self._hardware)}


def last_evaluation(evaluations: Iterable[Evaluation], step: int | None = None) -> Evaluation | None:
    """The last evaluation on the Trainer's evaluation data, or the one at a step."""
    own = [evaluation for evaluation in evaluations if evaluation.is_of_evaluation_data]
    own = [evaluation for evaluation in own if evaluation.step == step] or own
    return own[-1] if own else None


def compared_metrics(
    before: Evaluation | None, after: Evaluation | None, metric: str | None
) -> dict[str, dict[str, float | None]]:
    """The metrics by which evaluations are compared, each before and after: the named one, or the first that is no
    loss; and the loss.
    """
    figures = {}
    for place, evaluation in (("before", before), ("after", after)):
        kept = {} if evaluation is None else evaluation.lasting
        figures[place] = {key.removeprefix("eval_"): v for key, v in kept.items() if key.startswith("eval_")}
    names = {**figures["before"], **figures["after"]}
    named = [name for name in names if metric is not None and name == metric.removeprefix("eval_")]
    others = [name for name in names if not name.endswith("loss")]
    shown = dict.fromkeys([*(named or others[:1]), *(name for name in names if name == "loss")])
    return {name: {place: values.get(name) for place, values in figures.items()} for name in shown}


def value_text(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
