"""Tasks of EleutherAI's lm-evaluation-harness (`lm_eval`), asked of a live model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from deeparc_hf.core.plain_text import did_you_mean
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.observe.forward import evaluating

from .perplexity import Z

__all__ = ["Answered", "Harness"]

_UNFILTERED = "none"


@dataclass(frozen=True)
class Answered:
    """What the tasks of the harness gave.

    Attributes:
        metrics: by name of the task and the metric ("arc_easy acc_norm"; with the filter where the task has one).
        intervals: 95 % intervals, from the standard errors that the harness gives.
        data: for each metric what is known of the task's data ("id", "config", "split", "rows").
    """

    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    data: Mapping[str, Mapping[str, Any]]


class Harness:
    """Tasks by name, of the harness (their data come from the Hub) or of local task files.

    Args:
        tasks: names of tasks or groups.
        folder: folder of local task files (.yaml), besides those of the harness.
        limit: rows of each task at most; None: all.
        fewshot: examples before each question; None: as the task says.
        chat: whether questions are put through the tokenizer's chat template.
        processes: of the experiment.

    Attributes:
        told: the version of the harness and how it was asked, for the report.

    Raises:
        ConfigError: if there is no such task or folder, or there are several processes.
        MissingDependencyError: if lm_eval is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        folder: str | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
        chat: bool = False,
        processes: int = 1,
    ) -> None:
        if processes > 1:
            raise ConfigError(
                f"harness_tasks are asked by one process, found {processes}. Leave them out here, and ask the finished "
                "checkpoint: lm_eval --model hf --model_args pretrained=FOLDER."
            )
        self._library = _lm_eval()
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"harness_folder must be a folder of task files, found {folder}.")
        if limit is not None and limit < 1:
            raise ConfigError(f"harness_limit must be at least 1, found {limit}.")
        self._manager = self._library.tasks.TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and not set(tasks) <= set(self._manager.all_tasks):
            self._manager = self._library.tasks.TaskManager(include_path=folder)  # reads thousands of files
        known = [*self._manager.all_tasks]
        for task in tasks:
            if task not in known:
                raise ConfigError(
                    f"harness_tasks: the harness has no task {task!r}.{did_you_mean(task, known)} Local task files are "
                    "found by harness_folder."
                )
        self._tasks = list(tasks)
        self._asked = {"limit": limit, "num_fewshot": fewshot, "apply_chat_template": chat}
        self.told = f"lm_eval {self._library.__version__}: {', '.join(tasks)}"

    def __call__(self, trainer: Trainer, tokenizer: Any) -> Answered:
        """Ask a Trainer's model.

        Raises:
            ConfigError: if the data of a task cannot be had.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        level = logging.getLogger("lm_eval").level
        try:
            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            with evaluating(model):  # the harness seeds all random generators
                found = self._ask(model, tokenizer, trainer.args.per_device_eval_batch_size)
        except (OSError, ConnectionError, ValueError) as error:
            raise ConfigError(
                f"The tasks {', '.join(self._tasks)} cannot be asked ({type(error).__name__}: "
                f"{' '.join(str(error).split())}). Their data come from the Hub, unless the task file names local ones."
            ) from error
        finally:
            logging.getLogger("lm_eval").setLevel(level)
        return _answered(found)

    def _ask(self, model: Any, tokenizer: Any, batch_size: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        settings = {"task_manager": self._manager, "log_samples": False, "bootstrap_iters": 1000, **self._asked}
        return self._library.simple_evaluate(model=asked, tasks=self._tasks, **settings)


def _answered(found: Mapping[str, Any]) -> Answered:
    metrics, intervals, data = {}, {}, {}
    for task, figures in found["results"].items():
        config = found["configs"].get(task, {})
        rows = found["n-samples"].get(task, {}).get("effective")
        path = str(config.get("dataset_path"))
        # else datasets' reader of local files, such as "json", or a folder
        on_hub = not Path(path).exists() and ("/" in path or "data_files" not in (config.get("dataset_kwargs") or {}))
        origin = {"id": path, "config": config.get("dataset_name")} if on_hub else {}
        origin |= {"split": config.get("test_split") or config.get("validation_split"), "rows": rows}
        for key, value in figures.items():
            metric, sign, filtered = key.partition(",")
            if not sign or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"{task} {metric}" + (f" ({filtered})" if filtered != _UNFILTERED else "")
            metrics[name] = float(value)
            error = figures.get(f"{metric}_stderr,{filtered}")
            if isinstance(error, (int, float)):
                intervals[name] = (float(value - Z * error), float(value + Z * error))
            data[name] = {part: told for part, told in origin.items() if told is not None}
    return Answered(metrics, intervals, data)


def _lm_eval() -> Any:
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise MissingDependencyError(
            f'harness_tasks need lm_eval ({error.name} is missing): pip install "deeparc_hf[harness]".'
        ) from error
    return lm_eval
