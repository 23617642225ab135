"""recipes/causal_lm.py, end to end on a tiny Llama."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from deeparc_hf import remove_blocks
from deeparc_hf.errors import ConfigError
from experiment.models import load_model
from tests.publishing import tiny_tokenizer
from tests.zoo import ZOO

from .running import check_files, parameters, recipe, watched, without_times, words, zeros
from .tiny import ROOT, write_task

main = recipe("causal_lm").main
MARKS = {"train": "w100", "validation": "w101", "test": "w102"}
STACK = "model.layers"
SIZE = 12
END = 2


def texts_of(split, count):
    draw = random.Random(split)
    return [
        " ".join([MARKS[split], *(f"w{draw.randrange(20, 60)}" for _ in range(draw.randrange(5, 12)))])
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, and the three splits in files of three kinds; some rows are empty."""
    folder = tmp_path_factory.mktemp("texts")
    ZOO["llama"].model().save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    files = {"train": folder / "train.jsonl", "validation": folder / "validation.csv", "test": folder / "test.txt"}
    rows = [{"text": text} for text in texts_of("train", 70)]
    rows.insert(3, {"text": None})
    files["train"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["validation"].write_text("\n".join(["text", *texts_of("validation", 24)]) + "\n")
    lines = texts_of("test", 24)
    files["test"].write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    return {
        "model": str(folder / "llama"),
        "block_size": SIZE,
        **{f"{split}_file": str(file) for split, file in files.items()},
    }


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Fine-tuning, two iterations with a gate on the loss, healing, a Wanda grid with one entry retrained."""
    folder = tmp_path_factory.mktemp("run")
    pruning = {
        "finetune_epochs": 1,
        "iterations": 2,
        "num_blocks": [3, 2],
        "retrain_epochs": 1,
        "heal": "lstsq",
        "similarity": "cosine",
        "max_drop": 5.0,
        "k_max": 1,
        "sparsity": [0.4],
        "sparsity_retrain": [0.4],
    }
    with watched(tf.LlamaForCausalLM) as seen:
        rows = main(words(**data, output_dir=str(folder), **pruning))
    return SimpleNamespace(rows={row.name: row for row in rows}, folder=folder, seen=seen, data=data)


def blocks_of(split="test"):
    """The blocks of a split, made without the recipe."""
    tokenizer = tiny_tokenizer()
    joined = [token for text in texts_of(split, 24) for token in [*tokenizer(text)["input_ids"], END]]
    return [joined[start : start + SIZE] for start in range(0, len(joined) - SIZE + 1, SIZE)]


def splits_of(passes):
    """The splits whose texts were among the inputs of forward passes."""
    marks = {split: tiny_tokenizer().convert_tokens_to_ids(mark) for split, mark in MARKS.items()}
    return {split for seen in passes for split, mark in marks.items() if bool((seen.inputs == mark).any())}


def losses_of(folder, blocks):
    """Mean loss of each block by a plain forward pass."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for block in blocks:
        ids = torch.tensor([block])
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(float(-scores.gather(1, ids[0, 1:, None]).mean()))
    return found


def test_every_model_has_a_row_and_its_files(run):
    models = ["original", "iteration 1", "iteration 2"]
    assert list(run.rows) == [
        *models,
        *(f"{model}, 40 % zeros{more}" for model in models for more in ("", ", retrained")),
    ]
    check_files(run.folder, list(run.rows.values()))
    assert "A sample is a block of 12 tokens" in (run.folder / "results.md").read_text("utf-8")


def test_rows_tell_structure_and_perplexity(run):
    blocks = blocks_of()
    for row in run.rows.values():
        if row.folder is None:
            continue
        model = tf.AutoModelForCausalLM.from_pretrained(run.folder / row.folder)
        assert row.blocks == {STACK: model.config.num_hidden_layers} and row.parameters == parameters(model)
        losses = losses_of(run.folder / row.folder, blocks)
        mean, half = statistics.fmean(losses), 1.959964 * statistics.stdev(losses) / math.sqrt(len(losses))
        assert row.measured.samples == len(blocks)
        assert row.measured.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert row.measured.metrics["loss"] == pytest.approx(mean, rel=1e-4)
        assert row.measured.intervals["perplexity"] == pytest.approx(
            (math.exp(mean - half), math.exp(mean + half)), rel=1e-4
        )
        assert row.measured.seconds > 0
    assert [sum(run.rows[name].blocks.values()) for name in ("original", "iteration 1", "iteration 2")] == [4, 3, 2]
    retrained = run.rows["iteration 2, 40 % zeros, retrained"]
    model = tf.AutoModelForCausalLM.from_pretrained(run.folder / retrained.folder)
    assert zeros(model, STACK) == pytest.approx(retrained.sparsity) == pytest.approx(0.4, abs=0.03)


def test_calibration_and_training_see_training_blocks_only(run):
    calibration = [seen for seen in run.seen if not seen.labelled]
    training = [seen for seen in run.seen if seen.training]
    assert splits_of(calibration) == splits_of(training) == {"train"} and splits_of(run.seen) == set(MARKS)


@pytest.mark.parametrize("similarity", ["cka", "cosine"])
def test_removal_alone_trains_nothing(data, tmp_path, similarity):
    """Nothing is trained before or after: blocks are removed and healed, in iterations; the untouched blocks are those
    of the model.
    """
    pruning = {
        "finetune_epochs": 0,
        "retrain_epochs": 0,
        "iterations": 2,
        "num_blocks": [3, 2],
        "sparsity": 0.5,
        "similarity": similarity,
    }
    with watched(tf.LlamaForCausalLM) as seen:
        rows = main(words(**data, output_dir=str(tmp_path), **pruning))
    assert not any(entry.training for entry in seen)
    assert splits_of(entry for entry in seen if not entry.labelled) == {"train"}
    assert [sum(row.blocks.values()) for row in rows] == [4, 3, 2, 4, 3, 2]
    assert rows[0].folder is None and rows[0].training_seconds is None and rows[1].training_seconds is None
    check_files(tmp_path, rows, retrained=False)
    before, after = (
        load_model(tf.AutoModelForCausalLM, data["model"]),
        load_model(tf.AutoModelForCausalLM, str(tmp_path / "iteration-2")),
    )
    kept = after.config.pruning_config["stacks"][STACK]["kept"]
    for block, original in zip(after.model.layers, kept, strict=True):
        assert torch.equal(block.mlp.up_proj.weight, before.model.layers[original].mlp.up_proj.weight)
    for row, folder in ((rows[0], data["model"]), (rows[2], tmp_path / "iteration-2")):
        assert row.measured.metrics["loss"] == pytest.approx(statistics.fmean(losses_of(folder, blocks_of())), rel=1e-4)


def test_healing_alone_changes_the_kept_neighbour_and_is_reported(data, tmp_path):
    pruning = {"finetune_epochs": 0, "retrain_epochs": 0, "num_blocks": 3}
    (_, plain), (_, healed) = (
        main(words(**data, output_dir=str(tmp_path / str(heal)), heal=heal, **pruning)) for heal in (None, "lstsq")
    )
    assert plain.measured.metrics != healed.measured.metrics
    report = json.loads((tmp_path / "lstsq" / healed.folder / "report.json").read_text("utf-8"))
    assert [entry["healed"] for entry in report["healing"]] == [True] and len(report["measurements"]) == 2


def test_models_are_asked_prompts_and_tasks(data, tmp_path):
    """First halves of the test blocks, gone on from by each model; a task of the harness from a local file."""
    pytest.importorskip("lm_eval")
    rows = [{"text": f"w{number}", "choices": ["w30", "w31"], "answer": number % 2} for number in range(20, 28)]
    asked = {"num_prompts": 2, "max_new_tokens": 3, **write_task(tmp_path, "odd_or_even", rows, "{{text}}")}
    settings = {**asked, "harness_limit": 6, "output_dir": str(tmp_path / "out")}
    found = main(words(**data, **settings, finetune_epochs=0, num_blocks=3, retrain_epochs=0))
    for row in found:
        assert 0 <= row.measured.metrics["odd_or_even acc"] <= 1 and row.measured.data["odd_or_even acc"]["rows"] == 6
    block = blocks_of()[0]
    line = json.loads((tmp_path / "out" / "texts" / "iteration-1.jsonl").read_text("utf-8").splitlines()[0])
    tokenizer = tiny_tokenizer()
    halves = [tokenizer.decode(part, skip_special_tokens=True) for part in (block[: SIZE // 2], block[SIZE // 2 :])]
    assert [line["prompt"], line["reference"]] == halves
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "iteration-1").eval()
    ids = tokenizer(halves[0], return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert line["generated"] == tokenizer.decode(made, skip_special_tokens=True).strip()
    assert "## Answers" in (tmp_path / "out" / "results.md").read_text("utf-8")
    card = (tmp_path / "out" / "iteration-1" / "README.md").read_text("utf-8")
    assert "odd_or_even acc" in card and "datasets/json" not in card  # a reader of files, and no data set of the Hub


def test_a_script_tells_the_ratio_of_two_perplexities(data, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("perplexity_ratio", ROOT / "model_cards" / "perplexity_ratio.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    smaller = ZOO["llama"].model()
    remove_blocks(smaller, {STACK: [1, 2]})
    smaller.save_pretrained(tmp_path / "smaller")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts_of("test", 24)))
    given = ["script", data["model"], str(tmp_path / "smaller"), "--test_file", str(tmp_path / "test.jsonl")]
    monkeypatch.setattr(sys, "argv", [*given, "--block_size", str(SIZE)])
    script.main()
    before, after = (losses_of(folder, blocks_of()) for folder in (data["model"], tmp_path / "smaller"))
    changes = [new - old for new, old in zip(after, before, strict=True)]
    error = statistics.stdev(changes) / len(changes) ** 0.5
    wanted = [statistics.fmean(before), statistics.fmean(after), statistics.fmean(changes)]
    wanted += [wanted[2] - 1.96 * error, wanted[2] + 1.96 * error]
    found = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert found == pytest.approx([math.exp(value) for value in wanted], rel=1e-3)


def test_end_tokens_that_texts_are_padded_with_too_are_no_padding(data, tmp_path):
    """As of SmolLM2: blocks that end with a text look padded, and a warning would be an error here."""
    model = tf.AutoModelForCausalLM.from_pretrained(data["model"])
    model.config.pad_token_id = model.generation_config.pad_token_id = END
    model.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    assert any(block[-1] == END for block in blocks_of("train"))
    main(
        words(
            **{**data, "model": str(tmp_path / "padded")},
            output_dir=str(tmp_path / "out"),
            finetune_epochs=0,
            retrain_epochs=0,
            num_blocks=3,
        )
    )


def test_the_same_seed_gives_the_same_table(data, tmp_path):
    pruning = {"finetune_epochs": 0, "num_blocks": 3, "retrain_epochs": 1, "max_train_samples": 40}
    tables = [without_times(main(words(**data, output_dir=str(tmp_path / name), **pruning))) for name in "ab"]
    assert tables[0] == tables[1] and len(tables[0]) == 2


def test_a_threshold_that_nothing_reaches_ends_the_table(data, tmp_path):
    rows = main(words(**data, output_dir=str(tmp_path), finetune_epochs=0, retrain_epochs=0, threshold=1.0))
    assert [row.name for row in rows] == ["original"]
    assert "iteration 1: nothing could be removed; the table ends before it." in (tmp_path / "results.md").read_text(
        "utf-8"
    )
    assert not (tmp_path / "original").exists() and not (tmp_path / "iteration-1").exists()


def test_a_gguf_model_is_copied_into_one_that_can_be_saved(monkeypatch, tmp_path):
    """What a GGUF file gives stands for it here: a model that refuses to be saved."""
    source = ZOO["llama"].model()
    source.save_pretrained(tmp_path / "source")
    asked = {}

    class Auto:
        from_config = tf.AutoModelForCausalLM.from_config

        @staticmethod
        def from_pretrained(name, **settings):
            asked.update(settings)
            source.save_pretrained = None
            return source

    model = load_model(Auto, str(tmp_path), gguf_file="model.gguf")
    assert asked == {"revision": None, "gguf_file": "model.gguf", "dtype": torch.float32}
    model.save_pretrained(tmp_path / "copy")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    batch = ZOO["llama"].batches()[0]
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, source.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "txt"}, "text_column: there is no column 'txt'.*Did you mean 'text'"),
        ({"train_file": None}, "There is no data"),
        ({"block_size": 4000}, "The train data has fewer than 4000 tokens"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"metric": "perplexity"}, "gate of this recipe is on the loss"),
        ({"retrain_epochs": 0, "freeze": "partial"}, "freeze is about the retraining"),
        ({"retrain_epochs": -1}, "must be 0 or more, found -1"),
        ({"retrain_epochs": 0, "sparsity": 0.5, "sparsity_retrain": 0.5}, "sparsity_retrain is about the retraining"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(words(**{**data, **changes}, output_dir=str(tmp_path)))


def test_an_empty_file_is_refused(data, tmp_path):
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(ConfigError, match=r"empty\.csv cannot be read, or has no rows"):
        main(words(**{**data, "test_file": str(tmp_path / "empty.csv")}, output_dir=str(tmp_path)))


def test_blocks_that_the_model_cannot_take_are_refused(data, tmp_path):
    config = tf.AutoConfig.from_pretrained(data["model"])
    config.max_position_embeddings = 8
    config.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match="block_size is 12, and the model takes 8 tokens at most"):
        main(words(**{**data, "model": str(tmp_path / "short")}, output_dir=str(tmp_path)))


def test_an_unknown_key_of_a_config_file_is_refused(data, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("block_sise: 12\n")
    with pytest.raises(ConfigError, match=r"'block_sise'\. Did you mean 'block_size'"):
        main(["--config", str(file), *words(**data, output_dir=str(tmp_path))])


def test_a_model_without_weights_is_not_measured_as_it_is(data, tmp_path):
    tf.AutoConfig.from_pretrained(data["model"]).save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="There are no weights in"):
        main(
            words(
                **{**data, "model": str(tmp_path / "bare"), "finetune_epochs": 0, "num_blocks": 3},
                output_dir=str(tmp_path / "out"),
            )
        )
