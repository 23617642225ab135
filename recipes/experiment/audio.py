"""Recordings of a data set, read by soundfile and brought to a model's sampling rate by soxr.

The datasets library decodes audio by torchcodec, which needs FFmpeg's libraries; here it only hands files and their
bytes on. soundfile (libsndfile) reads WAV, FLAC, Ogg, Opus and MP3.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from deeparc_hf.errors import ConfigError, MissingDependencyError

from .arguments import DataArguments
from .splits import Splits

__all__ = ["read_sound", "seconds_of", "with_recordings"]

_TEXTS, _BYTES = ("string", "large_string"), ("binary", "large_binary")


def with_recordings(splits: Splits, column: str, data: DataArguments) -> Splits:
    """The splits with a column of recordings, not decoded: {"bytes", "path"}. It may hold the datasets library's Audio,
    bytes of files, or their names; names in a local file of data are relative to that file's folder.

    Raises:
        ConfigError: if the column is not there, or holds something else.
        MissingDependencyError: if soundfile or soxr is missing.
    """
    from datasets import Audio, Value

    for library in ("soundfile", "soxr"):  # said now, and not after the data were made ready
        _library(library)
    splits.need(audio_column=column)
    files = {use: getattr(data, f"{use}_file") for use in ("train", "validation", "test")}
    files["validation"] = files["validation"] or files["train"]  # what is held out
    files["test"] = files["test"] or files["validation"]  # where there is none, they are the same
    parts = []
    for use in ("train", "validation", "test"):
        part = getattr(splits, use)
        feature = part.features[column]
        kind = getattr(feature, "dtype", "bytes")
        if not isinstance(feature, (Audio, dict)) and kind not in (*_TEXTS, *_BYTES):
            raise ConfigError(f"audio_column: {column!r} holds {kind}, neither recordings nor names of sound files.")
        if kind in _TEXTS and files[use] is not None:
            folder = Path(files[use]).resolve()
            folder = folder if folder.is_dir() else folder.parent
            part = part.map(_placed, input_columns=[column], fn_kwargs={"column": column, "folder": str(folder)})
        if kind == "large_string":  # which Audio does not take
            part = part.cast_column(column, Value("string"))
        parts.append(part.cast_column(column, Audio(decode=False)))
    return Splits(*parts, splits.notes, splits.sources)


def seconds_of(value: Mapping[str, Any]) -> float:
    """How long a recording is, by its header.

    Raises:
        ConfigError: if it is not there, or cannot be read.
    """
    soundfile = _library("soundfile")
    try:
        return float(soundfile.info(_source(value)).duration)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(value, error) from error


def read_sound(value: Mapping[str, Any], rate: int) -> np.ndarray:
    """The sound of a recording at a sampling rate, of one channel (the mean of all), float32.

    Raises:
        ConfigError: if it is not there, or cannot be read.
    """
    soundfile = _library("soundfile")
    try:
        sound, found = soundfile.read(_source(value), dtype="float32", always_2d=True)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(value, error) from error
    mono = sound.mean(axis=1)
    return mono if found == rate else np.asarray(_library("soxr").resample(mono, found, rate), dtype=np.float32)


def _placed(name: str, column: str, folder: str) -> dict[str, str]:
    return {column: str(Path(folder, name))}  # an absolute name stays as it is


def _source(value: Mapping[str, Any]) -> Any:
    if value.get("bytes") is not None:
        return BytesIO(value["bytes"])
    if value.get("path") is None:
        raise ConfigError("A row has no recording. Leave such rows out.")
    return value["path"]


def _unreadable(value: Mapping[str, Any], error: Exception) -> ConfigError:
    name = Path(value.get("path") or "bytes without a name").name
    return ConfigError(
        f"The recording {name} cannot be read ({' '.join(str(error).split())[-200:]}). Give WAV, FLAC, Ogg, Opus or "
        "MP3 files that are there; names in a local file of data are relative to its folder."
    )


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f'Recordings need {name}: pip install "deeparc_hf[recipes]".') from error
