# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
r"""Causal language models: remove blocks of a Llama-like model in iterations, heal or retrain, zero weights, and
measure perplexity.

    python recipes/causal_lm.py --config recipes/configs/smollm2_bbc.yaml
    accelerate launch recipes/causal_lm.py --config recipes/configs/smollm2_bbc.yaml --similarity cosine \
        --output_dir runs/cosine

Every setting of the config file may be given on the command line, which wins. Criteria are compared by runs with
--similarity cka (debiased), cosine (block influence) and effect. Any text data set or local .csv, .jsonl, .txt or
.parquet file will do; each row (of a .txt file each line) is a document. Documents are joined with end tokens and cut
into blocks. Nothing is trained, before or after the removal, with

    python recipes/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --dataset Salesforce/wikitext \
        --dataset_config wikitext-2-raw-v1 --finetune_epochs 0 --retrain_epochs 0 --num_blocks 27 --heal lstsq \
        --output_dir runs/smollm2

A GGUF file is given by --gguf_file NAME, beside the Hub id or folder that holds it. A folder with a config.json and a
tokenizer but no weights is trained from scratch. A gate (--max_drop) is on the loss, whose exponential the perplexity
is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from deeparc_hf.core.settings import setting
from experiment.language import EvaluationArguments


@dataclass
class LanguageArguments(EvaluationArguments):
    """Texts and blocks, and what the models are asked."""

    num_prompts: int = setting(
        0, "prompts that each model goes on from: of the file, else first halves of the first test blocks"
    )

    text_column: str = setting("text", "column of the texts")
    block_size: int = setting(512, "tokens of a block")
    gguf_file: str | None = setting(None, "name of the model's GGUF file; its weights are turned into float32")


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

    from deeparc_hf.errors import ConfigError
    from experiment.arguments import begin
    from experiment.asked import Asked
    from experiment.chat import answers_section, block_prompts
    from experiment.models import loader
    from experiment.perplexity import PerplexityMeasure, block_losses, collate_blocks, token_blocks
    from experiment.provenance import provenance
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, text, pruning, training = begin(LanguageArguments, argv, __doc__)
    if pruning.metric not in (None, "loss", "eval_loss"):
        raise ConfigError(
            "The gate of this recipe is on the loss (a larger metric counts as better otherwise), found "
            f"{pruning.metric!r}."
        )
    source = {"gguf_file": text.gguf_file} if text.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(data.model, revision=data.model_revision, **source)
    splits = token_blocks(load_splits(data, training.seed), tokenizer, text.text_column, text.block_size)
    measure = PerplexityMeasure(splits.test)
    prompts = block_prompts(splits.test, tokenizer, text.num_prompts, text.prompts_file)
    asked = Asked(text, prompts, tokenizer, chat=False, processes=training.world_size)

    load_unchecked = loader(AutoModelForCausalLM, data, pruning, gguf_file=text.gguf_file)

    def load(name: str) -> Any:
        model = load_unchecked(name)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and text.block_size > longest:
            raise ConfigError(f"block_size is {text.block_size}, and the model takes {longest} tokens at most.")
        return model

    trainer = partial(
        Trainer,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=tokenizer,
        data_collator=collate_blocks,
        compute_metrics=measure.metrics,
        preprocess_logits_for_metrics=block_losses,
    )
    made_by = provenance(__file__, argv, data, text, training, splits)
    samples = (
        f"A sample is a block of {text.block_size} tokens. Perplexity is exp(mean loss of a token); its "
        "interval is over the blocks."
    )
    told = {"provenance": made_by, "notes": [samples, *asked.notes], "sections": answers_section}
    if prompts or text.harness_tasks:
        told["once"] = asked
    # average_tokens: this loss follows the number of tokens of all processes
    return Experiment(data, pruning, training, load, trainer, splits, measure, average_tokens=True, **told).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
