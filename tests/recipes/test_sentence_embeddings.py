"""recipes/sentence_embeddings.py, end to end on a tiny encoder; its figures against those of the evaluators."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

pytest.importorskip("sentence_transformers")

import sentence_transformers as st
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from deeparc_hf import PrunedConfig
from deeparc_hf.errors import ConfigError
from experiment import embeddings
from experiment.results import read_rows
from experiment.splits import Splits
from tests.sentence_encoders import STACK, encoder, transformer

from .running import RECIPES, check_files, recipe, without_times, words
from .tiny import ROOT

main = recipe("sentence_embeddings").main
NDCG = "cosine_ndcg@10"


def write(file, split, count):
    """Pairs of texts that share a word; each positive belongs to two anchors."""
    draw = random.Random(split)
    with file.open("w") as stream:
        for number in range(count):
            other = [f"w{draw.randrange(60, 90)}" for _ in range(3)]
            row = {
                "anchor": " ".join([f"w{number % 50}", *other]),
                "positive": f"w{number // 2} w{number // 2 + 1} {split[0]}",
                "score": number / count,
            }
            stream.write(json.dumps(row) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of the three splits, and a tiny encoder."""
    folder = tmp_path_factory.mktemp("pairs")
    encoder(folder / "bert").save_pretrained(str(folder / "encoder"))
    sizes = {"train": 64, "validation": 16, "test": 24}
    files = {f"{split}_file": write(folder / f"{split}.jsonl", split, count) for split, count in sizes.items()}
    return {"model": str(folder / "encoder"), "max_length": 10, **files}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Two iterations, healed, the retrainings taught, with zeros."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "finetune_epochs": 1,
        "iterations": 2,
        "num_blocks": [3, 2],
        "retrain_epochs": 1,
        "heal": "lstsq",
        "metric": NDCG,
        "distill_embeddings": True,
        "sparsity": [0.25],
        "sparsity_original": False,
        "calibration_samples": 32,
    }
    rows = main(words(**data, output_dir=str(folder), **settings))
    return SimpleNamespace(rows={row.name: row for row in rows}, folder=folder, settings=settings)


def test_every_model_is_measured_as_the_evaluator_measures_it(run, data):
    assert list(run.rows) == [
        *("original", "iteration 1", "iteration 2"),
        *("iteration 1, 25 % zeros", "iteration 2, 25 % zeros"),
    ]
    check_files(run.folder, list(run.rows.values()))
    test = datasets.load_dataset("json", data_files=data["test_file"], split="train")
    for name in ("original", "iteration 2"):
        row = run.rows[name]
        model = st.SentenceTransformer(str(run.folder / row.folder), device="cpu")
        assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
        assert row.blocks == {STACK: model[0].auto_model.config.num_hidden_layers}
        queries = {anchor: anchor for anchor in test["anchor"]}
        wanted = {}
        for anchor, positive in zip(test["anchor"], test["positive"], strict=True):
            wanted.setdefault(anchor, set()).add(positive)
        own = InformationRetrievalEvaluator(queries, {p: p for p in test["positive"]}, wanted)(model)
        assert row.measured.metrics == pytest.approx({key: own[key] for key in row.measured.metrics})
        assert row.measured.samples == len(queries) and NDCG in row.measured.metrics
        for key, value in row.measured.metrics.items():
            low, high = row.measured.intervals[key]
            assert low <= value <= high


def test_the_card_of_the_last_one_is_both_and_tells_the_test_data(run):
    card = ModelCard.load(run.folder / "iteration-2" / "README.md")
    assert card.data.library_name == "sentence-transformers" and {"pruned", "dense"} <= set(card.data.tags)
    told = {(r.metric_name, r.dataset_split): r.metric_value for r in card.data.eval_results}
    assert told[NDCG, "test"] == pytest.approx(run.rows["iteration 2"].measured.metrics[NDCG])
    # sentence-transformers' part tells of the validation data, as its own card does
    validation = run.rows["iteration 2"].validation[-1]
    assert f"| **{NDCG}**" in str(card) and f"{round(validation, 4)}" in str(card)


def test_a_retraining_learns_the_embeddings_of_the_original(run, data):
    """Nearer to the teacher's than right after the removal; the retraining on pairs does not go there."""
    card = str(ModelCard.load(run.folder / "iteration-2" / "README.md"))
    assert "loss:MSELoss" in card and "loss:MultipleNegativesRankingLoss" not in card
    original = st.SentenceTransformer(str(run.folder / "original"), device="cpu")
    rows = datasets.load_dataset("json", data_files=data["train_file"], split="train")
    lesson = embeddings.with_embeddings(rows.select_columns(["anchor", "positive"]), original)
    assert sorted(lesson["sentence"]) == sorted({*rows["anchor"], *rows["positive"]})
    expected = original.encode(lesson["sentence"])
    np.testing.assert_allclose(np.array(lesson["label"]), expected, atol=1e-6)


def test_what_is_done_is_not_done_again(run, data, capsys):
    given = words(**data, output_dir=str(run.folder), **run.settings)
    with pytest.raises(ConfigError, match="To go on with it"):
        main(given)
    again = main([*given, "--resume_from_checkpoint", "true"])
    assert without_times(again) == without_times(list(run.rows.values()))
    capsys.readouterr()


def start(data, folder, *more):
    """The recipe in a process of its own, with three epochs of each training."""
    settings = {"finetune_epochs": 3, "retrain_epochs": 3, "num_blocks": 3, "metric": NDCG, "save_strategy": "epoch"}
    settings |= {"distill_embeddings": True, "save_total_limit": 1}
    command = [sys.executable, str(RECIPES / "sentence_embeddings.py")]
    command += [*words(**data, output_dir=str(folder), **settings), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    running = start(data, folder)
    said = running.communicate(timeout=400)[0]
    assert running.returncode == 0, said
    return without_times(read_rows(folder))


@pytest.mark.slow
@pytest.mark.parametrize("training", ["original", "iteration-1"])
def test_killed_in_a_training_it_goes_on_to_the_same_end(training, data, undisturbed, tmp_path):
    """Batches without duplicates are drawn as they were, and what the teacher teaches is the same."""
    killed, end = start(data, tmp_path / "out"), time.monotonic() + 300
    while not list((tmp_path / "out" / training).glob("checkpoint-*/clock.json")):
        assert killed.poll() is None and time.monotonic() < end, killed.communicate()[0]
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start(data, tmp_path / "out", "--resume_from_checkpoint", "true")
    said = again.communicate(timeout=400)[0]
    assert again.returncode == 0, said
    assert f"{training}: goes on from checkpoint-" in said
    assert without_times(read_rows(tmp_path / "out")) == undisturbed


def test_pairs_with_scores_and_a_model_without_modules(data, tmp_path):
    bare = transformer(tmp_path / "bert")
    settings = {**data, "model": bare, "normalize": True, "finetune_epochs": 1, "retrain_epochs": 1, "num_blocks": 3}
    rows = main(words(**settings, score_column="score", metric="spearman_cosine", output_dir=str(tmp_path / "out")))
    assert [row.name for row in rows] == ["original", "iteration 1"]
    model = st.SentenceTransformer(str(tmp_path / "out" / "iteration-1"), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    test = datasets.load_dataset("json", data_files=data["test_file"], split="train")
    own = embeddings.similarity_evaluator(test)(model)
    assert dict(rows[-1].measured.metrics) == pytest.approx({key: own[key] for key in rows[-1].measured.metrics})
    assert all(low <= own[key] <= high for key, (low, high) in rows[-1].measured.intervals.items())
    assert PrunedConfig.from_pretrained(tmp_path / "out" / "iteration-1").kept[STACK] != (0, 1, 2, 3)


def test_per_query_figures_are_those_of_a_ranking():
    """By hand: of the wanted d1 and d9 the first is found at rank 2."""
    found = embeddings.per_query([f"d{number}" for number in range(9)], {"d1", "d9"})
    ideal = 1 + 1 / np.log2(3)
    expected = {"ndcg@10": (1 / np.log2(3)) / ideal, "mrr@10": 0.5, "accuracy@1": 0.0, "accuracy@5": 1.0}
    assert found == pytest.approx({**expected, "recall@10": 0.5})


def test_bootstrap_intervals_cover_as_those_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(size=400)
    ((low, high),) = embeddings.bootstrap_interval(400, lambda rows: np.array([values[rows].mean()]))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert embeddings.bootstrap_interval(400, lambda rows: np.array([values[rows].mean()])) == [(low, high)]


def test_no_batch_holds_a_text_twice(data, tmp_path):
    """Two anchors share each positive here, which would be its own wrong answer."""
    rows = datasets.load_dataset("json", data_files=data["train_file"], split="train")
    pairs = rows.select_columns(["anchor", "positive"])

    def load(name):
        return st.SentenceTransformer(name, device="cpu")

    for distinct in (True, False):
        trainers = embeddings.Trainers(Splits(pairs, pairs, pairs), load, False, 8, distinct=distinct)
        args = st.SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=16)
        trainer = trainers(load(data["model"]), args, [])
        batches = [batch["positive_input_ids"] for batch in trainer.get_train_dataloader()]
        assert all(len(torch.unique(ids, dim=0)) == len(ids) for ids in batches) == distinct


REFUSED = {
    "taught outputs": ({"distill_alpha": 0.5}, "Give distill_embeddings"),
    "test data in the training": ({"test_each_epoch": True}, "test_each_epoch"),
    "taught, but not retrained": ({"distill_embeddings": True, "retrain_epochs": 0}, "retrain_epochs is 0"),
    "two losses compared": ({"distill_embeddings": True, "max_drop": 0.1}, "Give a metric"),
    "a metric of another evaluator": ({"metric": "ndcg"}, "metric='ndcg' is not among"),
    "a column that is not there": ({"positive_column": "answer"}, "no column 'answer'"),
    "one column twice": ({"positive_column": "anchor"}, "must be different ones"),
    "scores that are texts": (
        {"score_column": "anchor", "anchor_column": "positive", "positive_column": "anchor"},
        "diff",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_settings_that_make_no_sense_are_refused_before_any_work(what, data, tmp_path):
    settings, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        main(words(**data, num_blocks=3, output_dir=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out" / "original").exists()


def test_scores_must_be_numbers(data, tmp_path):
    with pytest.raises(ConfigError, match="holds string, no numbers"):
        rows = datasets.load_dataset("json", data_files=data["train_file"], split="train")
        rows = rows.rename_column("score", "number").add_column("score", ["high"] * len(rows))
        embeddings.text_pairs(Splits(rows, rows, rows), "anchor", "positive", None, "score")
