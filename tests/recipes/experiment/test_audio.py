"""Recordings of every form, read without the datasets library's own decoder."""

from __future__ import annotations

import json

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from datasets import Audio, Dataset, Value  # noqa: E402

from deeparc_hf.errors import ConfigError, MissingDependencyError  # noqa: E402
from experiment.arguments import DataArguments  # noqa: E402
from experiment.audio import read_sound, seconds_of, with_recordings  # noqa: E402
from experiment.splits import Splits, load_splits  # noqa: E402


def tone(rate: int, seconds: float = 0.5, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    ("form", "rate"), [("wav", 8000), ("flac", 44100), ("ogg", 48000), ("mp3", 44100), ("wav", 16000)]
)
def test_a_tone_is_the_same_tone_at_the_model_s_rate(form, rate, tmp_path):
    """Read from a file or from its bytes; its pitch by a Fourier transform."""
    path = tmp_path / f"tone.{form}"
    soundfile.write(path, tone(rate), rate)
    found = read_sound({"path": str(path), "bytes": None}, 16000)
    assert np.array_equal(found, read_sound({"path": None, "bytes": path.read_bytes()}, 16000))
    assert found.dtype == np.float32 and found.ndim == 1
    assert seconds_of({"path": str(path), "bytes": None}) == pytest.approx(0.5, abs=0.05)
    assert len(found) == pytest.approx(8000, abs=900)
    spectrum = np.abs(np.fft.rfft(found, 16000))  # a bin a hertz
    assert abs(int(spectrum.argmax()) - 440) <= 1 and np.abs(found[1000:6000]).max() == pytest.approx(0.5, abs=0.05)


def test_several_channels_are_one(tmp_path):
    left, right = tone(16000), tone(16000, pitch=1000.0)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    found = read_sound({"path": str(tmp_path / "two.wav"), "bytes": None}, 16000)
    assert found == pytest.approx((left + right) / 2, abs=1e-6)


def of(part: Dataset) -> Splits:
    return Splits(part, part, part)


def recorded(column, folder=None) -> Splits:
    file = None if folder is None else str(folder / "x.csv")
    return with_recordings(of(column), "audio", DataArguments(model="m", train_file=file))


@pytest.mark.parametrize("kind", ["names", "large names", "bytes", "Audio", "struct"])
def test_columns_of_every_kind(kind, tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000)
    name, content = str(tmp_path / "a.wav"), (tmp_path / "a.wav").read_bytes()
    part = {
        "names": lambda: Dataset.from_dict({"audio": [name]}),
        "large names": lambda: Dataset.from_dict({"audio": [name]}).cast_column("audio", Value("large_string")),
        "bytes": lambda: Dataset.from_dict({"audio": [content]}),
        "Audio": lambda: Dataset.from_dict({"audio": [name]}).cast_column("audio", Audio(sampling_rate=8000)),
        "struct": lambda: Dataset.from_dict({"audio": [{"bytes": content, "path": None}]}),
    }[kind]()
    value = recorded(part).test[0]["audio"]
    assert read_sound(value, 16000) == pytest.approx(tone(16000), abs=1e-4)


def test_names_are_relative_to_the_file_that_holds_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in ("train", "test"):
        (tmp_path / use / "sounds").mkdir(parents=True)
        length = 0.25 if use == "train" else 0.5
        rows = []
        for index in range(12):
            soundfile.write(tmp_path / use / "sounds" / f"{index}.wav", tone(16000, length), 16000)
            rows.append(json.dumps({"audio": f"sounds/{index}.wav", "use": use}))
        (tmp_path / use / "data.jsonl").write_text("\n".join(rows) + "\n")
    data = DataArguments(model="m", train_file="train/data.jsonl", test_file="test/data.jsonl")
    splits = with_recordings(load_splits(data, 0), "audio", data)
    monkeypatch.chdir("/")
    lengths = [{seconds_of(row["audio"]) for row in part} for part in (splits.train, splits.validation, splits.test)]
    assert lengths == [{0.25}, {0.25}, {0.5}]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "no.wav").write_text("no sound")
    for read in (seconds_of, lambda value: read_sound(value, 16000)):
        with pytest.raises(ConfigError, match=r"The recording no\.wav cannot be read"):
            read({"path": str(tmp_path / "no.wav"), "bytes": None})
        with pytest.raises(ConfigError, match=r"The recording gone\.wav cannot be read"):
            read({"path": str(tmp_path / "gone.wav"), "bytes": None})
        with pytest.raises(ConfigError, match="A row has no recording"):
            read({"path": None, "bytes": None})
    with pytest.raises(ConfigError, match="'audio' holds int64, neither recordings nor names"):
        recorded(Dataset.from_dict({"audio": [3]}))


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
    import importlib

    real = importlib.import_module

    def import_module(name, *more):
        if name == "soxr":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(MissingDependencyError, match=r'Recordings need soxr: pip install "deeparc_hf\[recipes\]"'):
        recorded(Dataset.from_dict({"audio": ["a.wav"]}))
