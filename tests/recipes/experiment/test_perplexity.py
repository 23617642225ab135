"""Blocks of tokens, their losses, and the perplexity with its interval."""

from __future__ import annotations

import math
from types import SimpleNamespace

import datasets
import pytest
import torch

from deeparc_hf.errors import ConfigError
from experiment.perplexity import PerplexityMeasure, block_losses, collate_blocks, token_blocks
from experiment.splits import Splits
from tests.publishing import tiny_tokenizer

END = 2


def blocks(texts, size, tokenizer=None):
    part = datasets.Dataset.from_dict({"text": texts, "other": list(range(len(texts)))})
    return token_blocks(Splits(part, part, part), tokenizer or tiny_tokenizer(), "text", size)


def test_texts_are_joined_with_end_tokens_and_cut():
    found = blocks(["w0 w1", None, "", "w2 w3 w4", "w5"], 3).train
    assert found.column_names == ["input_ids"]
    assert [list(row) for row in found["input_ids"]] == [[5, 6, END], [7, 8, 9], [END, 10, END]]
    assert len(blocks(["w0 w1", "w2 w3 w4", "w5"], 4).train) == 2  # one token is left over


def test_nothing_is_lost_between_batches_of_rows():
    """`Dataset.map` hands over a thousand rows at a time."""
    found = blocks([f"w{number % 90}" for number in range(2501)], 8).train
    joined = [token for row in found["input_ids"] for token in row]
    assert joined == [token for number in range(2501) for token in (5 + number % 90, END)][: len(joined)]
    assert len(joined) == 2501 * 2 // 8 * 8


def test_a_text_that_ends_with_the_end_token_gets_no_second_one():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    assert [list(row) for row in blocks(["w0 </s>", "w1"], 2, tokenizer).train["input_ids"]] == [[5, END], [6, END]]


def test_what_gives_no_blocks_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="The train data has fewer than 9 tokens, which is block_size"):
        blocks(["w0 w1"], 9)
    with pytest.raises(ConfigError, match="block_size must be at least 2"):
        blocks(["w0 w1"], 1)
    part = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(ConfigError, match="'text' holds no texts"):
        token_blocks(Splits(part, part, part), tokenizer, "text", 2)
    with pytest.raises(ConfigError, match="has no end token"):
        token_blocks(Splits(part, part, part), SimpleNamespace(eos_token_id=None), "text", 2)


def test_losses_are_those_of_the_next_tokens():
    batch = collate_blocks([{"input_ids": [1, 2, 3]}, {"input_ids": [3, 0, 0]}])
    assert torch.equal(batch["input_ids"], batch["labels"]) and batch["input_ids"] is not batch["labels"]
    logits = torch.randn(2, 3, 5, dtype=torch.float64).to(torch.bfloat16)
    found = block_losses(logits, batch["labels"])
    scores = logits.float().log_softmax(-1)
    wanted = [-(scores[0, 0, 2] + scores[0, 1, 3]) / 2, -(scores[1, 0, 0] + scores[1, 1, 0]) / 2]
    assert found.dtype == torch.float32 and torch.allclose(found, torch.stack(wanted), atol=1e-6)


def measured(losses):
    measure = PerplexityMeasure("test")

    def evaluate(data, metric_key_prefix):
        assert data == "test"
        figures = {**measure.metrics(SimpleNamespace(predictions=losses)), "loss": 7.0, "runtime": 1.0}
        return {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}

    return measure(SimpleNamespace(evaluate=evaluate))


def test_perplexity_and_its_interval():
    found = measured([1.0, 2.0, 3.0])
    half = 1.959964 / math.sqrt(3)
    assert found.metrics == {"loss": 2.0, "perplexity": pytest.approx(math.exp(2))} and found.samples == 3
    assert found.intervals["perplexity"] == pytest.approx((math.exp(2 - half), math.exp(2 + half)))
    assert found.intervals["loss"] == pytest.approx((2 - half, 2 + half))


def test_one_block_has_no_interval_and_a_broken_model_no_number():
    assert measured([1.0]).intervals == {} and measured([1.0]).metrics["loss"] == 1.0
    assert measured([5000.0, 5000.0]).metrics["perplexity"] == math.inf
