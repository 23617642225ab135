"""Language models are asked tasks of the harness and fixed prompts, beside the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from .chat import Answers, Prompt
from .harness import Harness
from .language import EvaluationArguments
from .results import Measured

__all__ = ["Asked"]


class Asked:
    """Asks a Trainer's model the tasks and the prompts, for `Experiment.once`.

    Args:
        chat: whether the model is one of conversations: the tasks are put through its chat template.
        processes: of the experiment.

    Attributes:
        notes: how it was asked, for the report.
    """

    def __init__(
        self, given: EvaluationArguments, prompts: Sequence[Prompt], tokenizer: Any, *, chat: bool, processes: int
    ) -> None:
        self._tokenizer = tokenizer
        self._answers = Answers(prompts, tokenizer, given.max_new_tokens) if prompts else None
        self._harness, self.notes = None, []
        if given.harness_tasks:
            asked = {"limit": given.harness_limit, "fewshot": given.harness_fewshot, "chat": chat}
            folder = given.harness_folder
            self._harness = Harness(given.harness_tasks, folder=folder, processes=processes, **asked)
            self.notes = [self._harness.told]

    def __call__(self, trainer: Trainer) -> Measured:
        """The metrics of the tasks with their data, and the answers."""
        texts = [] if self._answers is None else self._answers(trainer)
        if self._harness is None:
            return Measured({}, 0, texts=texts)
        found = self._harness(trainer, self._tokenizer)
        return Measured(found.metrics, 0, found.intervals, texts=texts, data=found.data)
