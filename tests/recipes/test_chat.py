"""recipes/chat.py, end to end on a tiny Llama: TRL's SFTTrainer, LoRA and training on, tasks and answers."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard

from deeparc_hf.errors import ConfigError
from experiment.results import read_rows
from tests.publishing import tiny_tokenizer
from tests.zoo import ZOO

from .running import RECIPES, check_files, recipe, without_times, words
from .tiny import write_task

pytest.importorskip("trl")
# TRL's own defaults are given by a name that transformers has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

main = recipe("chat").main
STACK = "model.layers"
TEMPLATE = (
    "{% for m in messages %}w{{ 5 if m.role == 'user' else 6 }} {{ m.content }} w7 {% endfor %}"
    "{% if add_generation_prompt %}w6 {% endif %}"
)
SFT = {"bf16": False, "gradient_checkpointing": False, "max_length": 32}
PRUNING = {"finetune_epochs": 0, "num_blocks": 3, "retrain_epochs": 1, "search": "greedy", "heal": "lstsq"}


def talks(split, count):
    """Conversations of one or two questions; an answer repeats a word of its question."""
    draw = random.Random(split)
    for _ in range(count):
        rounds = [f"w{draw.randrange(20, 60)}" for _ in range(draw.randrange(1, 3))]
        pairs = [
            ({"role": "user", "content": f"w9 {word}"}, {"role": "assistant", "content": f"{word} w8"})
            for word in rounds
        ]
        yield [message for pair in pairs for message in pair]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    ZOO["llama"].model().save_pretrained(folder / "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    for split, count in {"train": 64, "validation": 16, "test": 20}.items():
        rows = [{"messages": talk, "id": number} for number, talk in enumerate(talks(split, count))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = [{"question": talk[-2]["content"], "reply": f" {talk[-1]['content']}"} for talk in talks(split, count)]
        (folder / f"{split}_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="module")
def task(data):
    """A local task of the harness: which word repeats that of the question."""
    draw = random.Random(0)
    rows = []
    for number in range(12):
        choices = [f"w{draw.randrange(20, 60)}" for _ in range(3)]
        rows.append({"question": f"w9 {choices[number % 3]}", "choices": choices, "answer": number % 3})
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return write_task(data, "repeats_a_word", rows, "{{question}}", metric_list=metrics)


def files(data, kind=""):
    return {f"{split}_file": str(data / f"{split}{kind}.jsonl") for split in ("train", "validation", "test")}


def asked(data, folder, **more):
    shared = {"model": str(data / "llama"), **files(data), "messages_column": "messages", "output_dir": str(folder)}
    given = {**shared, **SFT, **PRUNING, "max_new_tokens": 4, "num_prompts": 2, **more}
    return words(**given)


@pytest.fixture(scope="module")
def run(data, task, tmp_path_factory):
    """The whole: search, healing, LoRA taught by the whole model, twice; a task and prompts."""
    folder = tmp_path_factory.mktemp("run")
    more = {"iterations": 2, "num_blocks": [3, 2], "lora_rank": 2, "distill_alpha": 0.5, **task}
    rows = main(asked(data, folder, **more))
    return SimpleNamespace(rows={row.name: row for row in rows}, folder=folder)


def reference_loss(folder, talks_of):
    """Loss of the last answers, by a plain forward pass of each conversation."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    total, count = 0.0, 0
    for talk in talks_of:
        asked = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(asked), len(ids)):
            total, count = total - float(scores[place - 1, ids[place]]), count + 1
    return total / count


def test_every_model_has_a_row_and_its_files(run):
    assert list(run.rows) == [
        "original",
        *(f"iteration {number}{part}" for number in (1, 2) for part in (", removed", "")),
    ]
    check_files(run.folder, list(run.rows.values()), retrained=False)
    assert [sum(row.blocks.values()) for row in run.rows.values()] == [4, 3, 3, 2, 2]


def test_losses_are_of_the_last_answers_of_the_test_data(run, data):
    for row in run.rows.values():
        folder = data / "llama" if row.folder is None else run.folder / row.folder
        wanted = reference_loss(folder, list(talks("test", 20)))
        assert row.measured.metrics["loss"] == pytest.approx(wanted, rel=1e-4)
        assert row.measured.metrics["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        low, high = row.measured.intervals["loss"]
        assert low < wanted < high and row.measured.samples == 20


def test_the_harness_asks_the_live_model_what_it_asks_the_checkpoint(run, data, task):
    """The same task asked of the saved checkpoint in the harness's own way."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager(include_path=task["harness_folder"], include_defaults=False)
    row = run.rows["iteration 2"]
    place = str(run.folder / row.folder)
    settings = {"tasks": ["repeats_a_word"], "task_manager": manager, "device": "cpu", "apply_chat_template": True}
    found = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": place, "dtype": "float32"}, **settings)
    figures = found["results"]["repeats_a_word"]
    for metric in ("acc", "acc_norm"):
        assert row.measured.metrics[f"repeats_a_word {metric}"] == pytest.approx(figures[f"{metric},none"])
        low, high = row.measured.intervals[f"repeats_a_word {metric}"]
        assert high - low == pytest.approx(2 * 1.959964 * figures[f"{metric}_stderr,none"], rel=1e-6)


def test_report_and_card_have_tasks_and_answers(run):
    report = (run.folder / "results.md").read_text("utf-8")
    assert "repeats_a_word acc" in report and "## Answers" in report and "lm_eval" in report
    said = [
        json.loads((run.folder / "texts" / f"{name}.jsonl").read_text("utf-8").splitlines()[0])
        for name in ("original", "iteration-1-removed", "iteration-2")
    ]
    assert len({entry["prompt"] for entry in said}) == 1 and said[0]["prompt"].startswith("user: w9 ")
    card = ModelCard((run.folder / "iteration-2" / "README.md").read_text("utf-8"))
    results = {result.metric_name: result for result in card.data.eval_results}
    last = run.rows["iteration 2"].measured.metrics
    assert results["repeats_a_word acc"].metric_value == pytest.approx(last["repeats_a_word acc"])
    assert results["perplexity"].metric_value == pytest.approx(last["perplexity"])
    answers = card.text.partition("## Answers")[2].partition("\n## ")[0]
    both = [
        [json.loads(line)["generated"] for line in (run.folder / "texts" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("original", "iteration-2")
    ]
    for before, after in zip(*both, strict=True):
        assert f"| {before or '(nothing)'} | {after or '(nothing)'} |" in answers


def test_answers_are_those_of_the_saved_model(run, data):
    model = tf.AutoModelForCausalLM.from_pretrained(run.folder / "iteration-2").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(run.folder / "iteration-2")
    lines = (run.folder / "texts" / "iteration-2.jsonl").read_text("utf-8").splitlines()
    for talk, line in zip(list(talks("test", 20))[:2], lines, strict=True):
        given = tokenizer.apply_chat_template(
            talk[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(given["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert json.loads(line) == {
            "prompt": "\n".join(f"{m['role']}: {m['content']}" for m in talk[:-1]),
            "generated": text,
            "reference": talk[-1]["content"],
        }


@pytest.mark.parametrize(
    "how",
    [
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
        {"measure_removal": True, "freeze": "partial"},
        {"messages_column": None, "prompt_column": "question", "completion_column": "reply", "distill_alpha": 0.5},
    ],
    ids=["packed", "partial training", "prompts and completions"],
)
def test_other_data_and_trainings(data, tmp_path, how):
    """In one training with the callback, as the other recipes, or after a removal that is measured."""
    more = {**how, **(files(data, "_pairs") if "prompt_column" in how else {})}
    rows = main(asked(data, tmp_path, finetune_epochs=1, **more))
    staged = "measure_removal" in how
    assert [sum(row.blocks.values()) for row in rows] == ([4, 3, 3] if staged else [4, 3])
    assert (tmp_path / "iteration-1" / ("report.json" if staged else "pruning_report.json")).is_file()
    assert (rows[-1].frozen > 0) == ("freeze" in how)


@pytest.mark.parametrize("kind", ["last answer", "every answer", "pairs"])
def test_answers_alone_are_learnt(data, tmp_path, monkeypatch, kind):
    """The labels of every training batch, against the words of the answers."""
    template = tmp_path / "marked.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}w5 {{ m.content }} w7 {% else %}w6 "
        "{% generation %}{{ m.content }} w7 {% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w6 {% endif %}"
    )
    more = {"every_answer": True, "chat_template_path": template} if kind == "every answer" else {}
    if kind == "pairs":
        more = {"messages_column": None, "prompt_column": "question", "completion_column": "reply"}
        more |= files(data, "_pairs")
    trl, seen = pytest.importorskip("trl"), set()
    compute = trl.SFTTrainer.compute_loss

    def noting(self, model, inputs, *rest, **settings):
        if model.training:
            pairs = zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True)
            seen.update(tuple(token for token, label in zip(*row, strict=True) if label != -100) for row in pairs)
        return compute(self, model, inputs, *rest, **settings)

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", noting)
    main(asked(data, tmp_path / "out", distill_alpha=0.5, **more))
    answers = [[m["content"] for m in talk if m["role"] == "assistant"] for talk in talks("train", 64)]
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token
    texts = [f"{each[-1]} {end}" if kind == "pairs" else f"{each[-1]} w7" for each in answers]
    if kind == "every answer":
        texts = [" ".join(f"{said} w7" for said in each) for each in answers]
    assert seen == {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}


@pytest.mark.slow
def test_two_processes_measure_every_conversation_once(data, task, tmp_path):
    """LoRA taught by the whole model, merged once; figures are those of the saved model in one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29733"]
    recipe_file = str(RECIPES / "chat.py")
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1"}
    shared = {"capture_output": True, "text": True, "env": environment, "timeout": 400}
    given = asked(data, tmp_path / "two", lora_rank=2, distill_alpha=0.5)
    done = subprocess.run([*command, recipe_file, *given], check=False, **shared)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(tmp_path / "two")
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    for row in rows:
        folder = data / "llama" if row.folder is None else tmp_path / "two" / row.folder
        assert row.measured.samples == 20
        assert row.measured.metrics["loss"] == pytest.approx(reference_loss(folder, list(talks("test", 20))), rel=1e-4)
    given = asked(data, tmp_path / "asked", **task)
    done = subprocess.run([*command, recipe_file, *given], check=False, **shared)
    assert done.returncode != 0 and "harness_tasks are asked by one process, found 2" in done.stderr


def test_it_is_resumed(data, task, tmp_path, monkeypatch):
    settings = {"lora_rank": 2, "retrain_epochs": 2, "save_strategy": "epoch", **task}
    whole = main(asked(data, tmp_path / "whole", **settings))

    class StopError(Exception):
        pass

    def stop(self, args, state, *rest, **more):
        if state.epoch > 1.2:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("experiment.journal.Clock.on_step_begin", stop)
        with pytest.raises(StopError):
            main(asked(data, tmp_path / "stopped", **settings))
    rows = main(asked(data, tmp_path / "stopped", **settings, resume_from_checkpoint=True))
    assert without_times(rows) == without_times(whole)
    texts = [(tmp_path / name / "texts" / "iteration-1.jsonl").read_text("utf-8") for name in ("whole", "stopped")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages_column": "talks"}, "messages_column: there is no column 'talks'"),
        ({"messages_column": "id"}, "no conversation that ends with an answer, but 0"),
        ({"messages_column": None}, "Give messages_column, or prompt_column and completion_column"),
        ({"prompt_column": "id"}, "Give messages_column, or prompt_column and completion_column"),
        ({"metric": "accuracy"}, "gate of this recipe is on the loss"),
        ({"every_answer": True}, "TRL cannot encode the data"),  # the template marks no answers
        ({"chat_template_path": "org/other"}, r"chat_template_path must be a \.jinja file here, found org/other"),
        ({"max_length": 3}, "No token of an answer of the train data is within max_length"),
        # thousands of task files are read
        pytest.param({"harness_tasks": "repeats"}, "the harness has no task 'repeats'", marks=pytest.mark.slow),
        ({"harness_tasks": "repeats", "harness_folder": "nowhere"}, "harness_folder must be a folder"),
        ({"harness_limit": 0, "harness_tasks": "arc_easy"}, "harness_limit must be at least 1"),
        ({"prompts_file": "nowhere.txt"}, "nowhere.txt is no file with a prompt in each line"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_prompts": -1}, "num_prompts must be 0 or more"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(asked(data, tmp_path, **changes))


def test_conversations_without_a_template_are_refused(data, tmp_path):
    ZOO["llama"].model().save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="The tokenizer has no chat template"):
        main(asked(data, tmp_path / "out", model=str(tmp_path / "bare")))
