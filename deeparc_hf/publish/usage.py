"""The code in a card: how to use a checkpoint, for the task of its model's class, and how to make it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ..core.markdown import fenced, folded, json_block, plain, shared
from ..core.settings import Settings
from ..pruning.config import MPruneConfig
from ..sparsity.config import WandaConfig
from .content import CardContent
from .encoders import TASKS

__all__ = ["NOT_ON_THE_HUB", "reproduce", "task_of", "usage"]

# task of the Hub, auto class, and transformers' own table of the classes behind it; the first that has a class counts
_TABLES = (
    ("text-classification", "AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    ("token-classification", "AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
    ("question-answering", "AutoModelForQuestionAnswering", "QUESTION_ANSWERING"),
    ("multiple-choice", "AutoModelForMultipleChoice", "MULTIPLE_CHOICE"),
    ("text-generation", "AutoModelForCausalLM", "CAUSAL_LM"),
    ("text2text-generation", "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("fill-mask", "AutoModelForMaskedLM", "MASKED_LM"),
    ("image-classification", "AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
    ("audio-classification", "AutoModelForAudioClassification", "AUDIO_CLASSIFICATION"),
    ("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
    ("automatic-speech-recognition", "AutoModelForCTC", "CTC"),
    ("image-text-to-text", "AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT"),
)
NOT_ON_THE_HUB = ("multiple-choice", "text2text-generation")
_PACKAGE = "import deeparc_hf  # which drops the blocks as the model is built: without it the load fails"
_PIPELINES = {  # with a pipeline in transformers 5, and what to give it
    "automatic-speech-recognition": 'print(model("speech.wav")["text"])  # ffmpeg reads the file',
    "fill-mask": 'print(model(f"This sentence has a {model.tokenizer.mask_token}."))',
    "image-classification": 'print(model("image.jpg"))',
    "text-classification": 'print(model("A sentence to classify."))',
    "text-generation": 'print(model("Once upon a time", max_new_tokens=20))',
    "token-classification": 'print(model("A sentence with names in it."))',
}

_NEEDED = {"automatic-speech-recognition": "processor", "image-classification": "image processor"}  # else a tokenizer


def task_of(content: CardContent) -> tuple[str | None, str]:
    """Task and auto class of a model."""
    if content.library == "timm":
        return "image-feature-extraction" if content.headless else "image-classification", ""
    task, auto_class = _classes().get(content.architecture or "", (None, "AutoModel"))
    return TASKS.get(content.encoder or "", task), auto_class


@lru_cache(maxsize=1)
def _classes() -> dict[str, tuple[str, str]]:
    """Task and auto class by the name of a model's class."""
    from transformers.models.auto import modeling_auto

    tasks: dict[str, tuple[str, str]] = {}
    for task, auto_class, name in _TABLES:
        for classes in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").values():
            for each in (classes,) if isinstance(classes, str) else classes:
                tasks.setdefault(each, (task, auto_class))
    return tasks


def usage(content: CardContent, repo_id: str, revision: str | None = None) -> str:
    """Code that loads the checkpoint by stock libraries (after an import of the package, where it needs that) and runs
    it.
    """
    if content.needs_package:
        return f"{_PACKAGE}\n{_usage(dataclasses.replace(content, processor=None), repo_id, revision)}"
    return _usage(content, repo_id, revision)


def _usage(content: CardContent, repo_id: str, revision: str | None) -> str:
    task, auto_class = task_of(content)
    at = f"hf-hub:{repo_id}@{revision}" if revision else f"hf-hub:{repo_id}"
    name = json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision else "")
    if content.library == "timm":
        return (
            "import timm\nimport torch\n\n"
            f"model = timm.create_model({json.dumps(at)}, pretrained=True).eval()\n"
            "with torch.no_grad():\n"
            "    print(model(torch.randn(1, "
            f"*model.pretrained_cfg['input_size'])){'.shape' if content.headless else '.argmax(-1)'})"
        )
    if content.encoder is not None:
        run = (
            'model.predict([("A question?", "A text that may answer it.")])'
            if content.encoder == "CrossEncoder"
            else 'model.encode(["A sentence.", "Another one."]).shape'
        )
        return f"from sentence_transformers import {content.encoder}\n\nmodel = {content.encoder}({name})\nprint({run})"
    needed = _NEEDED.get(task or "", "tokenizer")
    if task in _PIPELINES and content.processor in (needed, "processor"):
        return f'from transformers import pipeline\n\nmodel = pipeline("{task}", {name})\n{_PIPELINES[task]}'
    tokenized = content.processor in ("tokenizer", "processor")
    lines = [f"from transformers import {auto_class}{', AutoTokenizer' if tokenized else ''}", ""]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained({name})"] if tokenized else []
    lines.append(f"model = {auto_class}.from_pretrained({name})")
    if task == "text2text-generation" and tokenized:
        lines += [
            'inputs = tokenizer("A text of the kind that the model was trained on.", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))",
        ]
    else:
        lines.append("print(model.config)")
    return "\n".join(lines)


def reproduce(content: CardContent, repo_id: str) -> str:
    """The settings, and the ways to make the model, or its structure, again."""
    parts = []
    if content.given.command:
        parts += ["Made by:", fenced(content.given.command, "bash")]
    if content.removed and not content.compared:
        chosen = {name: list(blocks) for name, blocks in content.record.removed.items() if blocks}
        by_hand = f"from deeparc_hf import remove_blocks\n\nremove_blocks(model, {_python(chosen)})"
        parts.append("The blocks were chosen by hand, not found by comparing them. On the original model:")
        parts.append(fenced(by_hand, "python"))
    elif content.config is not None:
        parts += _pruning(content)
    if content.sparsity is not None:
        zeroing = _of_use(WandaConfig, content.sparsity.config.to_dict(), content.zeroed_in_training)
        parts += ["Settings of the zeroing:", json_block(_changed(WandaConfig, zeroing))]
        parts.append(folded("All settings", json_block(zeroing)))
    if content.training:
        settings = {key.replace("_", " "): value for key, value in content.training.items()}
        parts.append(f"The training: {shared(settings)}.")
    auto_class = task_of(content)[1]
    if content.removed and content.base and auto_class:
        again = (
            f"from deeparc_hf import PrunedConfig, load_pruned\nfrom transformers import {auto_class}\n\n"
            f"record = PrunedConfig.from_pretrained({json.dumps(repo_id)})\n"
            f"model = load_pruned({auto_class}, {json.dumps(content.base)}, record)"
        )
        parts += ["The same blocks of the base model, with the base's weights:", fenced(again, "python")]
    return "\n\n".join(parts) or "How the model was made was not noted."


def _pruning(content: CardContent) -> list[str]:
    """The settings of the last pruning, and the lines that give them, without what only a training uses."""
    in_training = content.from_run or bool({"stages", "metrics"} & set(content.last_pruning))
    noted = content.config or {}
    ours = True
    try:
        config = MPruneConfig.from_dict(noted).to_dict()
    except (TypeError, ValueError):  # of a record of another kind: as far as the names are known
        ours = False
        config = {spec.name: noted[spec.name] for spec in dataclasses.fields(MPruneConfig) if spec.name in noted}
    config = _of_use(MPruneConfig, config, in_training)
    changed = _changed(MPruneConfig, config)
    parts = ["All settings are the defaults."]
    if changed:
        parts = ["Settings of the pruning that are not the defaults:", json_block(changed)]
    parts.append(folded("All settings", json_block(config)))
    if content.from_run:
        settings = ", ".join(f"{key}={_python(value)}" for key, value in changed.items())
        callback = f"from deeparc_hf import MPruneCallback\n\ncallback = MPruneCallback({settings})"
        return [*parts, "In a Trainer:", fenced(callback, "python")]
    if in_training or not ours or not {"similarity", "calibration_samples"} <= set(noted):
        return parts
    several = len(content.record.iterations) > 1
    command = fenced(_command(changed, None if several else content.base), "bash")
    title = "The last pruning, of the model that the one before it left:" if several else "Without a Trainer:"
    return [*parts, title, command]


def _of_use(settings: type[Settings], config: Mapping[str, Any], in_training: bool) -> dict[str, Any]:
    for_trainers = {spec.name for spec in dataclasses.fields(settings) if spec.metadata.get("trainer")}
    return {key: value for key, value in config.items() if in_training or key not in for_trainers}


def _changed(settings: type[Settings], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(settings)}
    return {key: value for key, value in config.items() if value not in (defaults.get(key), None, [], ())}


def _python(value: Any) -> str:
    """A value of JSON types as Python writes it; texts are shortened."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(key)}: {_python(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(plain(value)) if isinstance(value, str) else repr(value)


def _command(settings: Mapping[str, Any], base: str | None) -> str:
    """The command line that removes the same blocks."""
    words = ["deeparc", "prune", base or "MODEL", "--data", "TRAINING_DATA"]
    for key, value in settings.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            words += [word for name, count in value.items() for word in (option, f"{name}={count}")]
        elif isinstance(value, (list, tuple)):
            words += [word for entry in value for word in (option, str(entry))]
        else:
            words += [option, str(value)]
    return shlex.join([*map(plain, words), "-o", "pruned"])
