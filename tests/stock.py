"""A stock process: transformers and timm as on a machine that has never heard of deeparc_hf.

Run as a script this file is the worker: it answers one JSON request a line. `StockProcess` is the other end. The worker
is started isolated (`python -I`: no PYTHONPATH, no working directory on its path) and refuses deeparc_hf by a finder on
`sys.meta_path`, so that an installed copy does not help either. It proves both at its start and with every answer.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCKED = "deeparc_hf"
NEW_TOKENS = 8


@dataclass(frozen=True)
class Loaded:
    """What a stock load of a checkpoint gave.

    Attributes:
        missing, unexpected, mismatched: keys, as the library and a comparison with the weight files tell.
        outputs: tensors by name: "output" (logits or hidden states), "cached" and "uncached" (generated ids).
        model_class: name of the class that was built.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    model_class: str
    outputs: dict[str, Any] = field(repr=False)

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)


class StockError(RuntimeError):
    """The stock library could not load or run the checkpoint; the message is the worker's traceback."""


class StockProcess:
    """One worker for many checkpoints, as its start costs seconds. A context manager.

    Args:
        environment: of the worker, where it is to reach a Hub; default: this process's, without any Hub.
        package: have the worker import deeparc_hf first, and nothing of it by name. It is no stock process then, but
            that of somebody who has the package.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, package: bool = False) -> None:
        self._given = {**os.environ, "HF_HUB_OFFLINE": "1"} if environment is None else dict(environment)
        self._package = package
        if package:
            self._given["STOCK_PACKAGE"] = str(Path(__file__).parents[1])

    def __enter__(self) -> StockProcess:
        import torch

        environment = {**self._given, "STOCK_THREADS": str(torch.get_num_threads())}
        self._folder = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hello = self._read()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._folder.cleanup()

    def load(
        self,
        folder: str | Path,
        loader: str,
        inputs: Mapping[str, Any],
        *,
        generate: bool = False,
        everything: bool = False,
    ) -> Loaded:
        """Load a checkpoint in the worker and run it.

        Args:
            folder: the checkpoint, or its id on the Hub.
            loader: name of a class of transformers that has from_pretrained, or "timm".
            inputs: keyword arguments of the model's forward, tensors.
            generate: also generate `NEW_TOKENS` tokens, greedily, with and without the cache.
            everything: give all tensors of the output (`flattened`), not only the first.

        Raises:
            StockError: if the library fails.
        """
        from safetensors.torch import load_file, save_file

        sent, back = Path(self._folder.name, "inputs.safetensors"), Path(self._folder.name, "outputs.safetensors")
        save_file({key: value.clone().contiguous() for key, value in inputs.items()}, sent)
        back.unlink(missing_ok=True)
        request = {
            "folder": str(folder),
            "loader": loader,
            "inputs": str(sent),
            "outputs": str(back),
            "generate": generate,
            "everything": everything,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise StockError(answer["error"])
        return Loaded(
            answer["missing"], answer["unexpected"], answer["mismatched"], answer["model_class"], load_file(back)
        )

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the stock process ended with code {self._process.wait(timeout=60)}"
        answer = json.loads(line)
        known = answer["imported"] if self._package else answer["refuses"] and not answer["imported"]
        assert known, f"the stock process knows {BLOCKED}, or lacks it: {answer}"
        return answer


class _Refuser:
    """A finder that lets nobody import deeparc_hf."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == BLOCKED:
            raise ImportError(f"{BLOCKED} does not exist in the stock process")


def _innocence() -> dict[str, bool]:
    """Whether deeparc_hf is refused, and whether any of it is loaded all the same."""
    try:
        __import__(BLOCKED)
        refuses = False
    except ImportError:
        refuses = True
    return {"refuses": refuses, "imported": any(name.partition(".")[0] == BLOCKED for name in sys.modules)}


def aligned(model: Any) -> Any:
    """A copy whose tensors lie on the 64-byte grid. Used on both sides.

    Loaded tensors lie in the mapped file, off the grid, where convolutions sum in another order.
    """
    return copy.deepcopy(model)


def generated(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy continuations with and without the cache. Used on both sides."""
    prompt = {key: value for key, value in inputs.items() if key not in ("labels", "decoder_input_ids")}
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return {name: model.generate(**prompt, use_cache=name == "cached", **settings) for name in ("cached", "uncached")}


def forwarded(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Logits, or hidden states of a headless model, or the output of a timm model. Used on both sides."""
    output = model(**inputs)
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else output["last_hidden_state"]
    return output


def flattened(output: Any, path: str = "") -> dict[str, Any]:
    """All tensors of floating numbers in an output, by their path in it. Used on both sides."""
    import torch

    if isinstance(output, torch.Tensor):
        return {path or "output": output} if output.is_floating_point() else {}
    if isinstance(output, Mapping):
        parts = list(output.items())
    else:
        parts = list(enumerate(output)) if isinstance(output, (tuple, list)) else []
    return {k: v for key, value in parts for k, v in flattened(value, f"{path}.{key}" if path else str(key)).items()}


def _fetched(repo_id: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo_id, "model.safetensors")


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file, save_file

    inputs, folder = load_file(request["inputs"]), request["folder"]
    if request["loader"] == "timm":
        import timm

        local = Path(folder).is_dir()
        model = timm.create_model(f"{'local-dir' if local else 'hf-hub'}:{folder}", pretrained=True)
        inputs = {"x": inputs.get("x", inputs.get("pixel_values"))}
        saved, own = load_file(Path(folder, "model.safetensors") if local else _fetched(folder)), model.state_dict()
        info = {
            "missing_keys": own.keys() - saved.keys(),
            "unexpected_keys": saved.keys() - own.keys(),
            "mismatched_keys": {key for key in own.keys() & saved.keys() if not torch.equal(own[key], saved[key])},
        }
    else:
        import transformers

        loader = getattr(transformers, request["loader"])
        model, info = loader.from_pretrained(folder, output_loading_info=True)
    model = aligned(model).eval()
    with torch.no_grad():
        torch.manual_seed(0)  # some models draw numbers
        outputs = flattened(model(**inputs)) if request["everything"] else {"output": forwarded(model, inputs)}
        if request["generate"]:
            outputs |= generated(model, inputs)
    save_file({key: value.clone().contiguous() for key, value in outputs.items()}, request["outputs"])  # none shared
    keys = {name: sorted(map(str, info[f"{name}_keys"])) for name in ("missing", "unexpected", "mismatched")}
    return {**keys, "model_class": type(model).__name__}


def _work() -> None:
    # answers go out by the real stdout; what the libraries print goes to stderr
    answers, sys.stdout = sys.stdout, sys.stderr
    if "STOCK_PACKAGE" in os.environ:
        sys.path.insert(0, os.environ["STOCK_PACKAGE"])
        __import__(BLOCKED)
    else:
        sys.meta_path.insert(0, _Refuser())  # type: ignore[arg-type]
    import torch

    torch.set_num_threads(int(os.environ["STOCK_THREADS"]))
    print(json.dumps({**_innocence(), "path": sys.path}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps({**_innocence(), **answer}), file=answers, flush=True)


if __name__ == "__main__":
    _work()
