"""Models by name, as the command line takes them (a folder, a Hub id, a timm model), without weights or whole."""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from transformers.utils import cached_file

from ..architectures import describe
from ..checkpoint.loading import saved_class
from ..core.block_paths import is_inside
from ..core.hub_help import no_answer
from ..core.plain_text import did_you_mean, plain
from ..core.sentence_encoders import module_folders
from ..errors import CalibrationError, ConfigError, DeepArcError, MissingDependencyError, UnsupportedModelError

__all__ = ["LoadingError", "ModelSource", "find_source", "load_model", "loading", "silence", "skeleton"]

logger = logging.getLogger(__name__)

_LONGEST = 1000  # of another library's message
_NOT_THERE = (
    "has no weights for {}: its config.json describes blocks that the checkpoint does not hold. Download it again, or "
    "correct config.json."
)
_NO_PLACE = (
    "holds weights for {}, for which its config.json has no place: the model that it describes is not the one that was "
    "saved. Correct config.json."
)
_TIMM_SCHEMES = ("hf-hub", "hf_hub", "local-dir")


class LoadingError(DeepArcError, OSError):
    """A model or data set that was named cannot be loaded."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        reference: what the loader of the library ("transformers" or "timm") takes.
        cached: the folder in the Hub's cache, where the Hub does not answer and only the cache is to be read.
    """

    given: str
    library: str
    reference: str
    cached: Path | None = None

    @property
    def loading(self) -> dict[str, bool]:
        """What the loaders of transformers are to be told."""
        return {"local_files_only": True} if self.cached is not None else {}

    def load(self, auto_class: Any) -> Any:
        """Its config, tokenizer or processor, by a class of transformers."""
        return auto_class.from_pretrained(self.reference, trust_remote_code=False, **self.loading)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads something into a `LoadingError` that says what was loaded."""
    try:
        yield
    except DeepArcError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if any(isinstance(each, pickle.UnpicklingError) or "weights_only" in str(each) for each in chain):
            # torch's own words, and the traceback, advise to run the code in it
            raise UnsupportedModelError(
                f"{what} holds its weights as pickles only (pytorch_model.bin), with more in them than tensors. "
                "Reading them could run code of whoever made them, so they are not read. Use a checkpoint with "
                "safetensors weights. If you made this one yourself, save it anew from the program that made it: "
                "model.save_pretrained(FOLDER) writes safetensors."
            ) from None
        raise LoadingError(f"Cannot load {what}: {plain(error, _LONGEST) or type(error).__name__}") from error


def find_source(model: str) -> ModelSource:
    """Find out which library a model belongs to.

    Args:
        model: a folder; a Hub id; "timm:NAME" for an architecture of timm with its default weights; or timm's own
            "hf-hub:ORG/NAME" and "local-dir:FOLDER".
    """
    scheme, _, rest = model.partition(":")
    if scheme == "timm":
        timm = _timm()
        if not timm.is_model(rest.partition(".")[0]):
            near = difflib.get_close_matches(rest, timm.list_models(), n=1)
            hint = f" Did you mean timm:{near[0]}?" if near else ""
            raise LoadingError(f"timm has no model {rest!r}.{hint}")
        return ModelSource(model, "timm", rest)
    if scheme in _TIMM_SCHEMES:
        name, _, revision = rest.partition("@") if scheme != "local-dir" else (rest, "", "")
        return ModelSource(model, "timm", model, _config(name, revision or None)[1])
    config, cached = _config(model)
    if "model_type" in config or not {"architecture", "pretrained_cfg"} <= config.keys():
        return ModelSource(model, "transformers", model, cached)
    return ModelSource(model, "timm", f"{'local-dir' if Path(model).is_dir() else 'hf-hub'}:{model}", cached)


def skeleton(source: ModelSource, auto_class: str | None = None) -> nn.Module:
    """The model with its record on the meta device: no weights are read, and no memory is taken."""
    with loading(source.given), torch.device("meta"):
        if source.library == "timm":
            return _timm_model(source, pretrained=False)
        config, cls = _config_and_class(source, auto_class)
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        model.tie_weights()  # transformers 5.0 leaves this out on the meta device, and tied weights would count twice
        return model


def load_model(source: ModelSource, auto_class: str | None = None) -> nn.Module:
    """The model with its weights and its record, on the CPU, in eval mode; one that lacks weights of a block, so that
    its similarities would be chance, is a CalibrationError.
    """
    with loading(source.given):
        if source.library == "timm":
            return _timm_model(source, pretrained=True).eval()
        config, cls = _config_and_class(source, auto_class)
        model, info = cls.from_pretrained(source.reference, config=config, output_loading_info=True, **source.loading)
    for name in describe(model).stacks:
        for keys, trouble in ((info["missing_keys"], _NOT_THERE), (info["unexpected_keys"], _NO_PLACE)):
            found = sorted(key for key in keys if is_inside(name, key))
            if found:
                tensors = f"{found[0]} and {len(found) - 1} more tensors of {name}"
                raise CalibrationError(f"{source.given} {trouble.format(tensors)}")
    return model.eval()


def _config(model: str, revision: str | None = None) -> tuple[dict[str, Any], Path | None]:
    """The config.json, and the folder in the Hub's cache that it lies in, where the Hub does not answer."""
    path, cached = Path(model).expanduser(), None
    if not model.strip():
        raise LoadingError("The name of the model is empty. Give a folder, or a Hub id.")
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"{model} is a PEFT adapter, not a whole model. Load it, call model.merge_and_unload(), save the "
                "result, give that folder."
            )
        file = path / "config.json"
        if not file.is_file():
            module_folders(str(path))  # a sentence encoder whose model lies elsewhere
            raise LoadingError(f"{model} has no config.json. Give the folder that save_pretrained wrote.")
    elif path.exists():
        raise LoadingError(f"{model} is a file. Give the folder that holds config.json and the weights.")
    elif model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise LoadingError(f"There is no folder {model}.")
    else:
        file, cached = _hub_config(model, revision)
    with loading(f"{model}: its config.json is not valid"):
        config = json.loads(file.read_text("utf-8"))
    if not isinstance(config, dict):
        raise LoadingError(f"Cannot load {model}: its config.json holds a {type(config).__name__}, not an object.")
    return config, cached


def silence(error: Exception) -> str:
    """What to say of something that is not at hand, where the Hub does not answer."""
    told = plain(error, _LONGEST)
    return (
        f"it is not in the cache, and the Hub ({constants.ENDPOINT}) does not answer ({told}). Check the connection, "
        "and HF_ENDPOINT if it is set"
    )


def _hub_config(model: str, revision: str | None) -> tuple[Path, Path | None]:
    with loading(f"{model} (no such folder; looked for it on the Hub)"):
        silent = no_answer(model, "config.json", revision)
        if silent is None:
            return Path(cached_file(model, "config.json", revision=revision)), None
        found = cached_file(
            model, "config.json", revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    if found is None:
        raise LoadingError(
            f"Cannot load {model}: there is no such folder, {silence(silent)}; or give the folder of a checkpoint."
        )
    logger.warning("The Hub (%s) does not answer (%s): %s is taken from the cache.", constants.ENDPOINT, silent, model)
    return Path(found), Path(found).parent


def _config_and_class(source: ModelSource, auto_class: str | None) -> tuple[Any, Any]:
    """The config, and the class that was asked for, else the one that saved the checkpoint, else the bare model."""
    config = source.load(transformers.AutoConfig)
    cls = saved_class(config, auto_class)
    if cls is not None:
        return config, cls
    assert auto_class is not None
    hint = did_you_mean(auto_class, [known for known in dir(transformers) if known.startswith("AutoModel")])
    raise ConfigError(f"--auto-class: {auto_class!r} is not a model class of transformers.{hint}")


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError('A timm model needs timm: pip install "deeparc_hf[timm]".') from error
    return timm


def _timm_model(source: ModelSource, pretrained: bool) -> nn.Module:
    # timm's own loader has no way to be told to stay with the cache; the layout there is that of a local folder
    reference = source.reference if source.cached is None or pretrained else f"local-dir:{source.cached}"
    return _timm().create_model(reference, pretrained=pretrained)
