"""The same on a GPU in bfloat16: BERT-base, ResNet-50 and a Llama of a billion parameters, from their configs with
random weights. Comparing, a repair, a search, Wanda, 2:4 at run time, and how fast the smaller model is.

Without a GPU only `--quick` runs, with tiny models.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers as tf
from torch import nn

from deeparc_hf import analyze, search_blocks, sparsify_model
from deeparc_hf.architectures import describe
from deeparc_hf.errors import UnsupportedModelError
from deeparc_hf.healing.heal import fit_sites
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.sparsity.semi_structured import to_semi_structured

from .analysis import PARTS as SHARES
from .results import measure_saving
from .rows import Row, in_turn, median_of, profile, row_of

__all__ = ["measure"]

PART = "GPU"
Batches = list[dict[str, torch.Tensor]]


def bert(tiny: bool) -> nn.Module:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 6}
    return tf.BertForSequenceClassification(tf.BertConfig(**(sizes if tiny else {})))  # the defaults are BERT-base


def resnet(tiny: bool) -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [3, 3], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**(sizes if tiny else {})))  # the defaults are ResNet-50


def llama(tiny: bool) -> nn.Module:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    heads = {"num_key_value_heads": 2 if tiny else 8, "vocab_size": 1000 if tiny else 128_256}
    config = tf.LlamaConfig(**(small if tiny else sizes), **heads, pad_token_id=0, tie_word_embeddings=True)
    return tf.LlamaForCausalLM(config)


# the model, its input, a batch, how many of them, and the blocks of a repair
CASES: dict[str, tuple[Callable[[bool], nn.Module], str, tuple[int, ...], int, dict[str, list[int]]]] = {
    "BERT-base": (bert, "input_ids", (64, 128), 8, {"bert.encoder.layer": [5, 6]}),
    "ResNet-50": (resnet, "pixel_values", (64, 3, 224, 224), 8, {"resnet.encoder.stages.2.layers": [3]}),
    "Llama of 1B": (llama, "input_ids", (8, 512), 16, {"model.layers": [7, 8]}),
}
TINY = {
    "bert.encoder.layer": {"bert.encoder.layer": [2]},
    "resnet.encoder.stages.2.layers": {"resnet.encoder.stages.1.layers": [1]},
    "model.layers": {"model.layers": [2]},
}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    if not torch.cuda.is_available() and not quick:
        raise SystemExit("There is no GPU here. Take the part out, or try --quick, whose figures mean nothing.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, (make, key, shape, count, removed) in CASES.items():
        torch.manual_seed(0)
        model = make(quick).to(device, torch.bfloat16).eval()
        if quick:
            shape, count, removed = (8, *(min(size, 32) for size in shape[1:])), 2, TINY[next(iter(removed))]
        ids = key == "input_ids"
        made = [torch.randint(5, 1000, shape) if ids else torch.randn(shape).bfloat16() for _ in range(count)]
        batches = [{key: batch.to(device)} for batch in made]
        if ids:
            batches = [{**batch, "attention_mask": torch.ones_like(batch[key])} for batch in batches]
        for row in _case(model, batches, removed, rounds):
            yield dataclasses.replace(row, what=f"{name}: {row.what}")
        for row in measure_saving(name, model, batches[0], removed, max(rounds, 7)):
            yield dataclasses.replace(row, part=PART)


def _case(model: nn.Module, batches: Batches, removed: dict[str, list[int]], rounds: int) -> Iterator[Row]:
    subject, samples = describe(model), sum(len(next(iter(batch.values()))) for batch in batches)
    calls: dict[str, Callable[[], Any]] = {
        "forward": partial(_forward, model, batches),
        "analyze": partial(analyze, model, batches, keep_ratio=0.5, progress=False),
        "heal": lambda: fit_sites(subject, removed, Calibration(batches, samples), progress=False),
        "Wanda": lambda: sparsify_model(copy.deepcopy(model), batches, progress=False),
    }
    seconds = in_turn(calls, rounds)
    bare = median_of(seconds["forward"])
    size = " x ".join(map(str, next(iter(batches[0].values())).shape))
    told = f"{len(batches)} batches of {size}, a forward pass takes {bare:.3f} s; "
    told += profile(calls["analyze"], SHARES, bare)
    yield row_of(PART, "analyze / forward", seconds["analyze"] / seconds["forward"], "<= 1.10", told)
    yield row_of(PART, f"a site healed, {removed} gone / forward", seconds["heal"] / seconds["forward"], "<= 1.5")
    yield row_of(PART, "Wanda, block by block / forward", seconds["Wanda"] / seconds["forward"])
    if torch.cuda.is_available():
        peaks = {call: _peak(calls[call]) for call in ("forward", "analyze")}
        note = f"the forward pass takes {peaks['forward'] / 1e9:.2f} GB"
        ratio = peaks["analyze"] / peaks["forward"]
        yield Row(PART, "peak memory of analyze / forward", ratio, target="<= 1.15", note=note)
    yield _search(model, batches[:1], max(1, rounds // 3))
    if not isinstance(model, tf.ResNetForImageClassification):
        yield _two_of_four(model, batches, rounds)


def _forward(model: nn.Module, batches: Batches) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _peak(call: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def _search(model: nn.Module, batches: Batches, rounds: int) -> Row:
    """Down by two blocks, on one batch."""
    blocks = sum(map(len, describe(model).stacks.values()))
    search = partial(search_blocks, model, batches, num_blocks=blocks - 2, measure_times=False, progress=False)
    seconds = in_turn({"forward": partial(_forward, model, batches), "search": search}, rounds)
    told = f"{blocks} blocks, repairs fitted for each candidate"
    return row_of(PART, "a search for two blocks / forward", seconds["search"] / seconds["forward"], note=told)


def _two_of_four(model: nn.Module, batches: Batches, rounds: int) -> Row:
    sparse = copy.deepcopy(model)
    sparsify_model(sparse, batches[:1], pattern="2:4", progress=False)
    what = "2:4 at run time: dense / sparse"
    try:
        left = to_semi_structured(sparse)
    except UnsupportedModelError as error:
        return Row(PART, what, float("nan"), note=str(error))
    ways = {"dense": partial(_forward, model, batches), "sparse": partial(_forward, sparse, batches)}
    seconds = in_turn(ways, rounds)
    return row_of(PART, what, seconds["dense"] / seconds["sparse"], note=f"{len(left)} matrices stay dense")
