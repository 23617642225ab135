# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
"""Question generation: fine-tune a T5, prune encoder and decoder as stacks of their own, retrain, and score generated
questions.

    accelerate launch recipes/t5_qg.py
    torchrun --nproc_per_node 2 recipes/t5_qg.py --config recipes/configs/t5_base_squad.yaml

Without a config and a model the settings are those of the seed's table (configs/t5_base_squad.yaml). Given are a
passage and an answer in it, asked for is the question. Every setting of the config file may be given on the command
line, which wins. Any data set with a passage, a question and an answer (a text, or SQuAD's list of texts) will do. A
folder with a config.json and a tokenizer but no weights is trained from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deeparc_hf.core.settings import setting


@dataclass
class QuestionArguments:
    """Columns, lengths, and how questions are generated."""

    context_column: str = setting("context", "column of the passages")
    question_column: str = setting("question", "column of the questions")
    answer_column: str = setting("answers", "column of the answers: texts, or SQuAD's {text: [...]}")
    prefix: str = setting("generate question: ", "what each input begins with")
    max_source_length: int = setting(512, "longest input in tokens")
    max_target_length: int = setting(64, "longest question in tokens")
    max_new_tokens: int | None = setting(
        None, "longest question that is generated, in tokens; default: max_target_length"
    )
    num_beams: int = setting(4, "beams of the search")


def main(argv: list[str] | None = None) -> list[Any]:
    """Run the experiment and return the rows of its table."""
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainingArguments,
    )

    from experiment.arguments import begin
    from experiment.generation import TITLES, QuestionMeasure, first_answers, scores_of, write_question_scores
    from experiment.metrics import Metrics
    from experiment.models import loader
    from experiment.provenance import provenance
    from experiment.seq2seq import GeneratingTrainer
    from experiment.sequence import Experiment
    from experiment.splits import load_splits

    data, text, pruning, training = begin(
        QuestionArguments,
        argv,
        __doc__,
        Seq2SeqTrainingArguments,
        Path(__file__).parent / "configs" / "t5_base_squad.yaml",
    )
    splits = load_splits(data, training.seed)
    splits.need_texts(context_column=text.context_column, question_column=text.question_column)
    splits.need(answer_column=text.answer_column)
    tokenizer = AutoTokenizer.from_pretrained(data.model, revision=data.model_revision)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        answers = first_answers(rows[text.answer_column], text.answer_column)
        passages = rows[text.context_column]
        sources = [
            f"{text.prefix}answer: {answer} context: {passage}"
            for answer, passage in zip(answers, passages, strict=True)
        ]
        targets = tokenizer(text_target=rows[text.question_column], truncation=True, max_length=text.max_target_length)
        return {
            **tokenizer(sources, truncation=True, max_length=text.max_source_length),
            "labels": targets["input_ids"],
        }

    references = list(splits.test[text.question_column])
    splits = splits.map(encode)

    longest = text.max_new_tokens or text.max_target_length
    generates = (pruning.metric or "loss").removeprefix("eval_") != "loss"
    if generates:  # the gate judges by a score of generated questions
        training.predict_with_generate = True
        training.generation_max_length, training.generation_num_beams = longest + 1, text.num_beams  # and the start

    metrics = Metrics(["bleu", "rouge", "meteor"], data.evaluate_scripts)

    def trainer(model: Any, args: Any, callbacks: list[Any]) -> GeneratingTrainer:
        return GeneratingTrainer(
            model=model,
            args=args,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=callbacks,
            compute_metrics=partial(scores_of, tokenizer, metrics) if generates else None,
        )

    search = {"num_beams": text.num_beams, "max_new_tokens": longest}
    measure = QuestionMeasure(splits.test, references, tokenizer, metrics, **search)
    made_by = provenance(__file__, argv, data, text, training, splits, metrics.told)
    load = loader(AutoModelForSeq2SeqLM, data, pruning)
    told = {
        "provenance": made_by,
        "notes": [f"{metrics}"],
        "known": list(TITLES),
        "finish": lambda rows: write_question_scores(Path(training.output_dir), rows, measure),
    }
    return Experiment(data, pruning, training, load, trainer, splits, measure, **told).run()


if __name__ == "__main__":
    from experiment.command import run

    run(main)
