"""Conversations for TRL's SFTTrainer: the data, encoded once; the loss of the answers; and answers to fixed prompts."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import Trainer

from deeparc_hf.core.markdown import fenced, md
from deeparc_hf.core.plain_text import plain
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.observe.outputs import IGNORED

from .perplexity import Z, perplexity_of
from .results import Measured
from .splits import Splits

__all__ = [
    "Answers",
    "ConversationMeasure",
    "Prompt",
    "answers_section",
    "conversations",
    "encoded",
    "prompts_of",
    "sft_library",
    "take_template",
]

_MASKS = ("completion_mask", "assistant_masks")  # of TRL, by which labels are left out
_SHOWN, _LONGEST = 4, 600  # answers in a report, and the characters of each


@dataclass(frozen=True)
class Prompt:
    """A question as the model gets it, a text or messages, and the answer that the data gives, if any."""

    question: str | Sequence[Mapping[str, str]]
    answer: str = ""

    @property
    def text(self) -> str:
        """The question as a report shows it."""
        if isinstance(self.question, str):
            return self.question
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.question)


def conversations(
    splits: Splits, *, messages: str | None, prompt: str | None, completion: str | None, every_answer: bool
) -> Splits:
    """Splits in the form that TRL takes: "prompt" and "completion", or "messages" where every answer is learnt.

    Args:
        messages: column of conversations, lists of {"role", "content"} that end with an answer of the assistant.
        prompt, completion: columns of texts, in place of `messages`.
        every_answer: whether all answers of a conversation are learnt, and not the last one alone.

    Raises:
        ConfigError: if there are no such columns, or a row does not hold what it should.
    """
    if (prompt is None) != (completion is None) or (messages is None) == (prompt is None):
        raise ConfigError(
            "Give messages_column, or prompt_column and completion_column, found "
            f"messages_column={messages!r}, prompt_column={prompt!r}, completion_column={completion!r}."
        )
    if messages is None:
        if every_answer:
            raise ConfigError("every_answer is about conversations of several answers. Give messages_column.")
        splits.need_texts(prompt_column=prompt, completion_column=completion)
        return splits.each(lambda part: _columns(part, {prompt: "prompt", completion: "completion"}))
    splits.need(messages_column=messages)
    for use in ("train", "validation", "test"):
        _check_messages(getattr(splits, use), messages, use)
    if every_answer:
        return splits.each(lambda part: _columns(part, {messages: "messages"}))

    def last_answer(rows: list[Any]) -> dict[str, list[Any]]:
        return {"prompt": [row[:-1] for row in rows], "completion": [row[-1:] for row in rows]}

    return splits.each(
        lambda part: part.map(last_answer, batched=True, input_columns=[messages], remove_columns=part.column_names)
    )


def _columns(part: Any, names: Mapping[str | None, str]) -> Any:
    kept = part.select_columns(list(names))
    return kept.rename_columns({old: new for old, new in names.items() if old != new})


def _check_messages(part: Any, column: str, use: str) -> None:
    for number, row in enumerate(part.select_columns([column])[column]):
        whole = isinstance(row, list) and len(row) >= 2
        told = whole and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in row)
        if not told or row[-1]["role"] != "assistant" or not row[-1]["content"]:
            raise ConfigError(
                f"messages_column: row {number} of the {use} data is no conversation that ends with an answer, but "
                f"{plain(row, 120)}. Rows are lists of {{'role', 'content'}}, and the last role is 'assistant'."
            )


def prompts_of(splits: Splits, count: int, file: str | None, *, chat: bool) -> list[Prompt]:
    """The prompts that each model answers: the lines of a text file, else the first of the test data.

    Args:
        chat: whether a line is what a user says in a conversation, and not a text to go on from.

    Raises:
        ConfigError: if the file is not there, or empty.
    """
    if file is not None:
        asked = _lines(file)
        return [Prompt([{"role": "user", "content": line}] if chat else line) for line in asked[:count]]
    rows = splits.test.select(range(min(count, len(splits.test))))
    found = []
    for row in rows:
        question, answer = (
            (row["messages"][:-1], row["messages"][-1:])
            if "messages" in row
            else (
                row["prompt"],
                row["completion"],
            )
        )
        found.append(Prompt(question, answer if isinstance(answer, str) else answer[0]["content"]))
    return found


def block_prompts(test: Any, tokenizer: Any, count: int, file: str | None) -> list[Prompt]:
    """The texts that each model goes on from: the lines of a file, else the first halves of the first blocks of the
    test data, whose second halves are the answers.
    """
    if file is not None:
        return [Prompt(line) for line in _lines(file)[:count]]
    blocks = [test[number]["input_ids"] for number in range(min(count, len(test)))]
    halves = [(block[: len(block) // 2], block[len(block) // 2 :]) for block in blocks]
    return [Prompt(*(tokenizer.decode(half, skip_special_tokens=True) for half in pair)) for pair in halves]


def _lines(file: str) -> list[str]:
    path = Path(file)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    if not any(line.strip() for line in lines):
        raise ConfigError(f"prompts_file: {file} is no file with a prompt in each line.")
    return [line for line in lines if line.strip()]


def take_template(tokenizer: Any, training: Any, talks: bool) -> None:
    """Give the tokenizer the chat template that `chat_template_path` of TRL's settings names, and take it out of them:
    TRL would read it again for each training.

    Args:
        talks: whether the data are conversations, which need a template.

    Raises:
        ConfigError: if it is no file of a template (TRL would take the tokens of another model along, which the model
            that is compared with has not), or there is none where one is needed.
    """
    given, training.chat_template_path = training.chat_template_path, None
    if given is not None:
        if Path(given).suffix not in (".jinja", ".j2") or not Path(given).is_file():
            raise ConfigError(f"chat_template_path must be a .jinja file here, found {given}.")
        tokenizer.chat_template = Path(given).read_text("utf-8")
    if talks and tokenizer.chat_template is None:
        raise ConfigError(
            "The tokenizer has no chat template, and messages_column holds conversations. Give chat_template_path, a "
            "model with a template, or prompt_column and completion_column."
        )


def encoded(splits: Splits, model: Any, tokenizer: Any, training: Any) -> Splits:
    """The splits as TRL's SFTTrainer encodes them, once for all trainings, with the labels of those tokens that count.
    Packing is left to the trainings.

    Args:
        training: `SFTConfig`.

    Raises:
        ConfigError: if TRL refuses the data.
    """
    trl = sft_library()
    args = dataclasses.replace(training, packing=False, eval_packing=False, padding_free=False)
    data = {"train_dataset": splits.train, "eval_dataset": {"validation": splits.validation, "test": splits.test}}
    try:
        trainer = trl.SFTTrainer(model, args, processing_class=tokenizer, **data)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"TRL cannot encode the data: {' '.join(str(error).split())}") from error
    parts = {"train": trainer.train_dataset, **trainer.eval_dataset}
    for use, part in parts.items():
        labelled = part if "labels" in part.column_names else part.map(_labelled)
        parts[use] = labelled.select_columns(["input_ids", "labels"])
        if not any(label != IGNORED for labels in parts[use]["labels"] for label in labels[1:]):
            raise ConfigError(
                f"No token of an answer of the {use} data is within max_length ({training.max_length}). Give more."
            )
    return dataclasses.replace(splits, **parts)


def _labelled(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Labels of a row by the masks of an older TRL."""
    masks = [row[name] for name in _MASKS if row.get(name) is not None]
    counts = [all(marks) for marks in zip(*masks, strict=True)] if masks else [True] * len(row["input_ids"])
    pairs = zip(row["input_ids"], counts, strict=True)
    return {"labels": [token if counted else IGNORED for token, counted in pairs]}


class ConversationMeasure:
    """Measures a Trainer's model: the mean loss of a token that counts, and perplexity, its exponential, with 95 %
    intervals over the conversations (of a ratio of sums, by linearization).
    """

    def __init__(self, test: Any) -> None:
        self._test = test

    def __call__(self, trainer: Trainer) -> Measured:
        """Loss and perplexity of the model as it is."""
        sums, counts = self._sums(trainer)
        total, n = sum(counts), len(sums)
        loss = sum(sums) / total
        figures, intervals = {"loss": loss, "perplexity": perplexity_of(loss)}, {}
        if n > 1:
            apart = [part - loss * count for part, count in zip(sums, counts, strict=True)]
            half = Z * statistics.stdev(apart) / math.sqrt(n) / (total / n)
            intervals = {
                "loss": (loss - half, loss + half),
                "perplexity": (perplexity_of(loss - half), perplexity_of(loss + half)),
            }
        return Measured(figures, n, intervals)

    def _sums(self, trainer: Trainer) -> tuple[list[float], list[float]]:
        """The summed loss and the number of labels of each conversation."""
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model).eval()
        rows = DataLoader(self._test, batch_size=trainer.args.eval_batch_size, collate_fn=self._collate)
        sums, counts = [], []
        for batch in accelerator.prepare(rows):
            labels = batch.pop("labels")[:, 1:]
            with torch.no_grad():
                scores = model(**batch).logits[:, :-1]
            losses = functional.cross_entropy(
                scores.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
            pair = torch.stack([losses.sum(1), (labels != IGNORED).sum(1).float()], dim=1)
            for total, count in accelerator.gather_for_metrics(pair).tolist():
                sums.append(total)
                counts.append(count)
        return sums, counts

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
        padded = partial(pad_sequence, batch_first=True)
        mask = padded([torch.ones_like(each) for each in ids])  # what stands where it is 0 is not looked at
        return {"input_ids": padded(ids), "attention_mask": mask, "labels": padded(labels, padding_value=IGNORED)}


class Answers:
    """The answers of a Trainer's model to fixed prompts: the likeliest token each time, the same for all models."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {max_new_tokens}.")
        self._prompts, self._tokenizer, self._longest = list(prompts), tokenizer, max_new_tokens

    def __call__(self, trainer: Trainer) -> list[dict[str, str]]:
        """For each prompt "prompt", "generated" and "reference"."""
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        return [
            {"prompt": prompt.text, "generated": self._answer(model, prompt), "reference": prompt.answer}
            for prompt in self._prompts
        ]

    def _answer(self, model: Any, prompt: Prompt) -> str:
        inputs = {name: value.to(model.device) for name, value in self._inputs(prompt).items()}
        known = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        pad = next((token for token in known if token is not None), None)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
        with torch.no_grad():
            ids = model.generate(**inputs, **greedy, max_new_tokens=self._longest, pad_token_id=pad)
        text: str = self._tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        question = prompt.question
        if isinstance(question, str):
            given = self._tokenizer(question, return_tensors="pt")
        else:
            given = self._tokenizer.apply_chat_template(
                list(question), add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        return {name: given[name] for name in ("input_ids", "attention_mask")}


def answers_section(texts: Mapping[str, Sequence[Mapping[str, str]]]) -> list[str]:
    """A report's section of the first answers: for each prompt what each model said.

    Args:
        texts: by name of the model what `Answers` gave.
    """
    count = min((len(answers) for answers in texts.values()), default=0)
    if not count:
        return []
    parts = ["## Answers", "Greedy, the same prompts for each model. All of them lie in `texts`."]
    for number in range(min(count, _SHOWN)):
        first = next(iter(texts.values()))[number]
        parts.append(fenced(_short(first["prompt"]), "text"))
        said = [(name, answers[number]["generated"]) for name, answers in texts.items()]
        if first["reference"]:
            said.append(("in the data", first["reference"]))
        parts.append("\n".join(f"- {md(name)}: {md(_short(text)) or '(nothing)'}" for name, text in said))
    return parts


def sft_library() -> Any:
    """The library trl.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise MissingDependencyError(
            f'Chat data are trained on by TRL ({error.name} is missing): pip install "deeparc_hf[chat]".'
        ) from error
    return trl


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
