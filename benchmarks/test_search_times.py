"""Whether a model becomes as fast as the times of its blocks say: an encoder, a T5 that generates, and a ResNet, whose
blocks differ. Prints both speed-ups.

pytest benchmarks/test_search_times.py

Slow: a busy machine moves either of them by more than what is between them.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers as tf

from deeparc_hf import remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.search.timing import Work, compare_times, time_blocks, work_of

from .measuring import THREADS

BOUND, TURNS = 0.10, 15


def encoder():
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 12}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=1000))
    return model, {"input_ids": torch.randint(5, 1000, (32, 64))}, {"bert.encoder.layer": [2, 3, 5]}


def t5():
    sizes = {"d_model": 384, "d_kv": 64, "num_heads": 6, "d_ff": 1536, "num_layers": 6, "num_decoder_layers": 6}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=1000, decoder_start_token_id=0))
    inputs = {"input_ids": torch.randint(5, 1000, (16, 64)), "labels": torch.randint(5, 1000, (16, 8))}
    return model, inputs, {"encoder.block": [2], "decoder.block": [2, 4]}


def resnet():
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512], "depths": [3, 4, 4, 3]}
    model = tf.ResNetForImageClassification(tf.ResNetConfig(**sizes, layer_type="bottleneck"))
    stages = {f"resnet.encoder.stages.{i}.layers": [1] for i in (0, 2)}
    return model, {"pixel_values": torch.randn(16, 3, 128, 128)}, stages


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("make", [encoder, t5, resnet])
def test_a_model_becomes_as_fast_as_the_times_of_its_blocks_say(make, capsys):
    torch.manual_seed(0)
    model, inputs, removed = make()
    whole = describe(model.eval())
    work: Work = work_of(whole.host, inputs)
    modules = {(name, i): block for name, stack in whole.stacks.items() for i, block in enumerate(stack.blocks)}
    times = time_blocks(whole.host, modules, work, TURNS)
    predicted = times.speedup([(name, index) for name, indices in removed.items() for index in indices])
    smaller = copy.deepcopy(model)
    remove_blocks(smaller, removed)
    measured, (low, high) = compare_times(whole.host, describe(smaller).host, work, TURNS)
    error = predicted / measured - 1
    with capsys.disabled():
        print(
            f"\n{make.__name__}, {work}: predicted {predicted:.3f} times as fast, measured {measured:.3f} "
            f"({low:.3f} .. {high:.3f}), {100 * error:+.1f} % ({TURNS} turns, {THREADS} threads)"
        )
    assert 0 < sum(times.shares.values()) <= 1.05
    if os.environ.get("DEEPARC_BENCHMARK_BOUND"):
        assert abs(error) <= BOUND
