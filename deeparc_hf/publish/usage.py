"""How to use a checkpoint, as code that runs: for the task that the model's class is for."""

from __future__ import annotations

import json
from functools import lru_cache

from .content import CardContent

__all__ = ["pipeline_tag", "task_of", "usage"]

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
_ON_THE_HUB = {  # tasks that the Hub lists
    "audio-classification",
    "automatic-speech-recognition",
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "image-feature-extraction",
    "image-text-to-text",
    "question-answering",
    "text-classification",
    "text-generation",
    "token-classification",
}
_PIPELINES = {  # with a pipeline in transformers 5, and what to give it
    "fill-mask": 'print(model(f"This sentence has a {model.tokenizer.mask_token}."))',
    "image-classification": 'print(model("image.jpg"))',
    "text-classification": 'print(model("A sentence to classify."))',
    "text-generation": 'print(model("Once upon a time", max_new_tokens=20))',
    "token-classification": 'print(model("A sentence with names in it."))',
}
_NEEDS = {"image-classification": "image processor"}


def task_of(content: CardContent) -> tuple[str | None, str]:
    """Task and auto class of a model."""
    if content.library == "timm":
        return "image-feature-extraction" if content.headless else "image-classification", ""
    return _classes().get(content.architecture or "", (None, "AutoModel"))


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


def pipeline_tag(content: CardContent) -> str | None:
    """The task, where it is one of the Hub's."""
    task = task_of(content)[0]
    return task if task in _ON_THE_HUB else None


def usage(content: CardContent, repo_id: str, revision: str | None = None) -> str:
    """Code that loads the checkpoint by stock libraries and runs it."""
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
    fits = content.processor == _NEEDS.get(task or "", "tokenizer")
    if task in _PIPELINES and fits:
        return f'from transformers import pipeline\n\nmodel = pipeline("{task}", {name})\n{_PIPELINES[task]}'
    if task == "text2text-generation" and fits:
        return (
            f"from transformers import {auto_class}, AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
            f"model = {auto_class}.from_pretrained({name})\n"
            'inputs = tokenizer("A text of the kind that the model was trained on.", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))"
        )
    lines = [f"from transformers import {auto_class}", "", f"model = {auto_class}.from_pretrained({name})"]
    if content.processor == "tokenizer":
        lines[0] += ", AutoTokenizer"
        lines.insert(2, f"tokenizer = AutoTokenizer.from_pretrained({name})")
    return "\n".join([*lines, "print(model.config)"])
