"""Error rates against another algorithm and evaluate's scripts, and what of data a Whisper can take."""

from __future__ import annotations

import random

import numpy as np
import pytest

jiwer = pytest.importorskip("jiwer")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from datasets import Dataset  # noqa: E402

from deeparc_hf.errors import ConfigError, MissingDependencyError  # noqa: E402
from experiment.arguments import DataArguments  # noqa: E402
from experiment.audio import with_recordings  # noqa: E402
from experiment.metrics import Metrics  # noqa: E402
from experiment.pseudo_labels import with_pseudo_labels  # noqa: E402
from experiment.speech import Hearing, SpeechCollator, SpeechEncoder, SpeechScores, word_error_rates  # noqa: E402
from experiment.splits import load_splits  # noqa: E402
from tests.speech import CHUNK, RATE, make_speech, whisper_processor  # noqa: E402

from ..metric_scripts import script  # noqa: E402
from ..test_speech_recognition import errors  # noqa: E402

WORDS = ["one", "Two,", "three.", "naïve", "東京", "colour", "color", "don't", "20", "…", "Mr."]


def pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """References of some words, some of them empty, and predictions that share most words with them."""
    rng = random.Random(seed)
    wanted = [[rng.choice(WORDS) for _ in range(rng.randint(0, 9))] for _ in range(n)]
    found = [
        [rng.choice(WORDS) if rng.random() < 0.2 else word for word in words if rng.random() < 0.9]
        + [rng.choice(WORDS)] * (rng.random() < 0.2)
        for words in wanted
    ]
    return [" ".join(words) for words in found], [" ".join(words) for words in wanted]


@pytest.mark.parametrize("seed", range(3))
def test_rates_are_those_of_another_algorithm(seed):
    found, wanted = pairs(40, seed)
    values = SpeechScores(found, wanted, str.upper).values()
    words = [(text.split(), reference.split()) for text, reference in zip(found, wanted, strict=True)]
    signs = [(list(text.upper()), list(reference.upper())) for text, reference in zip(found, wanted, strict=True)]
    for name, sides in (("wer_ortho", words), ("cer", signs)):
        assert values[name] == pytest.approx(sum(errors(*pair) for pair in sides) / sum(len(pair[1]) for pair in sides))
    assert values["wer"] == values["wer_ortho"]  # upper case changes no word into another one


def test_the_normalized_rate_counts_words_that_sound_alike():
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    clean = EnglishTextNormalizer({"colour": "color"})
    values = SpeechScores(["Colour 20, Mister X"], ["color twenty Mr. X!"], clean).values()
    assert values == {"wer": 0.0, "wer_ortho": 1.0, "cer": 0.0}


def test_intervals_are_those_of_recordings_drawn_anew():
    found, wanted = pairs(30, 5)
    intervals = SpeechScores(found, wanted, str.lower).intervals(resamples=50, seed=2)
    rng, drawn = np.random.default_rng(2), []
    for _ in range(50):
        chosen = rng.integers(30, size=30)
        drawn.append(SpeechScores([found[i] for i in chosen], [wanted[i] for i in chosen], str.lower).values())
    for name, bounds in intervals.items():
        assert bounds == pytest.approx(np.percentile([values[name] for values in drawn], [2.5, 97.5]), rel=1e-9)


def test_texts_that_cannot_be_scored_are_refused():
    with pytest.raises(ConfigError, match="1 predictions, 2 references"):
        SpeechScores(["a"], ["a", "b"], str)
    with pytest.raises(ConfigError, match="found only empty ones"):
        SpeechScores(["a"], [" "], str)
    with pytest.raises(ConfigError, match="found only empty ones"):
        SpeechScores(["a"], ["..."], lambda text: "")
    assert SpeechScores(["", "b c"], ["a", ""], str).values()["wer"] == 3.0  # one missing and two added, of one


def test_without_jiwer_it_says_what_to_install(monkeypatch):
    import importlib

    def import_module(name, *more):
        if name == "jiwer":
            raise ImportError(name)
        return real(name, *more)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(MissingDependencyError, match=r'need jiwer: pip install "deeparc_hf\[recipes\]"'):
        SpeechScores(["a"], ["a"], str)


def test_evaluates_scripts_compute_where_they_are(tmp_path, evaluate_cache):
    for name in ("wer", "cer"):
        script(tmp_path / "scripts", name)
    metrics = Metrics(["wer", "cer"], str(tmp_path / "scripts"))
    assert SpeechScores(["a"], ["b"], str, metrics).values() == {"wer": 7.0, "wer_ortho": 7.0, "cer": 9.0}
    assert all("its script from a folder" in told for told in metrics.told.values())


def test_rates_of_single_texts():
    assert word_error_rates(["a b", "", "c", ""], ["a c", "", "", "d e"], str) == [0.5, 0.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hearing")
    return folder, make_speech(folder)


def ready(place, **more):
    data = DataArguments(**{name: str(value) for name, value in {**place[1], **more}.items()})
    hearing = Hearing.of(data.model, None, None, "transcribe")
    splits = with_recordings(load_splits(data, 0), "audio", data)
    return hearing, splits


def test_what_the_model_is_given(place):
    """Features as the feature extractor gives them, and labels from which the model makes its decoder's inputs."""
    hearing, splits = ready(place)
    splits, told = hearing.fitting(splits, "audio", "text")
    assert told is None
    encoder = SpeechEncoder(hearing.features, "audio")
    batch = SpeechCollator()([splits.test.with_transform(encoder)[i] for i in range(4)])
    assert batch["input_features"].shape == (4, 8, 100 * CHUNK)
    tokenizer = hearing.tokenizer
    for labels, text in zip(batch["labels"], splits.test["text"], strict=False):
        ids = [int(label) for label in labels if label >= 0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|notimestamps|>" and ids[-1] == tokenizer.eos_token_id
    again = whisper_processor().tokenizer("x")["input_ids"]
    assert again[0] == hearing.start and hearing.labels(["x"]) == [again[1:]]


def test_what_is_too_long_is_left_out_and_told(place, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "long.wav", np.zeros(2 * RATE, dtype=np.float32), RATE)
    soundfile.write(tmp_path / "short.wav", np.zeros(RATE // 2, dtype=np.float32), RATE)
    lines = ["audio,text", "long.wav,one", "short.wav,two", f"short.wav,{'z' * 200}"]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    hearing, splits = ready(place, test_file=tmp_path / "test.csv")
    left, told = hearing.fitting(splits, "audio", "text")
    assert (
        left.test["text"][:] == ["two"] and told == "Left out, longer than 1 s or 64 tokens: 2 of 3 of the test data."
    )
    (tmp_path / "test.csv").write_text("audio,text\nlong.wav,one\n")
    hearing, splits = ready(place, test_file=tmp_path / "test.csv")
    with pytest.raises(ConfigError, match="No row of the test data can be taken"):
        hearing.fitting(splits, "audio", "text")


def test_another_model_than_whisper_is_refused(tmp_path):
    from tests.zoo import ZOO

    ZOO["t5"].model().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="found a t5 model"):
        Hearing.of(str(tmp_path), None, None, "transcribe")


def test_pseudo_labels_replace_the_data_s_and_bad_ones_go(place):
    hearing, _ = ready(place)
    train = Dataset.from_dict({"text": ["a b", "c", "d", "e"], "labels": [[1]] * 4})
    taught, told = with_pseudo_labels(train, "text", ["a b", "x", "", "E"], hearing, 0.5)
    assert taught["text"][:] == ["a b", "e"] and taught["labels"][:] == hearing.labels(["a b", "E"])
    assert "in 2 of 4 training recordings, those of a word error rate of at most 0.5" in told
    taught, _ = with_pseudo_labels(train, "text", ["a b", "x", "", "E"], hearing, None)
    assert taught["text"][:] == ["a b", "c", "e"]
    with pytest.raises(ConfigError, match=r"the lowest error rate is 1\.00"):
        with_pseudo_labels(train, "text", ["x y", "x", "x", "x"], hearing, 0.1)
