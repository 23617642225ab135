"""A chain of trainings in one process each: one report, and the decisions of a single training."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from deeparc_hf import MPruneCallback, PrunedConfig, remove_blocks
from deeparc_hf.chain.chain import Chain
from deeparc_hf.chain.settings import ChainSettings
from deeparc_hf.checkpoint.weights_mark import mark_of_files
from deeparc_hf.errors import ConfigError, LaunchError
from deeparc_hf.pruning.plan import PruningPlan
from tests.stock import StockProcess
from tests.trainers import text_data, train

from .chains import ROOT, STACK, report, run_chain, write_chain

# of one cluster k=1 leaves one block, which is taken back; k=2 leaves three
GATED = {
    "threshold": 0.5,
    "max_drop": 0.1,
    "metric": "accuracy",
    "start_epoch": 1,
    "retrain_epochs": 1,
    "heal": "lstsq",
    "freeze": "partial",
    "calibration_samples": 64,
}
ACCURACY = {"6": 0.9, "1": 0.5, "3": 0.85}


@pytest.mark.filterwarnings("ignore:The threshold 0.5 takes")
def test_a_chain_decides_as_a_single_training_and_ends_with_a_plain_checkpoint(tmp_path):
    folder = tmp_path / "gated"
    more = ["--epochs", 3, "--accuracy", json.dumps(ACCURACY), "--arguments", '{"lr_scheduler_type": "constant"}']
    file = write_chain(folder, *more, callback=GATED)
    done = run_chain(file)
    assert "Taking 5 blocks out" in done.stderr and "Taking 3 blocks out" in done.stderr
    assert str(folder / "out" / "model") in done.stdout
    check_that_what_is_taken_back_is_tried_again_with_less(folder)
    check_that_decisions_are_those_of_a_single_training(folder, tmp_path / "single")
    check_that_the_result_is_a_plain_checkpoint_with_its_record_and_card(folder)
    check_that_nothing_is_left_that_no_link_needs(folder, file)
    check_that_a_chain_goes_on_with_its_own_settings_only(folder)


def check_that_what_is_taken_back_is_tried_again_with_less(folder):
    found = report(folder)
    assert [attempt.get("decision") for attempt in found["attempts"]] == [None, "rolled back", "accepted"]
    assert [attempt["blocks"] for attempt in found["attempts"]] == [{STACK: 6}, {STACK: 1}, {STACK: 3}]
    assert [attempt["step"] for attempt in found["attempts"]] == [0, 8, 16]  # of the one training
    assert len(found["attempts"][2]["healing"]) == 3
    stages = [list(attempt["stages"]) for attempt in found["attempts"][1:]]
    assert stages == [["before", "healed", "retrained"]] * 2
    assert found["end"]["accepted"] == 1 and found["end"]["metrics"]["accuracy"] == {"before": 0.9, "after": 0.85}
    kinds = [json.loads((path / "link.json").read_text())["kind"] for path in sorted((folder / "out/links").iterdir())]
    assert kinds == ["train", "train", "heal", "train", "end"]


def check_that_decisions_are_those_of_a_single_training(folder, other):
    model = AutoModelForSequenceClassification.from_pretrained(folder / "begin")
    callback = MPruneCallback(**GATED)
    settings = {"learning_rate": 1e-2, "optim": "sgd", "lr_scheduler_type": "constant", "seed": 42}
    more = {"per_device_train_batch_size": 16, "num_train_epochs": 3, "eval_strategy": "epoch"}
    accuracy = {int(count): value for count, value in ACCURACY.items()}

    def compute(prediction):
        return {"accuracy": accuracy[model.config.num_hidden_layers]}

    train(model, other, callback, data=text_data(rows=128), compute_metrics=compute, **settings, **more)
    chained = report(folder)["attempts"]
    single = callback.attempts
    for name in ("plan_removed", "removed", "frozen", "thresholds", "k", "step", "epoch", "decision"):
        assert [a.get(name) for a in chained] == [a.get(name) for a in single], name
    told = json.loads((folder / "out/links/001/told.json").read_text())
    first = PruningPlan.from_dict(told["plan"])
    assert first.removed == {STACK: tuple(single[1]["plan_removed"][STACK])}
    assert chained[1].keys() == single[1].keys()
    own = json.loads((other / "pruning_report.json").read_text())
    assert report(folder).keys() == own.keys()


def check_that_the_result_is_a_plain_checkpoint_with_its_record_and_card(folder):
    place = folder / "out" / "model"
    model, info = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 3
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with StockProcess() as stock:  # which does not have this package
        loaded = stock.load(place, "AutoModelForSequenceClassification", batch)
    with torch.no_grad():
        assert loaded.clean and torch.equal(loaded.outputs["output"], model.eval()(**batch).logits)
    record = PrunedConfig.from_pretrained(place)
    (entry,) = record.iterations
    assert record.kept == {STACK: (0, 2, 4)} and entry["healing"] and entry["metrics"]["eval_accuracy"] == 0.85
    found = report(folder)
    assert found["weights"] == entry["weights"] == mark_of_files(place)
    assert found["attempts"][2]["evaluations"][-1]["weights"] == found["weights"]
    after = json.loads((folder / "after.json").read_text())  # what the script did after its training
    assert after["blocks"] == 3 and found["final"][0]["metrics"]["test_loss"] == after["test_loss"]
    card = (place / "README.md").read_text()
    assert "# out" in card and "3 of its 6 blocks" in card and "rolled back" in card


def check_that_nothing_is_left_that_no_link_needs(folder, file):
    left = {path.name for path in (folder / "out").rglob("*") if path.is_dir()}
    assert not left & {"start", "scratch"} and not any(name.startswith("checkpoint-") for name in left)
    assert [path.parent.name for path in (folder / "out").rglob("model.safetensors")] == ["model"]
    said = []
    assert Chain(ChainSettings.from_yaml(file), said.append).run() == folder / "out" / "model"
    assert len(said) == 1 and "is complete" in said[0]


def check_that_a_chain_goes_on_with_its_own_settings_only(folder):
    other = folder / "other.yaml"
    other.write_text((folder / "chain.yaml").read_text().replace("'16'", "'8'"))
    with pytest.raises(ConfigError, match=r"other settings \(arguments\)"):
        Chain(ChainSettings.from_yaml(other), print).run()


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1])
def test_where_nothing_can_go_it_trains_to_the_end(tmp_path, start):
    callback = {"threshold": 1.0, "start_epoch": start, "retrain_epochs": 1, "calibration_samples": 64}
    file = write_chain(tmp_path, callback=callback)
    done = run_chain(file)
    assert "Nothing is removed" in done.stdout and "Traceback" not in done.stderr
    kinds = [path.name for path in sorted((tmp_path / "out/links").iterdir())]
    assert len(kinds) == 2 + start  # with an epoch before: that, the rest, the end
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert model.config.num_hidden_layers == 6


@pytest.mark.slow
def test_prunings_at_once_and_again(tmp_path):
    callback = {"num_blocks": [5, 3], "retrain_epochs": 1, "calibration_samples": 64}
    done = run_chain(write_chain(tmp_path, callback=callback))
    found = report(tmp_path)
    assert [list(attempt["blocks"].values()) for attempt in found["attempts"]] == [[6], [5], [3]]
    assert [attempt["epoch"] for attempt in found["attempts"]] == [0.0, 0.0, 1.0]
    assert "as drawn at random" not in done.stderr or "start_epoch" in done.stderr


@pytest.mark.slow
def test_what_belongs_to_a_model_and_its_training_goes_from_link_to_link(tmp_path):
    """Tokenizers, earlier records, schedules in steps; where the last link makes no step."""
    callback = {"num_blocks": 4, "start_epoch": 1, "retrain_epochs": 1, "calibration_samples": 64}
    schedule = {"lr_scheduler_type": "polynomial", "warmup_steps": 12}
    more = ["--epochs", 2, "--arguments", json.dumps(schedule)]
    file = write_chain(tmp_path, *more, callback=callback, max_shard_size="20KB")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "begin")
    remove_blocks(model, {STACK: [1]})
    stored = model.config.pruning_config
    stored["iterations"][-1] |= {"metrics": {"eval_loss": 9.0}, "weights": "0" * 32}
    model.save_pretrained(tmp_path / "begin")
    (tmp_path / "begin" / "vocab.txt").write_text("[PAD]\n[UNK]\nw\n")
    done = run_chain(file)
    assert "warm-up of 12 steps is shortened to 4 of" in done.stdout
    place = tmp_path / "out" / "model"
    assert (place / "vocab.txt").read_text() == "[PAD]\n[UNK]\nw\n"
    assert len(list(place.glob("*.safetensors"))) > 1
    first, last = PrunedConfig.from_pretrained(place).iterations
    assert first["metrics"] == {"eval_loss": 9.0} and first["weights"] == "0" * 32
    assert last["weights"] == mark_of_files(place)


@pytest.mark.slow
def test_a_record_of_an_earlier_pruning_is_left_alone(tmp_path):
    callback = {"threshold": 1.0, "start_epoch": 1, "retrain_epochs": 1, "calibration_samples": 64}
    file = write_chain(tmp_path, "--epochs", 2, callback=callback)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "begin")
    remove_blocks(model, {STACK: [1]})
    model.config.pruning_config["iterations"][-1] |= {"metrics": {"eval_loss": 9.0}, "weights": "0" * 32}
    model.save_pretrained(tmp_path / "begin")
    run_chain(file)
    (entry,) = PrunedConfig.from_pretrained(tmp_path / "out" / "model").iterations
    assert entry["metrics"] == {"eval_loss": 9.0} and entry["weights"] == "0" * 32


@pytest.mark.slow
def test_an_interrupted_link_goes_on_with_its_own_settings_only(tmp_path):
    callback = {"num_blocks": 5, "start_epoch": 2, "retrain_epochs": 1, "calibration_samples": 64}
    more = ["--epochs", 3, "--resume", "{checkpoint}"]
    file = write_chain(tmp_path, *more, callback=callback, script=str(tmp_path / "script.py"))
    script = (ROOT / "tests" / "chain" / "train.py").read_text()
    fails = script.replace("time.sleep(self.pause)", "assert state.global_step < 10")
    (tmp_path / "script.py").write_text(fails)
    assert run_chain(file, check=False).returncode == 2  # in its second epoch, behind a checkpoint
    changed = script.replace(
        "MPruneCallback(**given.callback)", "MPruneCallback(**{**given.callback, 'num_blocks': 4})"
    )
    (tmp_path / "script.py").write_text(changed)
    done = run_chain(file, check=False)
    assert done.returncode == 2 and "num_blocks 5 -> 4. Go on with the same ones" in done.stderr
    (tmp_path / "script.py").write_text(script)
    assert "on from checkpoint-8" in run_chain(file).stderr


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [("", ConfigError, "give it an MPruneCallback"), ("raise SystemExit(3)", LaunchError, "ended with exit code")],
)
def test_a_script_that_takes_no_part_or_fails_is_told(tmp_path, code, error, match):
    script = tmp_path / "script.py"
    script.write_text(code)
    chain = Chain(ChainSettings.from_yaml(write_chain(tmp_path, script=str(script))), print)
    for _ in range(2):  # the same again: nothing half done is left behind
        with pytest.raises(error, match=f"(?i){match}"):
            chain.run()
