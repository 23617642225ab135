"""The question-generation recipe on a tiny T5 from scratch, in one process and in two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from deeparc_hf import PrunedConfig
from deeparc_hf.errors import ConfigError
from experiment.generation import TextScores, first_answers
from experiment.results import read_rows
from tests.publishing import tiny_tokenizer
from tests.zoo import ZOO

from .running import recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model folder without weights, and a few dozen passages with questions."""
    folder = tmp_path_factory.mktemp("qg")
    model = ZOO["t5"].model()
    model.config.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {
            "context": f"w{i % 40} w{i % 7} w{(3 * i) % 50}",
            "question": f"w{i % 40} w{i % 7}",
            "answers": {"text": [f"w{i % 7}"], "answer_start": [0]},
        }
        for i in range(96)
    ]
    for name, part in {"train": rows[:64], "validation": rows[64:76], "test": rows[76:89]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return folder


def words(place, output):
    files = [
        word for name in ("train", "validation", "test") for word in (f"--{name}_file", str(place / f"{name}.jsonl"))
    ]
    settings = [
        "--iterations",
        "2",
        "--num_blocks",
        "6",
        "5",
        "--retrain_epochs",
        "1",
        "--heal",
        "lstsq",
        "--calibration_samples",
        "64",
    ]
    shape = ["--max_source_length", "24", "--max_target_length", "6", "--num_beams", "2", "--repeats", "1"]
    training = [
        "--per_device_train_batch_size",
        "8",
        "--per_device_eval_batch_size",
        "4",
        "--save_strategy",
        "no",
        "--use_cpu",
        "--seed",
        "3",
    ]
    return [
        "--model",
        str(place / "model"),
        *files,
        *settings,
        *shape,
        *training,
        "--learning_rate",
        "0.01",
        "--output_dir",
        str(output),
    ]


@pytest.fixture(scope="module")
def alone(place):
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        import t5_qg

        return t5_qg.main(words(place, place / "alone")), place / "alone"
    finally:
        sys.path.remove(str(ROOT / "recipes"))


def test_the_table_tells_of_each_model(alone):
    rows, folder = alone
    assert [row.name for row in rows] == ["original", "iteration 1", "iteration 2"]
    assert [sum(row.blocks.values()) for row in rows] == [7, 6, 5]
    assert read_rows(folder)[-1] == rows[-1]
    text = (folder / "scores.md").read_text()
    for line in (
        "Num of encoder",
        "Num of decoder",
        "Num of parameter",
        "BLEU",
        "Precision 4-gram",
        "ROUGE-Lsum F1",
        "METEOR",
    ):
        assert f"| {line} |" in text
    assert "13 test questions" in text


def test_the_scores_are_those_of_the_saved_model(alone, place):
    rows, folder = alone
    last = folder / rows[-1].folder
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(last).eval(), AutoTokenizer.from_pretrained(last)
    tests = [json.loads(line) for line in (place / "test.jsonl").read_text().splitlines()]
    found = []
    for row in tests:  # one at a time: no padding
        source = f"generate question: answer: {row['answers']['text'][0]} context: {row['context']}"
        inputs = tokenizer(source, return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            ids = model.generate(
                **{k: inputs[k] for k in ("input_ids", "attention_mask")},
                num_beams=2,
                max_new_tokens=6,
                do_sample=False,
            )
        found.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    scores = TextScores(found, [row["question"] for row in tests]).values()
    measured = rows[-1].measured
    assert measured.samples == 13
    assert measured.metrics["bleu"] == pytest.approx(scores["bleu"]) and measured.metrics["rougeL"] == pytest.approx(
        scores["rougeL"]
    )
    assert PrunedConfig.from_pretrained(last).kept.keys() == {"encoder.block", "decoder.block"}


@pytest.mark.filterwarnings("ignore:.*can no longer generate with a cache")
def test_more_decoder_than_encoder_blocks_can_be_measured(place):
    """Stock transformers cannot generate with a cache there."""
    rows = recipe("t5_qg").main(
        [*words(place, place / "uneven"), "--iterations", "1", "--num_blocks", "encoder.block=2", "decoder.block=3"]
    )
    assert rows[-1].blocks == {"encoder.block": 2, "decoder.block": 3} and 0 <= rows[-1].measured.metrics["bleu"] <= 1


def test_the_generated_texts_lie_beside_the_scores(alone, place):
    """So that a score can be added later."""
    rows, folder = alone
    wanted = [json.loads(line)["question"] for line in (place / "test.jsonl").read_text().splitlines()]
    for row in rows:
        pairs = [json.loads(line) for line in (folder / "texts" / f"{row.folder}.jsonl").read_text().splitlines()]
        assert [pair["reference"] for pair in pairs] == wanted
        scores = TextScores([pair["generated"] for pair in pairs], wanted).values()
        assert scores["rouge1"] == pytest.approx(row.measured.metrics["rouge1"])
    assert "generated" not in (folder / "results.json").read_text()


def test_the_gate_judges_by_a_score_of_generated_questions(place, caplog):
    rows = recipe("t5_qg").main(
        [
            *words(place, place / "gate"),
            "--iterations",
            "1",
            "--num_blocks",
            "6",
            "--metric",
            "rougeL",
            "--max_drop",
            "1",
        ]
    )
    report = json.loads((place / "gate" / "iteration-1" / "pruning_report.json").read_text())
    assert rows[-1].verdict == "accepted" and report["metric"] == "rougeL"
    held = [json.loads(line)["question"] for line in (place / "validation.jsonl").read_text().splitlines()]
    assert len(held) == 12
    assert not any("bleu" in name for entry in report["final"] for name in entry["metrics"])  # the loss alone
    last = report["attempts"][-1]["evaluations"][-1]["metrics"]
    assert rows[-1].validation[-1] == pytest.approx(last["eval_rougeL"]) and 0 <= last["eval_bleu"] <= 1
    assert "METEOR will be left out" in caplog.text and "nltk.downloader" in caplog.text  # before the run, not after it


@pytest.mark.slow
def test_two_processes_give_every_question_once_and_in_order(place):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29731",
        str(ROOT / "recipes" / "t5_qg.py"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *words(place, place / "two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = read_rows(place / "two")
    assert [sum(row.blocks.values()) for row in rows] == [7, 6, 5] and all(row.measured.samples == 13 for row in rows)
    last = place / "two" / rows[-1].folder
    assert (last / "README.md").is_file()
    # the same model in one process; the last batch of several repeats rows, which the loss counts
    (again,) = recipe("t5_qg").main(
        [*words(place, place / "again"), "--model", str(last), "--finetune_epochs", "0", "--iterations", "0"]
    )
    assert again.measured.metrics["loss"] == pytest.approx(rows[-1].measured.metrics["loss"], rel=0.1)
    for score in ("bleu", "rouge1", "length_ratio"):
        assert again.measured.metrics[score] == pytest.approx(rows[-1].measured.metrics[score], abs=1e-6)
    grouped = [*words(place, place / "grouped"), "--model", str(last), "--finetune_epochs", "0", "--iterations", "0"]
    (row,) = recipe("t5_qg").main([*grouped, "--train_sampling_strategy", "group_by_length"])
    assert row.measured.metrics["rouge1"] == pytest.approx(again.measured.metrics["rouge1"])


@pytest.mark.slow
def test_accelerate_launches_it_without_arguments_in_two_processes(place, tmp_path):
    """From a copy of the recipes in which the config of the seed's table asks for tiny things."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    given = words(place, tmp_path / "runs")
    config: dict[str, object] = {}
    for word in given:
        if word.startswith("--"):
            config[name := word[2:]] = True
        else:
            config[name] = (
                word
                if config[name] is True
                else [*([config[name]] if isinstance(config[name], str) else config[name]), word]
            )
    (tmp_path / "recipes" / "configs" / "t5_base_squad.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "recipes" / "accelerate_configs" / "two_cpu_processes.yaml"),
        "--main_process_port",
        "29741",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "recipes/t5_qg.py"], capture_output=True, text=True, env=environment, timeout=400, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No --config and no --model" in done.stderr
    rows = read_rows(tmp_path / "runs")
    assert [sum(row.blocks.values()) for row in rows] == [7, 6, 5] and all(row.measured.samples == 13 for row in rows)
    assert (
        json.loads((tmp_path / "runs" / "iteration-2" / "pruning_report.json").read_text())["training"]["processes"]
        == 2
    )
    assert (tmp_path / "runs" / "scores.md").is_file()


def test_a_model_without_weights_is_not_measured_as_it_is(place, tmp_path):
    with pytest.raises(ConfigError, match="There are no weights in"):
        recipe("t5_qg").main([*words(place, tmp_path / "out"), "--finetune_epochs", "0"])


@pytest.mark.parametrize("answer", [None, {"text": [], "answer_start": []}, "", 1987, [3]])
def test_a_row_without_an_answer_is_refused(answer):
    with pytest.raises(ConfigError, match=r"answer_column: a row of the column 'answers' holds .*, no answer"):
        first_answers(["w1", answer], "answers")


def test_answers_of_every_kind():
    assert first_answers(["a", {"text": ["b", "c"], "answer_start": [0, 1]}, ["d"]], "answers") == ["a", "b", "d"]


def test_a_metric_that_no_evaluation_gives_is_refused_before_any_work(place):
    with pytest.raises(ConfigError, match=r"metric='blue' is not among .*Did you mean 'bleu'"):
        recipe("t5_qg").main([*words(place, place / "typo"), "--metric", "blue", "--max_drop", "0.1"])
    assert not (place / "typo").exists()


def test_adapters_are_merged(place):
    output = place / "adapters"
    given = [*words(place, output), "--iterations", "1", "--num_blocks", "6", "--lora_rank", "2"]
    rows = recipe("t5_qg").main([*given, "--distill_alpha", "0.5"])
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    before, after = (
        AutoModelForSeq2SeqLM.from_pretrained(output / name).state_dict()
        for name in ("iteration-1-removed", "iteration-1")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".block." in name and before[name].ndim == 2 for name in moved)
