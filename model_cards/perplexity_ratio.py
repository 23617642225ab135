r"""The perplexity of a language model over that of the model it was made of, on the same blocks of texts, with a paired
95 % interval.

    python model_cards/perplexity_ratio.py ORIGINAL MODEL --test_file test.jsonl --texts 80 --block_size 256 \
        --gguf_file NAME.gguf

ORIGINAL and MODEL are folders or Hub ids; --gguf_file is of the original. Texts, joined with end tokens, and blocks are
those of recipes/causal_lm.py with --max_test_samples and the same seed. The interval is over the blocks: of the mean
difference of their losses, by the normal distribution.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

Z = 1.959964


def blocks_of(file: Path, tokenizer, texts: int | None, size: int, seed: int) -> list[list[int]]:
    """Blocks of tokens of a file's texts (column text), the first so many as the seed shuffles them."""
    data = load_dataset("json", data_files=str(file), split="train")
    if texts is not None:
        data = data.shuffle(seed=seed).select(range(min(texts, len(data))))
    ids = [token for text in data["text"] if text for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


@torch.no_grad()
def losses_of(model, blocks: list[list[int]], bf16: bool) -> list[float]:
    """The mean loss of a token in each block."""
    model.eval()
    found = []
    for block in blocks:
        ids = torch.tensor([block])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        found.append(float(functional.cross_entropy(logits.float(), ids[0, 1:])))
    return found


def ratio(before: list[float], after: list[float]) -> tuple[float, float, float]:
    """The ratio of the perplexities, and its interval."""
    changes = [ours - theirs for ours, theirs in zip(after, before, strict=True)]
    mean, half = statistics.fmean(changes), Z * statistics.stdev(changes) / math.sqrt(len(changes))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="folder or Hub id of the model before")
    parser.add_argument("model", help="folder or Hub id of the smaller one")
    parser.add_argument("--test_file", type=Path, required=True, help=".jsonl file with a column text")
    parser.add_argument("--texts", type=int, help="the first so many, shuffled by the seed")
    parser.add_argument("--block_size", type=int, default=512, help="tokens of a block")
    parser.add_argument("--seed", type=int, default=42, help="that of the recipe")
    parser.add_argument("--gguf_file", help="name of the original's GGUF file")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, as the recipe with --bf16")
    given = parser.parse_args()
    source = {"gguf_file": given.gguf_file} if given.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(given.original, **source)
    blocks = blocks_of(given.test_file, tokenizer, given.texts, given.block_size, given.seed)
    before = losses_of(
        AutoModelForCausalLM.from_pretrained(given.original, dtype=torch.float32, **source), blocks, given.bf16
    )
    after = losses_of(AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32), blocks, given.bf16)
    told, low, high = ratio(before, after)
    perplexities = [math.exp(statistics.fmean(losses)) for losses in (before, after)]
    sys.stdout.write(
        f"{perplexities[0]:.2f} -> {perplexities[1]:.2f}, {told:.4f} times ({low:.4f} .. {high:.4f}), on {len(blocks)} "
        f"blocks of {given.block_size} tokens\n"
    )


if __name__ == "__main__":
    main()
