"""Speech recognition by encoder-decoders such as Whisper: recordings and transcripts made into what they take, word
error rates of what they hear, and transcripts of a teacher to train on.

Error rates are those of all texts together: wrong, missing and added words (characters) over the words of the
references, by evaluate where it has its scripts (`metrics.Metrics`), else, and for intervals, by jiwer. Intervals are
of a bootstrap over the recordings (Bisani & Ney 2004, doi 10.1109/ICASSP.2004.1326009). `wer` and `cer` are of
normalized texts (lower case, no punctuation, of English one spelling and numbers as digits: Radford et al. 2022, arXiv
2212.04356, appendix C), `wer_ortho` of the texts as they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, WhisperProcessor
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from deeparc_hf.errors import ConfigError, MissingDependencyError

from .audio import read_sound, seconds_of
from .metrics import Metrics
from .results import Row
from .seq2seq import GenerationMeasure, drawn_sums, texts_of, write_scores
from .splits import Splits

__all__ = [
    "TITLES",
    "Hearing",
    "SpeechCollator",
    "SpeechEncoder",
    "SpeechMeasure",
    "SpeechScores",
    "error_rates",
    "word_error_rates",
    "write_speech_scores",
]

TITLES = {"wer": "WER", "wer_ortho": "WER, texts as they are", "cer": "CER"}
# languages without spaces between words: each letter counts as one
_LETTERS = ("zh", "ja", "th", "lo", "my", "yue")
Normalizer = Callable[[str], str]


@dataclass(frozen=True)
class Hearing:
    """How a Whisper is asked to hear.

    Attributes:
        processor: its tokenizer and feature extractor, which are saved beside each model.
        start: the token that the model's decoder starts with.
        longest: the most tokens of a transcript.
        language, task: what is asked for; None for English-only models.
        normalize: what texts go through before they are compared.
        told: the same in words.
    """

    processor: Any
    start: int
    longest: int
    language: str | None
    task: str | None
    normalize: Normalizer
    told: str

    @classmethod
    def of(cls, model: str, revision: str | None, language: str | None, task: str) -> Hearing:
        """Of a model by its Hub id or folder.

        Raises:
            ConfigError: if it is multilingual and no language is given, or it cannot do what is asked for.
        """
        config = AutoConfig.from_pretrained(model, revision=revision)
        longest = getattr(config, "max_target_positions", None)
        if config.model_type != "whisper" or longest is None:
            raise ConfigError(f"This recipe is for Whisper and what was made of it, found a {config.model_type} model.")
        processor = WhisperProcessor.from_pretrained(model, revision=revision)
        try:
            generation = GenerationConfig.from_pretrained(model, revision=revision)
        except OSError:  # a folder with a config alone
            generation = GenerationConfig()
        asked = _asked_for(generation, language, task)
        if asked is not None:
            processor.tokenizer.set_prefix_tokens(language=asked[0], task=asked[1])
        written = "en" if asked is None or asked[1] == "translate" else asked[0]
        start = config.decoder_start_token_id
        return cls(processor, start, longest, *(asked or (None, None)), *_normalizer(processor.tokenizer, written))

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def features(self) -> Any:
        return self.processor.feature_extractor

    def asked(self, load: Callable[[str], Any]) -> Callable[[str], Any]:
        """A loader of models that hear so; those saved tell a pipeline the same."""

        def loaded(name: str) -> Any:
            model = load(name)
            if self.language is not None:
                model.generation_config.language, model.generation_config.task = self.language, self.task
                model.generation_config.forced_decoder_ids = None  # what older checkpoints say instead
            return model

        return loaded

    def labels(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of transcripts, without that which the model puts before them itself."""
        found = self.tokenizer(list(texts))["input_ids"]
        return [ids[1:] if ids[:1] == [self.start] else ids for ids in found]

    def fitting(self, splits: Splits, audio: str, text: str) -> tuple[Splits, str | None]:
        """The splits with the columns `labels` and `seconds` beside the recordings, without the rows that the model
        cannot take: recordings longer than it hears at once, transcripts of more tokens than it has positions. And a
        sentence that tells of these, if there are any.

        Raises:
            ConfigError: if a split has no row left, or a recording cannot be read.
        """
        from datasets import concatenate_datasets

        most, longest = self.features.chunk_length, self.longest

        def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
            return {"labels": self.labels(rows[text]), "seconds": list(map(seconds_of, rows[audio]))}

        def fits(labels: list[int], seconds: float) -> bool:
            return len(labels) <= longest and seconds <= most

        def widened(part: Any) -> Any:
            # beside the recordings and not through `map`, which would copy them
            more = part.map(encode, batched=True, remove_columns=part.column_names)
            return concatenate_datasets([part.select_columns([audio, text]), more], axis=1)

        encoded = splits.each(widened)
        left = encoded.each(lambda part: part.filter(fits, input_columns=["labels", "seconds"]))
        told = []
        for use in ("train", "validation", "test"):
            before, after = len(getattr(encoded, use)), len(getattr(left, use))
            if after == 0:
                raise ConfigError(
                    f"No row of the {use} data can be taken: all recordings are longer than {most} s, or their "
                    f"transcripts than {longest} tokens."
                )
            told += [f"{before - after:,} of {before:,} of the {use} data"] * (after < before)
        return left, f"Left out, longer than {most} s or {longest} tokens: {', '.join(told)}." if told else None


def _asked_for(generation: Any, language: str | None, task: str) -> tuple[str, str] | None:
    """Language and task of a multilingual model; None for English-only ones, which have no such settings."""
    if not getattr(generation, "is_multilingual", False):
        if task != "transcribe" or language not in (None, "en"):
            raise ConfigError(
                f"The model hears English only, by its generation settings, found spoken_language={language!r} and "
                f"task={task!r}. Leave them out, or give a multilingual model."
            )
        return None
    codes = sorted(name.strip("<|>") for name in generation.lang_to_id)
    if language not in codes:
        raise ConfigError(
            f"The model is multilingual and knows {', '.join(codes)}, found spoken_language={language!r}. Give the "
            "code of the recordings' language."
        )
    if task not in generation.task_to_id:
        raise ConfigError(f"task must be one of {', '.join(generation.task_to_id)}, found {task!r}.")
    return str(language), task


def _normalizer(tokenizer: Any, language: str) -> tuple[Normalizer, str]:
    """Whisper's normalizer for texts of a language, and what it is in words."""
    if language == "en":
        spellings = tokenizer.english_spelling_normalizer
        without = "" if spellings else " without its list of British spellings, which the checkpoint lacks"
        return EnglishTextNormalizer(spellings or {}), f"Whisper's normalizer for English{without}"
    letters = language in _LETTERS
    told = f"Whisper's basic normalizer{', which splits words into letters' if letters else ''}"
    return BasicTextNormalizer(split_letters=letters), told


class SpeechEncoder:
    """A transform for `Dataset.with_transform`: the features of each row's recording, and its labels."""

    def __init__(self, feature_extractor: Any, column: str) -> None:
        self._extract = feature_extractor
        self._column = column

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        rate = self._extract.sampling_rate
        sounds = [read_sound(value, rate) for value in rows[self._column]]
        features = self._extract(sounds, sampling_rate=rate, return_tensors="pt")["input_features"]
        return {"input_features": list(features), "labels": rows["labels"]}


class SpeechCollator:
    """A batch of features and labels, padded by -100."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        labels = [torch.tensor(row["labels"]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": padded}


class SpeechScores:
    """Error rates of transcripts against one reference each. Texts may be empty, but not all references: added words
    count against those of the others.

    Args:
        normalize: what texts go through before they are compared, but for `wer_ortho`.
        metrics: what evaluate computes; default: nothing.

    Raises:
        ConfigError: if these are not equally many texts, or cannot be scored.
        MissingDependencyError: if jiwer is missing.
    """

    def __init__(
        self,
        predictions: Sequence[str],
        references: Sequence[str],
        normalize: Normalizer,
        metrics: Metrics | None = None,
    ) -> None:
        if len(predictions) != len(references):
            raise ConfigError(
                f"There must be one reference a prediction, found {len(predictions)} predictions, {len(references)} "
                "references."
            )
        plain = [[" ".join(text.split()) for text in texts] for texts in (predictions, references)]
        clean = [[normalize(text) for text in texts] for texts in (predictions, references)]
        self._texts = {"wer": ("wer", *clean), "wer_ortho": ("wer", *plain), "cer": ("cer", *clean)}
        self._counts = {name: _counts(kind, *texts) for name, (kind, *texts) in self._texts.items()}
        self._metrics = metrics or Metrics()
        if any(counts[:, 1].sum() == 0 for counts in self._counts.values()):
            raise ConfigError(
                "Error rates need a reference that has a word, found only empty ones: are these the right texts?"
            )

    def values(self) -> dict[str, float]:
        """The rates by name; 0 is best, and more than 1 is possible."""
        found = {}
        for name, (kind, predictions, references) in self._texts.items():
            errors, length = self._counts[name].sum(axis=0)
            found[name] = float(errors / length)
            if kind in self._metrics:
                found[name] = float(self._metrics.compute(kind, predictions, references)[kind])
        return found

    def intervals(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
        """95 % intervals over the recordings: the middle of the rates of recordings drawn anew, with replacement; draws
        in which all references are empty do not count. Models that are compared on the same recordings are drawn alike.
        """
        if resamples < 1:
            raise ConfigError(f"resamples must be at least 1, found {resamples}.")
        found = {}
        for name, counts in self._counts.items():
            errors, lengths = drawn_sums(counts.astype(np.float64), resamples=resamples, seed=seed).T
            some = lengths > 0
            low, high = np.percentile(errors[some] / lengths[some], (2.5, 97.5)).tolist()
            found[name] = (low, high)
        return found


class SpeechMeasure(GenerationMeasure):
    """Measures a Trainer's model: the loss on the encoded test data, and the error rates of what it hears there."""

    def __init__(
        self,
        test: Any,
        references: Sequence[str],
        hearing: Hearing,
        metrics: Metrics,
        *,
        num_beams: int,
        max_new_tokens: int,
    ) -> None:
        # transformers adds the tokens that a Whisper starts with to max_length, and warns of max_new_tokens beside the
        # checkpoint's own max_length
        super().__init__(test, references, hearing.tokenizer, num_beams=num_beams, max_length=max_new_tokens)
        self.hearing, self._metrics = hearing, metrics
        SpeechScores(["a"], ["a"], str)  # a library that is missing is an error now, not after hours

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = batch["input_features"]
        # silence at the end is heard too; transformers warns where no mask says so
        return {"input_features": features, "attention_mask": features.new_ones(features[:, 0].shape, dtype=torch.long)}

    def scores(
        self, texts: Sequence[str], references: Sequence[str]
    ) -> tuple[dict[str, float], Mapping[str, tuple[float, float]]]:
        found = SpeechScores(texts, references, self.hearing.normalize, self._metrics)
        return found.values(), found.intervals()


def error_rates(hearing: Hearing, metrics: Metrics, prediction: Any) -> dict[str, float]:
    """Error rates of generated ids, for compute_metrics."""
    return SpeechScores(*texts_of(hearing.tokenizer, prediction), hearing.normalize, metrics).values()


def word_error_rates(predictions: Sequence[str], references: Sequence[str], normalize: Normalizer) -> list[float]:
    """The word error rate of each text; against a reference without words 0 where nothing was heard, else 1."""
    counts = _counts("wer", list(map(normalize, predictions)), list(map(normalize, references)))
    return [errors / length if length else float(errors > 0) for errors, length in counts.tolist()]


def write_speech_scores(folder: Path, rows: Sequence[Row], seconds: float, told: str) -> None:
    """Write scores.md: error rates, how fast, and some of what was heard; `seconds` is how long the recordings are."""
    shown = [row for row in rows if row.sparsity is None]
    how = (
        f"On {shown[0].measured.samples:,} test recordings, {seconds:,.0f} s in all; one run with one seed. WER and "
        f"CER are of texts after {told}. Times real time: of an evaluation, which reads the recordings and computes "
        "the loss too."
    )
    times = [row.measured.seconds for row in shown]
    speed = ["-" if not each else f"{seconds / each:,.1f}" for each in times]
    write_scores(folder, shown, "Transcripts", TITLES, how, more={"Times real time": speed})


def _counts(kind: str, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """A row a text: its errors, and the words (characters) of its reference."""
    try:
        jiwer = importlib.import_module("jiwer")
    except ImportError as error:
        raise MissingDependencyError('Word error rates need jiwer: pip install "deeparc_hf[recipes]".') from error
    process = jiwer.process_words if kind == "wer" else jiwer.process_characters
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        found = process(reference, prediction)
        missed = found.substitutions + found.deletions
        rows.append([missed + found.insertions, found.hits + missed])
    return np.array(rows, dtype=np.int64).reshape(len(rows), 2)
