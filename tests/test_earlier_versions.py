"""What earlier versions wrote is read, loaded and resumed: fixtures/earlier/README.md tells what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from deeparc_hf import (
    PrunedConfig,
    PruningPlan,
    apply_plan,
    create_model_card,
    find_stacks,
    load_pruned,
    remove_blocks,
    save_pruned,
)

from .fixtures.earlier.training import RUNS, STEPS_OF_AN_EPOCH, make_model, make_trainer

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
CHECKPOINTS = sorted(path.relative_to(EARLIER) for path in EARLIER.glob("*/checkpoint-*"))
# verdicts on each pruning and stride, and the epoch in which each run ends
FIRST, SECOND, AGAIN = ("pruning 1", 1, "accepted"), ("pruning 2", 1, "rolled back"), ("pruning 2", 2, "rolled back")
ENDS = {
    "zeroed_first": ([("before pruning", None, None), FIRST, SECOND], 5),
    "zeroed_last": ([("before pruning", None, None), FIRST, SECOND, AGAIN], 8),
}


# settings that came later, and what they were before there was a choice
LATER = {
    "across_stacks": False,
    "freeze_inputs": True,
    "objective": "divergence",
    "search": None,
    "speedup": None,
    "stock_only": False,
}


def read(file):
    return json.loads(Path(file).read_text("utf-8"))


def verdicts(attempts):
    return [(attempt["name"], attempt.get("k"), attempt.get("decision")) for attempt in attempts]


def assert_near(state, file):
    """To the bit on the machine that wrote the file; elsewhere sums may be rounded otherwise."""
    expected = load_file(file)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_every_phase_is_there():
    def phases(path):
        saved = read(EARLIER / path / "trainer_state.json")["stateful_callbacks"]
        pruning, zeroing = (saved[name]["attributes"]["saved_progress"] for name in ("MPruneCallback", "WandaCallback"))
        return pruning["phase"], pruning["decision"], zeroing["phase"]

    assert {str(path): phases(path) for path in CHECKPOINTS} == {
        "zeroed_first/checkpoint-11": ("retraining", None, "sparse"),
        "zeroed_last/checkpoint-2": ("before the first pruning", None, "waiting"),
        "zeroed_last/checkpoint-5": ("retraining", None, "waiting"),
        "zeroed_last/checkpoint-9": ("retraining", "accept", "waiting"),
        "zeroed_last/checkpoint-15": ("retraining", "reject", "waiting"),
        "zeroed_last/checkpoint-21": ("finished", "reject", "waiting"),
        "zeroed_last/checkpoint-23": ("finished", None, "sparse"),
    }


@pytest.mark.filterwarnings("ignore::deeparc_hf.errors.CalibrationWarning")  # 24 samples are few
@pytest.mark.parametrize("path", CHECKPOINTS, ids=str)
def test_a_run_that_was_broken_off_ends_as_it_would_have(tmp_path, path):
    """With the verdicts, the record and the weights of the run that nothing broke off."""
    name, folder = path.parts[0], tmp_path / path.parts[0]
    shutil.copytree(EARLIER / name, folder)
    trainer, pruning, _ = make_trainer(name, folder, save_strategy="epoch")
    trainer.train(resume_from_checkpoint=str(folder / path.name))
    ended = EARLIER / f"{name}_ended"
    wanted, epochs = ENDS[name]
    assert trainer.state.global_step == STEPS_OF_AN_EPOCH * epochs
    assert verdicts(pruning.attempts) == verdicts(read(ended / "pruning_report.json")["attempts"]) == wanted
    assert_near(trainer.model.state_dict(), ended / "model.safetensors")
    record, expected = (
        PrunedConfig.from_model(trainer.model),
        PrunedConfig.from_dict(read(ended / "config.json")["pruning_config"]),
    )
    assert (record.stacks, record.sparsity) == (expected.stacks, expected.sparsity)
    for report in ("pruning_report.json", "sparsity_report.json"):
        now, then = read(folder / report), read(ended / report)
        assert now.keys() == then.keys()
        for key in ("phase", "reason", "baseline", "accepted", "step", "data", "training"):
            assert now.get(key) == then.get(key), key
        later = LATER if "across_stacks" in now["config"] else {}
        assert now["config"] == {**then["config"], **later}
    # how blocks were compared is told since
    assert [attempt.keys() - {"compared"} for attempt in pruning.attempts] == [
        attempt.keys() for attempt in read(ended / "pruning_report.json")["attempts"]
    ]
    for file in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / path.name / file, weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_loads(name):
    ended = EARLIER / f"{name}_ended"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(ended)
    assert_near(model.state_dict(), ended / "model.safetensors")
    record = PrunedConfig.from_model(model)
    assert {name: len(stack) for name, stack in find_stacks(model).items()} == {"model.layers": 4}
    assert record.removed == {"model.layers": (3,)}
    matrices = record.sparsity["matrices"]
    assert len(matrices) == 8
    assert all(entry["zeros"] == (model.get_submodule(m).weight == 0).sum() for m, entry in matrices.items())


@pytest.mark.parametrize("name", RUNS)
def test_a_record_says_what_of_the_base_is_loaded(name, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = load_pruned(transformers.AutoModelForSequenceClassification, tmp_path, EARLIER / f"{name}_ended")
    expected = make_model()
    remove_blocks(expected, {"model.layers": [3]})
    assert_equal(loaded.state_dict(), expected.state_dict())


@pytest.mark.parametrize("file", sorted(EARLIER.glob("*/pruning_plan.json")), ids=lambda file: file.parent.name)
def test_a_plan_is_read_and_written_as_it_was(file, tmp_path):
    plan = PruningPlan.from_json(file)
    plan.to_json(tmp_path / "plan.json")
    then = read(file)
    assert read(tmp_path / "plan.json") == {**then, "config": {**then["config"], **LATER}}


def test_a_plan_applies_and_the_reports_tell_of_the_model(tmp_path):
    plan = PruningPlan.from_json(EARLIER / "command" / "pruning_plan.json")
    model = make_model()
    apply_plan(model, plan)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    save_pruned(model, tmp_path)
    for file in (EARLIER / "command").iterdir():
        shutil.copy(file, tmp_path)
    card = str(create_model_card(tmp_path))
    assert "with 2 of its 5 blocks (layers) removed (found by debiased CKA): 2,536 → 1,608 parameters" in card
    assert "on 24 calibration samples" in card and "Ran on CPU (x86_64), 2 CPU cores" in card


@pytest.mark.parametrize("name", RUNS)
def test_reports_are_read_into_a_card(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(EARLIER / f"{name}_ended", folder)
    card = str(create_model_card(folder))
    assert "rolled back" in card and "wanda" in card
