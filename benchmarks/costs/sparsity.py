"""Half of the weights zeroed by Wanda (Sun et al. 2023, arXiv 2306.11695), in forward passes over the same samples;
beside it torchao's and llm-compressor's Wanda, where they are installed.

torchao measures the inputs in one pass through the dense model, as `sequential=False` does here; llm-compressor goes
block by block, as is the default here. torchao hooks every linear map that it is given, so it gets those in the blocks.
Choosing the zeros beside a full sort of the scores, and keeping them zero beside a training step.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
import transformers as tf
from torch import Tensor, nn

from deeparc_hf import sparsify_model
from deeparc_hf.sparsity.masks import Zeros, choose_lowest, choose_pattern, zero_chosen
from deeparc_hf.sparsity.methods import methods

from .rows import Row, in_turn, row_of, that_run

__all__ = ["measure"]

PART = "Wanda"


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = tf.LlamaConfig(**sizes, vocab_size=1000, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    model = tf.LlamaForCausalLM(config).eval()
    ids = torch.randint(5, 1000, (32 if quick else 128, 64))
    batches = [{"input_ids": part} for part in ids.split(16)]
    calls: dict[str, Callable[[], Any]] = {
        "forward": partial(_forward, model, batches),
        "block by block": partial(_ours, model, batches, True),
        "in one pass": partial(_ours, model, batches, False),
    }
    if importlib.util.find_spec("torchao") is not None:
        calls["torchao, in one pass"] = partial(_torchao, model, batches)
    if importlib.util.find_spec("llmcompressor") is not None:
        calls["llm-compressor, block by block"] = partial(_llm_compressor, model, ids)
    yield from that_run(PART, calls)
    seconds = in_turn(calls, rounds)
    told = f"{len(ids)} texts of 64 tokens, 12 blocks of 384, copying the model included"
    for name in list(calls)[1:]:
        yield row_of(PART, f"{name} / forward", seconds[name] / seconds["forward"], note=told)
    yield from _choosing(rounds, 1 if quick else 12)
    yield _keeping(rounds)


def _forward(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _ours(model: nn.Module, batches: list[dict[str, torch.Tensor]], sequential: bool) -> None:
    sparsify_model(copy.deepcopy(model), batches, sparsity=0.5, sequential=sequential, progress=False)


def _torchao(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    from torchao.sparsity import WandaSparsifier

    dense = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = WandaSparsifier(sparsity_level=0.5)
        names = [name for name, module in dense.model.layers.named_modules() if isinstance(module, nn.Linear)]
        sparsifier.prepare(dense, [{"tensor_fqn": f"model.layers.{name}.weight"} for name in names])
        _forward(dense, batches)
        sparsifier.step()
        sparsifier.squash_mask()


def _llm_compressor(model: nn.Module, ids: torch.Tensor) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))  # it asks for one, and uses none
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    dense = copy.deepcopy(model)
    logging.disable(logging.CRITICAL)
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            dense.config.save_pretrained(scratch)
            dense.config.name_or_path = scratch  # where it looks for more files
            oneshot(
                model=dense,
                dataset=data,
                processor=tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]"),
                recipe=WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"]),
                num_calibration_samples=len(ids),
                batch_size=16,
            )
    finally:
        logging.disable(logging.NOTSET)


SETTINGS: dict[str, tuple[Callable[[Tensor], Tensor], int | None, float]] = {
    "10 %": (partial(choose_lowest, sparsity=0.1), None, 0.1),
    "50 %": (partial(choose_lowest, sparsity=0.5), None, 0.5),
    "2:4": (partial(choose_pattern, keep=2, group=4), 4, 0.5),
    "4:8": (partial(choose_pattern, keep=4, group=8), 8, 0.5),
}


def _choosing(rounds: int, blocks: int) -> Iterator[Row]:
    """The zeros of BERT-base's linear maps scored, chosen and made. The ways take turns at every matrix."""
    torch.manual_seed(0)
    shapes = [*[(768, 768)] * 4, (3072, 768), (768, 3072)] * blocks
    matrices = [(torch.randn(shape) * 0.02, torch.rand(shape[1], dtype=torch.float64) + 0.1) for shape in shapes]
    for name, (choose, group, share) in SETTINGS.items():
        ways = {"ours": partial(_chosen, choose=choose), "sorted": partial(_sorted, group=group, share=share)}
        seconds = {way: np.zeros(rounds + 1) for way in ways}
        for turn in range(rounds + 1):
            for weight, norms in matrices:
                for way, zero in ways.items():
                    copied = weight.clone()
                    start = time.perf_counter()
                    zero(copied, norms)
                    seconds[way][turn] += time.perf_counter() - start
        ratio = (seconds["ours"] / seconds["sorted"])[1:]
        yield row_of(PART, f"choosing {name} / a full sort", ratio, "<= 0.5", f"the linear maps of {blocks} x 768")


def _chosen(weight: Tensor, norms: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
    zero_chosen(weight, choose(methods.get("wanda")().score(weight, norms)))


def _sorted(weight: Tensor, norms: Tensor, group: int | None, share: float) -> None:
    score = weight.abs() * norms.float()
    score = score.view(-1, group or score.shape[1])
    order = torch.sort(score, dim=-1, stable=True).indices[:, : int(score.shape[1] * share)]
    weight[torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)] = 0


def _keeping(rounds: int) -> Row:
    torch.manual_seed(0)
    config = tf.BertConfig(num_hidden_layers=4, vocab_size=1000)
    model = tf.BertForSequenceClassification(config).train()
    batch = {"input_ids": torch.randint(0, 1000, (8, 128)), "labels": torch.zeros(8, dtype=torch.long)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    sparsify_model(model, method="magnitude", progress=False)
    zeros = Zeros()
    for name in model.config.pruning_config["sparsity"]["matrices"]:
        weight = model.get_submodule(name).weight
        zeros.add(weight, weight.detach() == 0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = in_turn({"step": step, "zeros": zeros.apply}, rounds)
    told = "4 blocks of 768, 8 x 128 tokens, AdamW"
    return row_of(
        PART, "keeping half of the weights zero / a step", seconds["zeros"] / seconds["step"], "<= 0.03", told
    )
