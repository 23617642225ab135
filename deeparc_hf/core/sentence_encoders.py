"""Models of sentence-transformers (SentenceTransformer, SparseEncoder, CrossEncoder): a transformers model, and around
it modules (pooling, dense, normalize) that a checkpoint keeps in folders of their own.

Nothing here imports sentence-transformers: whoever has made such a model has done so. Importing this costs nothing, as
the command line's --help does.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError
from .plain_text import quoted

if TYPE_CHECKING:
    from torch import nn

    from .transaction import Transaction

__all__ = [
    "MODULES",
    "copy_modules",
    "forget_figures",
    "is_sentence_encoder",
    "kind_of",
    "module_folders",
    "tokenized",
    "with_inner",
]

MODULES = "modules.json"
_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
_KINDS = ("SentenceTransformer", "SparseEncoder", "CrossEncoder")
_CODE = (".py", ".pyc", ".pkl", ".pickle", ".joblib")


def kind_of(model: Any) -> str | None:
    """SentenceTransformer, SparseEncoder or CrossEncoder; None where it is no model of sentence-transformers."""
    library = sys.modules.get("sentence_transformers")
    known = {name: getattr(library, name, None) for name in _KINDS}
    return next((name for name, kind in known.items() if isinstance(kind, type) and isinstance(model, kind)), None)


def is_sentence_encoder(model: Any) -> bool:
    """Whether it is a model of sentence-transformers."""
    return kind_of(model) is not None


# ---- texts ----


def _texts_in(batch: Any) -> list[list[Any]]:
    """The columns of texts in a batch that nobody has tokenized: lists of texts, in a mapping or by themselves; of a
    column with a list of texts in each row (the documents of a query) nothing is left out. Empty if there is none.
    """
    columns = list(batch.values()) if isinstance(batch, Mapping) else [batch]
    return [list(column) for column in columns if isinstance(column, (list, tuple)) and column and _is_text(column[0])]


def _is_text(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, (list, tuple)) and bool(entry) and isinstance(entry[0], str))


def tokenized(encoder: Any, batch: Any) -> list[dict[str, Any]]:
    """What a model of sentence-transformers makes of texts that nobody has tokenized: a batch for each column; of a
    CrossEncoder one of pairs for the first column with each other one. Empty where the batch holds no texts.
    """
    columns = _texts_in(batch)
    if isinstance(encoder, sys.modules["sentence_transformers"].CrossEncoder):
        pairs = [_pairs(columns[0], column) for column in columns[1:]] if columns else []
        # a lone column may be pairs already
        columns = pairs or [column for column in columns if not isinstance(column[0], str)]
    tokenize = getattr(encoder, "preprocess", None) or encoder.tokenize  # before version 5.5
    return [dict(tokenize(column)) for column in columns]


def _pairs(texts: Sequence[str], others: Sequence[Any]) -> list[tuple[str, str]]:
    """Each text with its other one, or with each of several."""
    each = [(text, [other] if isinstance(other, str) else other) for text, other in zip(texts, others, strict=True)]
    return [(text, other) for text, several in each for other in several]


# ---- the model within ----


def with_inner(outer: nn.Module, root: nn.Module, work: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Work on a whole sentence encoder as work on a model that stands in the place of the one within: it is there while
    the work lasts.
    """
    path = next(name for name, module in outer.named_modules() if module is root)
    parent, _, name = path.rpartition(".")
    place = outer.get_submodule(parent)

    @contextmanager
    def holding(model: nn.Module) -> Iterator[None]:
        setattr(place, name, model)
        try:
            yield
        finally:
            setattr(place, name, root)

    @wraps(work)
    def inside(model: nn.Module) -> Any:
        with holding(model):
            return work(outer)

    return inside


def forget_figures(outer: nn.Module | None, transaction: Transaction) -> None:
    """Have a sentence encoder forget what evaluators noted for its card: it was of the model before."""
    card = getattr(outer, "model_card_data", None)
    if getattr(card, "eval_results_dict", None):
        transaction.set(card, "eval_results_dict", {})


# ---- files ----


def module_folders(source: str, **hub: Any) -> list[str] | None:
    """The folders of the modules around a sentence encoder's model; None where the source is none.

    Args:
        source: a folder, or a Hub id.
        hub: as for `from_pretrained`: revision, token, cache_dir, local_files_only.

    Raises:
        UnsupportedModelError: if the model lies in a folder too, a module is code of its own, or modules.json is
            malformed.
    """
    from transformers.utils import cached_file

    listed = cached_file(source, MODULES, _raise_exceptions_for_missing_entries=False, **_place(hub))
    if listed is None:
        return None
    try:
        entries = json.loads(Path(listed).read_text("utf-8"))
        first, *others = [(str(entry.get("path") or ""), str(entry["type"])) for entry in entries]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UnsupportedModelError(f"{MODULES} is not what sentence-transformers writes there.") from error
    if first[0]:
        raise UnsupportedModelError(
            f"By its {MODULES} the model lies in the folder {quoted(first[0])}, not beside it. Load it by "
            "sentence-transformers, save it anew (model.save_pretrained(FOLDER)), and give that folder."
        )
    for path, kind in (first, *others):
        parts = PurePosixPath(path).parts
        if not kind.startswith("sentence_transformers.") or path.startswith("/") or ".." in parts:
            raise UnsupportedModelError(
                f"{MODULES} lists {quoted(kind)} in {quoted(path)}, which is no module of sentence-transformers' own, "
                "and no code is run from there. Load the model yourself and call prune_model or remove_blocks on it."
            )
    return [path for path, _ in others if path]


def copy_modules(source: str, target: Path, **hub: Any) -> bool:
    """Put the modules around a sentence encoder's model, and its settings, beside the model that was written to
    `target`; whether the source is a sentence encoder. Their files are copied as they are.

    Args and errors: as `module_folders`.
    """
    from huggingface_hub import snapshot_download

    folders = module_folders(source, **hub)
    if folders is None:
        return False
    base = Path(source).expanduser()
    if not base.is_dir():
        wanted = [MODULES, *_SETTINGS, *(f"{name}/*" for name in folders)]
        base = Path(snapshot_download(source, allow_patterns=wanted, **_place(hub)))
    for pattern in (MODULES, *_SETTINGS):
        for file in base.glob(pattern):
            shutil.copyfile(file, target / file.name)
    for name in folders:
        (target / name).mkdir(parents=True, exist_ok=True)  # of a module without settings it is empty, or not there
        _copy_folder(base / name, target / name)
    return True


def _place(hub: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in hub.items() if key in ("revision", "token", "cache_dir")}
    return {**known, "local_files_only": bool(hub.get("local_files_only"))}


def _copy_folder(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix not in _CODE:
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
