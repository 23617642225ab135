"""What a command is asked to work on: a model, and calibration data by name, turned into batches for the model."""

from __future__ import annotations

import argparse
import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import cached_file

from ..architectures import find_host
from ..checkpoint import loading as checkpoints
from ..core.caller import warn_caller
from ..core.hub_help import no_answer
from ..core.plain_text import plain
from ..core.sentence_encoders import copy_modules, module_folders
from ..errors import CalibrationError, CalibrationWarning, ConfigError, MissingDependencyError, UnsupportedModelError
from ..observe.calibration import chosen_rows
from ..pruning.config import MPruneConfig
from ..sparsity.config import WandaConfig
from .common import say
from .sources import LoadingError, ModelSource, find_source, load_model, loading, silence, skeleton

__all__ = ["Columns", "Job", "load_rows", "make_batches", "processor_of"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_TEXT_NAMES = (
    *("text", "texts", "sentence", "content", "question", "context", "document", "article", "review", "premise"),
    "prompt",
)
_IMAGE_NAMES = ("image", "img", "picture")
_LONGEST = 512
# a folder with none of these has no tokenizer or processor, though transformers may make one up for it
_PROCESSOR_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class Job:
    """A model that was asked for and the data for it, checked before its weights are read.

    Attributes:
        batches: calibration batches; None where no data was given.
        processor: the tokenizer or image processor to save with the checkpoint; None where there is none.
    """

    args: argparse.Namespace
    source: ModelSource
    device: torch.device
    batches: DataLoader | None
    processor: Any

    @classmethod
    def of(
        cls, args: argparse.Namespace, config: MPruneConfig | WandaConfig, check: Callable[[nn.Module], object]
    ) -> Job:
        """What the arguments ask for; `check` refuses a model, given without weights, that the settings are not for."""
        source = find_source(args.model)
        frame = skeleton(source, args.auto_class)
        check(frame)
        if source.library == "transformers":
            module_folders(source.reference, **source.loading)  # what is wrong with them is said now
        device = _device(args.device)
        if args.data is None:
            return cls(args, source, device, None, processor_of(source, frame))
        columns = Columns(args.text_column, args.text_pair_column, args.target_column, args.image_column)
        rows = load_rows(args.data, args.split, args.subset)
        settings = {"batch_size": args.batch_size, "max_length": args.max_length}
        batches, processor = make_batches(
            source, frame, rows, columns, samples=config.calibration_samples, seed=config.seed, **settings
        )
        return cls(args, source, device, batches, processor)

    def load(self) -> nn.Module:
        """The model with its weights, on the device."""
        return load_model(self.source, self.args.auto_class).to(self.device)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the checkpoint with its record, its tokenizer or image processor where there is one, and the modules of
        a sentence encoder.
        """
        checkpoints.save_pruned(model, folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)
        if self.source.library == "transformers":
            copy_modules(self.source.reference, folder, **self.source.loading)


def _device(name: str | None) -> torch.device:
    """The device that was asked for, tried out."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Columns:
    """The columns to use; None: guessed where there is one obvious candidate. The target is what is to be written."""

    text: str | None = None
    text_pair: str | None = None
    target: str | None = None
    image: str | None = None


def load_rows(data: str, split: str | None = None, subset: str | None = None) -> Any:
    """Load a data set.

    Args:
        data: a file, a folder (of images, of such files, or from `save_to_disk`), or a Hub id.
        split: default: "train", or the only one.
        subset: configuration of a Hub data set.
    """
    import datasets  # takes seconds

    path = Path(data).expanduser()
    suffix = path.suffix.lower()
    if not path.exists() and (suffix in _FORMATS or data.startswith(("/", ".", "~")) or data.count("/") > 1):
        raise LoadingError(f"There is no file or folder {data}.")
    if not data.strip():
        raise LoadingError("The name of the data is empty.")
    if path.is_file() and suffix not in _FORMATS:
        raise LoadingError(
            f"Cannot read {data}: files of type {suffix or '(none)'} are not known. Known: {', '.join(_FORMATS)}."
        )
    if path.is_file() and subset is not None:
        raise LoadingError(
            f"The configuration {subset!r} is for a data set on the Hub, and {data} is a file. Leave --subset out."
        )
    on_hub = not path.exists()
    if on_hub:
        _refuse_silence(data)
    with loading(f"the data {data}{' (no such file or folder; looked for it on the Hub)' if on_hub else ''}"):
        try:
            if path.is_file():
                options = {"sep": "\t"} if suffix == ".tsv" else {}
                found = datasets.load_dataset(_FORMATS[suffix], data_files=str(path), **options)
            elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path) if path.is_dir() else data, subset)
        except datasets.exceptions.DatasetGenerationError as error:  # what is wrong with a file is left to its cause
            raise LoadingError(f"Cannot read the data {data}: {plain(error.__cause__ or error, 400)}") from error
    if isinstance(found, datasets.Dataset):
        return found
    name = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
    if name not in found:
        asked = f"has no split {split!r}" if split else "has several splits"
        raise LoadingError(f"The data {data} {asked}. Its splits: {', '.join(found)}. Give one of them with --split.")
    return found[name]


def _refuse_silence(data: str) -> None:
    """Refuse a data set of a Hub that does not answer; the library would try again for minutes."""
    import datasets

    silent = no_answer(data, "README.md", repo_type="dataset")
    if silent is not None and not Path(datasets.config.HF_DATASETS_CACHE, data.replace("/", "___")).is_dir():
        raise LoadingError(f"Cannot load the data {data}: there is no such file or folder, {silence(silent)}.")


def make_batches(
    source: ModelSource,
    model: nn.Module,
    rows: Any,
    columns: Columns,
    *,
    samples: int,
    seed: int,
    batch_size: int = 16,
    max_length: int | None = None,
) -> tuple[DataLoader, Any]:
    """Batches of randomly chosen samples for a model on any device, and the tokenizer or image processor that made them
    (None for timm). max_length: of a text in tokens; default: what tokenizer and model allow, at most 512.
    """
    if len(rows) == 0:
        raise CalibrationError("The calibration data has no rows. Give another file or split.")
    chosen = chosen_rows(len(rows), samples, seed)
    host = find_host(model)
    root = host.root
    main = "pixel_values" if source.library == "timm" else host.main_input
    if main == "pixel_values":
        _warn_unused(root, "images", text=columns.text, text_pair=columns.text_pair, target=columns.target)
        column, rows = _image_column(rows, columns.image)
        processor, collate = _image_collate(source, root, column)
    elif main == "input_ids":
        writes = root.config.is_encoder_decoder
        takes = "texts" if writes else "texts, and writes none"
        _warn_unused(root, takes, image=columns.image, target=None if writes else columns.target)
        text = _text_columns(rows, columns, writes)
        chosen = _with_text(rows, chosen, str(text.text))
        processor, collate = _text_collate(source, root, text, max_length)
    else:
        raise UnsupportedModelError(
            f"{type(root).__name__} takes {main!r}; the command line prepares text and images only. Call prune_model "
            "from Python with your own batches."
        )
    return DataLoader(rows.select(chosen), batch_size, collate_fn=collate), processor


def _warn_unused(root: nn.Module, takes: str, **given: str | None) -> None:
    for name, column in given.items():
        if column is not None:
            option = f"--{name.replace('_', '-')}-column"
            message = f"{option} {plain(column)!r} is not used: {type(root).__name__} takes {takes}. Leave it out."
            warn_caller(message, CalibrationWarning)


def _with_text(rows: Any, chosen: list[int], column: str) -> list[int]:
    """The chosen rows that have a text: nothing can be compared on others."""
    full = [index for index, text in zip(chosen, rows.select(chosen)[column], strict=True) if text and text.strip()]
    if not full:
        raise CalibrationError(
            f"None of the rows has a text in the column {column!r}. Give other data, or another column."
        )
    if len(full) < len(chosen):
        lost = f"{len(chosen) - len(full)} of the {len(chosen)} chosen rows"
        warn_caller(f"{lost} have no text in the column {column!r}, and are left out.", CalibrationWarning)
    return full


def _text_columns(rows: Any, columns: Columns, needs_target: bool) -> Columns:
    kinds = ("string", "large_string")
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in kinds]
    free = [name for name in strings if name not in (columns.text_pair, columns.target)]
    text = columns.text or _guess(rows, [n for n in free if n.lower() in _TEXT_NAMES] or free, "text", "--text-column")
    if needs_target and columns.target is None:
        raise CalibrationError(
            "An encoder-decoder model needs what it is to write, to run its decoder on. Give the column with "
            f"--target-column. Columns: {', '.join(rows.column_names)}."
        )
    for kind, name in {"text": text, "text-pair": columns.text_pair, "target": columns.target}.items():
        if name is not None and name not in strings:
            found = _kind(rows, name, f"--{kind}-column")
            raise CalibrationError(
                f"--{kind}-column: {name!r} holds {found}, not text. Columns of text: {', '.join(strings)}."
            )
    return Columns(text, columns.text_pair, columns.target if needs_target else None)


def _image_column(rows: Any, given: str | None) -> tuple[str, Any]:
    from datasets import Image

    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError('Reading images needs Pillow: pip install "deeparc_hf[images]".') from error
    images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    named = [name for name in images if name.lower() in _IMAGE_NAMES]
    name = given or _guess(rows, named or images, "images", "--image-column")
    kind = _kind(rows, name, "--image-column")
    if name not in images and kind != "string":
        raise CalibrationError(f"--image-column: {name!r} holds {kind}, neither images nor paths of image files.")
    return name, rows.cast_column(name, Image(mode="RGB"))


def _guess(rows: Any, candidates: Sequence[str], what: str, option: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    raise CalibrationError(
        f"Cannot tell which column holds the {what}. Give it with {option}. Columns: {', '.join(rows.column_names)}."
    )


def _kind(rows: Any, name: str, option: str) -> str:
    """What a column holds, which an option names and which must be there."""
    if name not in rows.column_names:
        raise CalibrationError(f"{option}: the data has no column {name!r}. Columns: {', '.join(rows.column_names)}.")
    feature = rows.features[name]
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _text_collate(
    source: ModelSource, root: Any, columns: Columns, max_length: int | None
) -> tuple[Any, Callable[..., Any]]:
    with loading(f"the tokenizer of {source.given}"):
        tokenizer = source.load(transformers.AutoTokenizer)
    if not max_length:
        positions = getattr(root.config, "max_position_embeddings", None)
        known = positions if isinstance(positions, int) and positions > 0 else _LONGEST
        max_length = min(_LONGEST, tokenizer.model_max_length, known)
    # padding and truncation change a tokenizer, which is saved with the checkpoint as it was
    working = copy.deepcopy(tokenizer)
    if working.pad_token is None:
        if working.eos_token is None:
            raise UnsupportedModelError(
                f"The tokenizer of {source.given} has no padding token and no end token, so texts cannot be batched."
            )
        working.pad_token = working.eos_token
    settings = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    taken = set(inspect.signature(root.forward).parameters)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = {"text": _strings(batch, columns.text)}
        if columns.text_pair is not None:
            texts["text_pair"] = _strings(batch, columns.text_pair)
        encoded = working(**texts, **settings)
        _require_known_words(source, working, encoded["input_ids"])
        inputs = {key: value for key, value in encoded.items() if key in taken}
        if columns.target is not None:
            target = working(text_target=_strings(batch, columns.target), **settings)
            inputs["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return inputs

    return tokenizer, collate


def _require_known_words(source: ModelSource, tokenizer: Any, ids: torch.Tensor) -> None:
    """A folder without tokenizer files may load as a tokenizer that knows no words at all."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        return  # GPT-2 and its like spell every text out, and use one token for all of these
    special = torch.tensor([i for i in tokenizer.all_special_ids if i != unknown], dtype=ids.dtype)
    words = ids[~torch.isin(ids, special)]
    if len(words) and float((words == unknown).float().mean()) > 0.5:
        raise LoadingError(
            f"The tokenizer of {source.given} ({len(tokenizer)} entries) knows less than half of the calibration "
            "texts' tokens. Save the model's own tokenizer into its folder (tokenizer.save_pretrained), or give texts "
            "in its language."
        )


def _strings(batch: list[dict[str, Any]], column: str | None) -> list[str]:
    return [row[str(column)] or "" for row in batch]


def _image_collate(source: ModelSource, root: nn.Module, column: str) -> tuple[Any, Callable[..., Any]]:
    if source.library == "timm":
        from timm.data import create_transform, resolve_data_config

        transform = create_transform(**resolve_data_config(model=root), is_training=False)
        return None, lambda batch: {"pixel_values": torch.stack([transform(row[column]) for row in batch])}
    with loading(f"the image processor of {source.given}"):
        processor = source.load(transformers.AutoImageProcessor)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row[column] for row in batch]
        return {"pixel_values": processor(images=images, return_tensors="pt")["pixel_values"]}

    return processor, collate


def processor_of(source: ModelSource, model: nn.Module) -> Any:
    """The tokenizer or image processor to save with the checkpoint where no data has needed it, if there is one."""
    if source.library == "timm":
        return None
    loaders = {"input_ids": transformers.AutoTokenizer, "pixel_values": transformers.AutoImageProcessor}
    loader = loaders.get(find_host(model).main_input, transformers.AutoProcessor)
    try:
        with loading(f"the tokenizer or processor of {source.given}"):
            settings = {"_raise_exceptions_for_missing_entries": False, **source.loading}
            if any(cached_file(source.reference, name, **settings) for name in _PROCESSOR_FILES):
                return source.load(loader)
            say(f"info: {source.given} has no files of a tokenizer or processor, so none are saved.")
    except LoadingError as error:
        say(f"info: {' '.join(str(error).split())} The checkpoint is saved without it.")
    return None
