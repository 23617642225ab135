"""How fast pruned models are, as a share of the ideal: of the time that the removed blocks took, by the times of the
blocks in the whole model. An encoder, an encoder-decoder that generates, a CNN, and a causal model that generates with
its cache; evaluation, and training steps of all but the generation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

from deeparc_hf import remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.search.timing import compare_times, time_blocks, work_of

from .rows import Row, in_turn, row_of

__all__ = ["measure", "measure_saving"]

PART = "result"


def encoder() -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=1000))
    return model, {"input_ids": torch.randint(5, 1000, (32, 64))}, {"bert.encoder.layer": [2, 3, 5, 8]}


def t5() -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    sizes = {"d_model": 384, "d_kv": 64, "num_heads": 6, "d_ff": 1536, "num_layers": 6, "num_decoder_layers": 6}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=1000, decoder_start_token_id=0))
    inputs = {"input_ids": torch.randint(5, 1000, (16, 64)), "labels": torch.randint(5, 1000, (16, 16))}
    return model, inputs, {"encoder.block": [2, 4], "decoder.block": [2, 4]}


def resnet() -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    model = tf.ResNetForImageClassification(tf.ResNetConfig())
    removed = {f"resnet.encoder.stages.{stage}.layers": [1] for stage in range(4)}
    return model, {"pixel_values": torch.randn(8, 3, 160, 160)}, removed


def llama() -> tuple[nn.Module, dict[str, Any], dict[str, list[int]]]:
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = tf.LlamaConfig(**sizes, vocab_size=1000, pad_token_id=0, eos_token_id=None, bos_token_id=1)
    inputs = {"input_ids": torch.randint(5, 1000, (8, 64))}
    return tf.LlamaForCausalLM(config), inputs, {"model.layers": [3, 5, 7, 9]}


KINDS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], dict[str, list[int]]]]] = {
    "BERT, 12 blocks": encoder,
    "T5 that generates, 6 + 6 blocks": t5,
    "ResNet-50": resnet,
    "Llama, 12 blocks": llama,
}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    for name, make in KINDS.items():
        if quick and make is not encoder:
            continue
        torch.manual_seed(0)
        model, inputs, removed = make()
        yield from measure_saving(name, model.eval(), inputs, removed, max(rounds, 3 if quick else 15))


def measure_saving(
    name: str, model: nn.Module, inputs: dict[str, Any], removed: dict[str, list[int]], turns: int
) -> Iterator[Row]:
    """How fast a model becomes without some blocks, as a share of the ideal."""
    whole = describe(model)
    modules = {(stack, i): block for stack, s in whole.stacks.items() for i, block in enumerate(s.blocks)}
    work = work_of(whole.host, inputs)
    times = time_blocks(whole.host, modules, work, turns)
    ideal = times.speedup([(stack, index) for stack, indices in removed.items() for index in indices])
    smaller = copy.deepcopy(model)
    remove_blocks(smaller, removed)
    measured, (low, high) = compare_times(whole.host, describe(smaller).host, work, turns)
    told = f"{sum(map(len, removed.values()))} blocks gone; {work}; {measured:.2f} times as fast, ideal {ideal:.2f}"
    yield Row(
        PART,
        f"{name}: evaluation, share of the ideal",
        measured / ideal,
        low / ideal,
        high / ideal,
        turns,
        ">= 0.95",
        told,
    )
    if isinstance(model, tf.LlamaForCausalLM):
        yield _generation(name, model, smaller, inputs, ideal, turns)
    if not isinstance(model, tf.T5ForConditionalGeneration):
        yield _training(name, model, smaller, inputs, removed, ideal, turns)


def _generation(
    name: str, model: nn.Module, smaller: nn.Module, inputs: dict[str, Any], ideal: float, turns: int
) -> Row:
    """Generation with a cache; the ideal is that of the forward pass, by the times of its blocks."""

    def generate(which: Any) -> None:
        which.generate(**inputs, max_new_tokens=16, do_sample=False)

    seconds = in_turn({"whole": partial(generate, model), "smaller": partial(generate, smaller)}, turns // 2)
    share = seconds["whole"] / seconds["smaller"] / ideal
    told = f"16 new tokens, {np.median(seconds['whole'] / seconds['smaller']):.2f} times as fast"
    return row_of(PART, f"{name}: generation with a cache, share of the ideal", share, ">= 0.95", told)


def _training(
    name: str,
    model: nn.Module,
    smaller: nn.Module,
    inputs: dict[str, Any],
    removed: dict[str, list[int]],
    evaluation: float,
    turns: int,
) -> Row:
    """A step of AdamW. Where all blocks are alike, the ideal follows from the step of a model with one block; in a CNN,
    whose blocks differ, it is that of the evaluation.
    """
    steps = {"whole": _step(copy.deepcopy(model), inputs), "smaller": _step(copy.deepcopy(smaller), inputs)}
    stacks = describe(model).stacks
    stack, count = next((name, len(stack)) for name, stack in stacks.items())
    alike = len(stacks) == 1
    if alike:
        least = copy.deepcopy(model)
        remove_blocks(least, {stack: list(range(1, count))})
        steps["least"] = _step(least, inputs)
    seconds = in_turn(steps, turns)
    whole, found = seconds["whole"], seconds["whole"] / seconds["smaller"]
    ideal = np.full(turns, evaluation)
    if alike:  # from the least model to the whole one in proportion to the number of blocks
        ideal = whole / (whole - len(removed[stack]) / (count - 1) * (whole - seconds["least"]))
    told = f"{np.median(found):.2f} times as fast, ideal {np.median(ideal):.2f}"
    return row_of(PART, f"{name}: training step, share of the ideal", found / ideal, ">= 0.95", told)


def _step(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        output = model(**inputs)
        (output.loss if output.get("loss") is not None else output.logits.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
