"""What healing gives back: the metric right after blocks are removed, plain and healed, without any retraining.

A classifier of texts (accuracy with its 95 % Wilson interval) or a causal language model (perplexity with a 95 % bootstrap interval over
the held-out sequences). The map before each removal site is refitted on training samples; each fifth of them is held out.

    python -m tests.benchmarks.healing_grid --model DIR --train train.csv --heldout test.csv --remove 4 --remove 3,4 --output FOLDER

Data: .csv files with a column text, and a column label for a classifier.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks, heal_model, remove_blocks
from deeparc_hf.record import package_versions
from deeparc_hf.report import hardware, wilson_interval

LENGTH = 128


def texts_of(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in chosen]


def batches(rows: Sequence[dict[str, str]], tokenizer: object, causal: bool, size: int = 32) -> list[dict[str, torch.Tensor]]:
    texts = [row["text"] for row in rows]
    if not causal:
        settings = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "pt"}
        return [dict(tokenizer(texts[i : i + size], **settings)) for i in range(0, len(texts), size)]
    # whole sequences of one length: texts end to end
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[: len(rows)]
    return [{"input_ids": part} for part in ids.split(8)]


def accuracy(model: nn.Module, rows: Sequence[dict[str, str]], given: Sequence[dict[str, torch.Tensor]]) -> tuple[float, float, float]:
    targets = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    with torch.no_grad():
        right = torch.cat([model.eval()(**batch).logits.argmax(1) for batch in given]) == targets
    return float(right.float().mean()), *wilson_interval(int(right.sum()), len(right))


def perplexity(model: nn.Module, rows: object, given: Sequence[dict[str, torch.Tensor]]) -> tuple[float, float, float]:
    losses = []
    with torch.no_grad():
        for batch in given:
            logits, ids = model.eval()(**batch, use_cache=False).logits[:, :-1], batch["input_ids"][:, 1:]
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(dim=1)
            losses += loss.tolist()
    values = np.array(losses)
    draws = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return math.exp(values.mean()), *(math.exp(q) for q in np.quantile(draws, [0.025, 0.975]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", help="name of the file, where the model is one")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--remove", action="append", required=True, help="blocks of the first stack, as 3,4; may be repeated")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the report")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    causal = args.gguf is not None
    kind = tf.AutoModelForCausalLM if causal else tf.AutoModelForSequenceClassification
    options = {"gguf_file": args.gguf} if causal else {}
    model, tokenizer = kind.from_pretrained(args.model, **options), tf.AutoTokenizer.from_pretrained(args.model, **options)
    if causal:  # a model from a GGUF file is marked as quantized; a fresh one with its weights is not
        state, config = model.state_dict(), tf.LlamaConfig.from_dict({**model.config.to_dict(), "quantization_config": None})
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = tf.LlamaForCausalLM(config)
        model.load_state_dict(state)
    train, heldout = texts_of(args.train, args.samples, args.seed), texts_of(args.heldout, args.tests, args.seed)
    calibration, given = batches(train, tokenizer, causal), batches(heldout, tokenizer, causal)
    measure, metric = (perplexity, "perplexity") if causal else (accuracy, "accuracy")
    stack = next(iter(find_stacks(model)))
    original = measure(model, heldout, given)
    lines = [f"| removed of {len(find_stacks(model)[stack])} | {metric}, plain | {metric}, healed | squared error left at each site (%) |"]
    lines += ["| --- | ---: | ---: | ---: |", f"| none | {_shown(original)} | | |"]
    rows = []
    for given_blocks in args.remove:
        removed = [int(block) for block in given_blocks.split(",")]
        pruned = copy.deepcopy(model)
        remove_blocks(pruned, {stack: removed})
        plain = measure(pruned, heldout, given)
        healings = heal_model(pruned, model, calibration, samples=args.samples)
        healed = measure(pruned, heldout, given)
        left = ", ".join("-" if h.reason else f"{100 * h.held_out:.1f}" for h in healings)
        lines.append(f"| {', '.join(map(str, removed))} | {_shown(plain)} | {_shown(healed)} | {left} |")
        rows.append({"removed": removed, "plain": plain, "healed": healed, "sites": [h.to_dict() for h in healings]})
        print(lines[-1], flush=True)
    samples, tests = (sum(len(batch["input_ids"]) for batch in part) for part in (calibration, given))
    facts = {
        "model": args.name,
        "samples to fit on": samples,
        "held-out samples": tests,
        "seed": args.seed,
        **hardware(),
        **package_versions(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"healing_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps({"facts": facts, "original": original, "rows": rows}, indent=1) + "\n")
    shown = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    text = f"# Healing {args.name}\n\nRight after the removal, without any retraining.\n\n" + "\n".join(lines) + f"\n\n{shown}\n"
    stem.with_suffix(".md").write_text(text)


def _shown(values: tuple[float, float, float]) -> str:
    digits = 4 if values[0] <= 1 else 1
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} .. {values[2]:.{digits}f})"


if __name__ == "__main__":
    main()
