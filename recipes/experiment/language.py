"""What every recipe of language models can measure beside the loss. Imports no library: recipes begin with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from deeparc_hf.core.settings import setting
from deeparc_hf.errors import ConfigError

__all__ = ["EvaluationArguments"]


@dataclass
class EvaluationArguments:
    """What each model is asked, before and after."""

    harness_tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "tasks of lm-evaluation-harness, by name; their data come from the Hub"},
    )
    harness_folder: str | None = setting(None, "folder of local task files of the harness (.yaml)")
    harness_limit: int | None = setting(None, "rows of each task at most")
    harness_fewshot: int | None = setting(None, "examples before each question; default: as the task says")
    num_prompts: int = setting(4, "prompts that each model answers: of the file, else the first of the test data")
    prompts_file: str | None = setting(None, "text file with a prompt in each line")
    max_new_tokens: int = setting(64, "longest answer, in tokens")

    def __post_init__(self) -> None:
        if self.num_prompts < 0:
            raise ConfigError(f"num_prompts must be 0 or more, found {self.num_prompts}.")
