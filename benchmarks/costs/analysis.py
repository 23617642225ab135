"""All blocks of a model compared with all others, beside a bare forward pass over the same batches, and beside what
torch_cka, pytorch-cka and optipfair take for it, where they are installed.

torch_cka (0.21) and pytorch-cka (1.1) compute minibatch CKA over whole outputs, optipfair (0.4) the cosine of each
block's input and output alone. They are given the same model, blocks and batches; torch_cka runs the model twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from deeparc_hf import analyze, find_stacks
from deeparc_hf.architectures import describe
from deeparc_hf.observe.axes import find_axes
from deeparc_hf.observe.rows import StackObserver
from deeparc_hf.pruning.rebuild import inexpressible

from .rows import Row, in_turn, median_of, peak_memory, profile, row_of, that_run

__all__ = ["measure"]

PART = "analysis"
VOCABULARY = 1000


def bert(width: int = 384, blocks: int = 12) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    return tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=width // 64, vocab_size=VOCABULARY)).eval()


def llama() -> nn.Module:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return tf.LlamaModel(tf.LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY, use_cache=False)).eval()


def resnet() -> nn.Module:
    return tf.ResNetModel(tf.ResNetConfig()).eval()  # the defaults are ResNet-50


CASES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], int]] = {
    "BERT, 12 blocks of 384": (bert, "input_ids", (32, 32), 16),  # 512 samples, as many as the settings ask for
    "BERT, 12 blocks of 768": (partial(bert, 768), "input_ids", (32, 32), 8),
    "Llama, 30 blocks of 576": (llama, "input_ids", (32, 32), 8),
    "ResNet-50": (resnet, "pixel_values", (32, 3, 224, 224), 4),
}
_LABELS = {"count": "samples"}
SMALL = "BERT, 12 blocks of 384"
PARTS: dict[str, list[Callable[..., Any]]] = {
    "what the model is": [describe],
    "which blocks can go": [inexpressible],
    "what its outputs mean": [find_axes],
    "taking rows": [StackObserver.take],
    "sums over them": [StackObserver.flush, StackObserver.observed],
}


def batches_of(key: str, shape: tuple[int, ...], count: int) -> list[Tensor]:
    torch.manual_seed(1)
    texts = key == "input_ids"
    return [torch.randint(1, VOCABULARY, shape) if texts else torch.randn(shape) for _ in range(count)]


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    for name, (make, key, shape, count) in CASES.items():
        if quick and name != SMALL:
            continue
        torch.manual_seed(0)
        turns = rounds if name == SMALL else max(3, rounds // 2)
        yield from _case(name, make(), key, batches_of(key, shape, 1 if quick else count), turns)
    if not quick:
        yield _two_processes(rounds)
        yield from _memory()
        yield from _growth(max(3, rounds // 2))
        yield from _growth_of_memory()


def _case(name: str, model: nn.Module, key: str, batches: list[Tensor], rounds: int) -> Iterator[Row]:
    calls = _calls(model, key, batches)
    for row in that_run(PART, calls):
        yield dataclasses.replace(row, what=f"{name}: {row.what}")
    seconds = in_turn(calls, rounds)
    bare = seconds["forward"]
    size = " x ".join(map(str, batches[0].shape))
    told = f"{len(batches)} batches of {size}, a forward pass takes {median_of(bare):.2f} s; "
    told += profile(calls["analyze"], PARTS, median_of(bare))
    yield row_of(PART, f"{name}: analyze / forward", seconds["analyze"] / bare, "<= 1.10", told)
    for peer in list(calls)[2:]:
        yield row_of(PART, f"{name}: {peer} / forward", seconds[peer] / bare)
    if "torch_cka" in calls:
        more = (seconds["torch_cka"] - bare) / (seconds["analyze"] - bare).clip(min=1e-3 * bare)
        yield row_of(PART, f"{name}: overhead of torch_cka / overhead of analyze", more, ">= 20")


def _calls(model: nn.Module, key: str, batches: list[Tensor]) -> dict[str, Callable[[], Any]]:
    inputs = [{key: batch} for batch in batches]
    if key == "input_ids":
        inputs = [{**each, "attention_mask": torch.ones_like(each[key])} for each in inputs]
    layers = [f"{name}.{index}" for name, stack in find_stacks(model).items() for index in range(len(stack))]

    def loader() -> DataLoader:
        return DataLoader(TensorDataset(torch.cat(batches)), batch_size=len(batches[0]))

    calls: dict[str, Callable[[], Any]] = {
        "forward": partial(_forward, model, inputs),
        "analyze": partial(analyze, model, inputs, keep_ratio=0.5, progress=False),
    }
    if importlib.util.find_spec("cka") is not None:
        calls["pytorch-cka"] = partial(_pytorch_cka, model, loader, layers)
    if importlib.util.find_spec("torch_cka") is not None:
        calls["torch_cka"] = partial(_torch_cka, model, loader, layers)
    if importlib.util.find_spec("optipfair") is not None and isinstance(model, tf.LlamaModel):
        calls["optipfair (cosine)"] = partial(_optipfair, model, inputs)
    return calls


def _forward(model: nn.Module, inputs: list[dict[str, Tensor]]) -> None:
    with torch.no_grad():
        for batch in inputs:
            model(**batch)


def _torch_cka(model: nn.Module, loader: Callable[[], DataLoader], layers: list[str]) -> None:
    from torch_cka import CKA

    with _silent(), torch.no_grad():
        CKA(model, model, model1_layers=layers, model2_layers=layers, device="cpu").compare(loader())
    _forget_hooks(model)


def _pytorch_cka(model: nn.Module, loader: Callable[[], DataLoader], layers: list[str]) -> None:
    from cka import compute_cka

    with _silent():
        compute_cka(model, model, loader(), layers=layers, device="cpu", progress=False)


def _optipfair(model: nn.Module, inputs: list[dict[str, Tensor]]) -> None:
    from optipfair import analyze_layer_importance

    with _silent():
        analyze_layer_importance(model, inputs, layers_path="layers", show_progress=False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _forget_hooks(model: nn.Module) -> None:
    """torch_cka leaves its hooks behind."""
    for module in model.modules():
        module._forward_hooks.clear()


_SCRIPT = """
import torch
torch.set_num_threads(2)
torch.manual_seed(0)
from benchmarks.costs.analysis import CASES, batches_of, _calls
make, key, shape, count = CASES[{name!r}]
_calls(make(), key, batches_of(key, shape, count))[{call!r}]()
"""


def _two_processes(rounds: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.two_processes", "--rounds", str(rounds)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    low, high = told["95 % interval"]
    what, note = "two processes / one, a thread each", f"{told['model']}, {told['samples']}"
    return Row(PART, what, told["two processes / one"], low, high, rounds, "<= 0.6", note)


def _memory() -> Iterator[Row]:
    """Peak memory of whole processes, libraries included."""
    for name in CASES:
        peaks = {call: peak_memory(_SCRIPT.format(name=name, call=call)) for call in ("forward", "analyze")}
        for peer in ("pytorch-cka", "torch_cka"):
            with contextlib.suppress(Exception):  # not installed
                peaks[peer] = peak_memory(_SCRIPT.format(name=name, call=peer))
        told = f"the forward pass takes {peaks['forward'] / 1e6:,.0f} MB"
        for call in list(peaks)[1:]:
            target = "<= 1.15" if call == "analyze" else None
            ratio = peaks[call] / peaks["forward"]
            yield Row(PART, f"{name}: peak memory of {call} / forward", ratio, target=target, note=told)


ONCE = {"width": 384, "blocks": 12, "length": 32, "count": 4}
_GROWN = """
import torch
torch.set_num_threads(2)
torch.manual_seed(0)
from benchmarks.costs.analysis import batches_of, bert, _calls
batches = batches_of("input_ids", (32, {length}), {count})
_calls(bert({width}, {blocks}), "input_ids", batches)[{call!r}]()
"""


def _growth_of_memory() -> Iterator[Row]:
    """What the ways take beside the forward pass at once and at twice as much, in megabytes."""
    for what in (None, *ONCE):
        sizes = ONCE if what is None else {**ONCE, what: 2 * ONCE[what]}
        bare = peak_memory(_GROWN.format(**sizes, call="forward"))
        label = "once" if what is None else f"twice the {_LABELS.get(what, what)}"
        for call in ("analyze", "pytorch-cka", "torch_cka"):
            with contextlib.suppress(subprocess.CalledProcessError):  # not installed
                peak = peak_memory(_GROWN.format(**sizes, call=call))
                told = f"{(peak - bare) / 1e6:,.0f} MB more than the {bare / 1e6:,.0f} of the forward pass"
                yield Row(PART, f"{label}: peak memory of {call} / forward", peak / bare, note=told)


def _growth(rounds: int) -> Iterator[Row]:
    """How the overhead grows: that of twice as much over that of once, of each way."""
    for what in ONCE:
        overheads: dict[str, list[Any]] = {}
        passes = []
        for factor in (1, 2):
            sizes = {**ONCE, what: ONCE[what] * factor}
            torch.manual_seed(0)
            batches = batches_of("input_ids", (32, sizes["length"]), sizes["count"])
            calls = _calls(bert(sizes["width"], sizes["blocks"]), "input_ids", batches)
            seconds = in_turn(calls, rounds)
            passes.append(median_of(seconds["forward"]))
            for call in list(calls)[1:]:
                overheads.setdefault(call, []).append(seconds[call] - seconds["forward"])
        label = _LABELS.get(what, what)
        for call, (one, two) in overheads.items():
            shares = [median_of(more) / bare for more, bare in zip((one, two), passes, strict=True)]
            told = f"{shares[0]:.3f} of a forward pass, then {shares[1]:.3f}"
            # what is lost in the noise has no ratio
            ratio = median_of(two) / median_of(one) if min(shares) > 0.03 else math.nan
            yield Row(PART, f"twice the {label}: overhead of {call}, times as large", ratio, n=rounds, note=told)
