# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes,chat,harness]"]
# ///
"""Chat models: remove blocks of a Llama-like model by search, heal, repair by LoRA or by training on, taught by the
whole model, and compare losses, tasks and answers.

    python recipes/chat.py --config recipes/configs/smollm2_chat.yaml
    accelerate launch recipes/chat.py --config recipes/configs/smollm2_chat.yaml --lora_rank null --output_dir runs/full

Every setting of the config file may be given on the command line, which wins; those of the training are TRL's
(`SFTConfig`: packing, max_length, assistant_only_loss and so on). The data hold conversations (--messages_column, lists
of {"role", "content"}), of which the last answer is learnt, or prompts and completions (--prompt_column,
--completion_column). Each model is measured on the test data and answers the same prompts, and --harness_tasks asks it
tasks of lm-evaluation-harness, by name from the Hub or from local task files (--harness_folder):

    python recipes/chat.py --config recipes/configs/smollm2_chat.yaml --harness_tasks arc_easy hellaswag

Nothing is trained, before or after the removal, with --retrain_epochs 0. A GGUF file is given by --gguf_file NAME,
beside the Hub id or folder that holds it. A gate (--max_drop) is on the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deeparc_hf.core.settings import setting
from experiment.language import EvaluationArguments


@dataclass
class ChatArguments(EvaluationArguments):
    """Conversations, and what the models are asked."""

    messages_column: str | None = setting(None, "column of conversations")
    prompt_column: str | None = setting(None, "column of prompts, in place of conversations")
    completion_column: str | None = setting(None, "column of what follows them, which is learnt")
    every_answer: bool = setting(
        False, "learn every answer of a conversation, not the last alone; the chat template must mark answers"
    )
    gguf_file: str | None = setting(None, "name of the model's GGUF file; its weights are turned into float32")


def training_type() -> type:
    """The Trainer's arguments: TRL's."""
    from experiment.chat import sft_library

    arguments: type = sft_library().SFTConfig
    return arguments


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deeparc_hf.errors import ConfigError
    from experiment.arguments import begin
    from experiment.asked import Asked
    from experiment.chat import (
        ConversationMeasure,
        answers_section,
        conversations,
        encoded,
        prompts_of,
        sft_library,
        take_template,
    )
    from experiment.models import loader
    from experiment.provenance import provenance
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    trl = sft_library()
    config = Path(__file__).parent / "configs" / "smollm2_chat.yaml"
    data, chat, pruning, training = begin(ChatArguments, argv, __doc__, training_type(), config)
    if pruning.metric not in (None, "loss", "eval_loss"):
        raise ConfigError(f"The gate of this recipe is on the loss, found metric={pruning.metric!r}. Leave it out.")
    source = {"gguf_file": chat.gguf_file} if chat.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(data.model, revision=data.model_revision, **source)
    columns = {name: getattr(chat, f"{name}_column") for name in ("messages", "prompt", "completion")}
    talks = columns["messages"] is not None
    take_template(tokenizer, training, talks)
    training.assistant_only_loss |= chat.every_answer  # else the questions would be learnt too
    splits = conversations(load_splits(data, training.seed), **columns, every_answer=chat.every_answer)
    prompts = prompts_of(splits, chat.num_prompts, chat.prompts_file, chat=talks)
    asked = Asked(chat, prompts, tokenizer, chat=talks, processes=training.world_size)
    load = loader(AutoModelForCausalLM, data, pruning, gguf_file=chat.gguf_file)
    splits = encoded(splits, load(data.model), tokenizer, training)
    parts = {"train_dataset": splits.train, "eval_dataset": splits.validation}
    training.eval_packing = False  # a sample stays a conversation
    samples = (
        "A sample is a conversation, or a prompt with its completion; losses are of the answers' tokens. Perplexity is "
        "exp(mean loss of a token)."
    )
    told = {
        "provenance": provenance(__file__, argv, data, chat, training, splits),
        "notes": [samples, *asked.notes],
        "once": asked,
        "sections": answers_section,
        "average_tokens": True,  # SFTTrainer's loss follows the number of tokens of all processes
    }

    def trainer(model: Any, args: Any, callbacks: list[Any]) -> Any:
        args = replace(args, assistant_only_loss=False)  # the labels are made
        return trl.SFTTrainer(model, args, **parts, processing_class=tokenizer, callbacks=callbacks)

    measure = ConversationMeasure(splits.test)
    return Experiment(data, pruning, training, load, trainer, splits, measure, **told).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
