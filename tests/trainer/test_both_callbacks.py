"""MPruneCallback and WandaCallback in one training, in either order, with resumes from every checkpoint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from deeparc_hf import PrunedConfig
from tests.trainers import pruning, train, without_stages
from tests.zoo import ZOO

from .test_resume import STACK, blocks, equal, scripted
from .test_wanda_callback import zeroing, zeros

# name: (settings of pruning, accuracy by number of blocks, settings of zeroing, epochs)
GATE = {"max_drop": 0.1, "keep_snapshots": True}
RUNS = {
    "seed's sequence": ({"num_blocks": 3, "start_epoch": 1}, None, {"start_epoch": 2}, 4),
    "zeroed first": ({"num_blocks": 3, "start_epoch": 2, "freeze": "partial"}, None, {"start_epoch": 1}, 3),
    "at once": ({"num_blocks": 3, "start_epoch": 0}, None, {"start_epoch": 0}, 2),
    "in one epoch": ({"num_blocks": 3, "start_epoch": 1}, None, {"start_epoch": 1}, 3),
    "between two": ({"num_blocks": [3, 2], "start_epoch": 0}, None, {"start_epoch": 1, "sparsity": 0.3}, 3),
    "gate, accepted": ({"num_blocks": 3, "start_epoch": 1, **GATE}, {4: 0.9, 3: 0.85}, {"start_epoch": 0}, 4),
    "gate, zeroed last": ({"num_blocks": 3, "start_epoch": 1, **GATE}, {4: 0.9, 3: 0.85}, {"start_epoch": 2}, 5),
    "gate, taken back": (
        {"num_blocks": 2, "start_epoch": 1, **GATE, "k_max": 1},
        {4: 0.9, 2: 0.1},
        {"start_epoch": 1},
        5,
    ),
    "gate, taken back, zeroed last": (
        {"num_blocks": 2, "start_epoch": 1, **GATE, "k_max": 1},
        {4: 0.9, 2: 0.1},
        {"start_epoch": 2},
        5,
    ),
}


def run(name, order, folder, resume=None, **arguments):
    pruned, accuracy, zeroed, epochs = RUNS[name]
    model = ZOO["bert"].model()
    if accuracy:
        pruned = {**pruned, "metric": "accuracy"}
        arguments = {"compute_metrics": scripted(model, accuracy), **arguments}
    callbacks = [pruning(**pruned), zeroing(**zeroed)]
    defaults = {"num_train_epochs": epochs, "eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 1e-3}
    ordered = callbacks if order == "pruning first" else callbacks[::-1]
    trainer = train(model, folder, *ordered, resume=resume, **{**defaults, **arguments})
    return model, callbacks, trainer


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "pruning first") for name in RUNS),
        ("at once", "zeroing first"),  # the order can only matter where both act at one event
        *(pytest.param(name, "zeroing first", marks=pytest.mark.slow) for name in RUNS if name != "at once"),
    ],
)
def test_both_do_their_work_and_every_checkpoint_leads_to_the_same_end(tmp_path, name, order):
    folder = tmp_path / "whole"
    model, _, trainer = run(name, order, folder)
    pruned, accuracy, zeroed, epochs = RUNS[name]
    left = 4 if name.startswith("gate, taken back") else pruned["num_blocks"]
    assert blocks(model) == (left[-1] if isinstance(left, list) else left)
    share = zeroed.get("sparsity", 0.5)
    found = zeros(model)
    assert len(found) == 6 * blocks(model)
    assert all(abs(mask.float().mean() - share) < 0.02 for mask in found.values())
    record = PrunedConfig.from_model(model)
    assert sum(map(len, record.removed.values())) == 4 - blocks(model)
    if "last" in name or not accuracy:  # where the gate ends the training, it does so at its last verdict
        assert trainer.state.global_step == 8 * epochs
    points = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for point in points[:-1]:
        again = tmp_path / point.name
        shutil.copytree(folder, again)
        torch.manual_seed(12345)
        resumed, _, _ = run(name, order, again, resume=str(again / point.name))
        assert equal(model.state_dict(), resumed.state_dict()), point.name
        assert without_stages(PrunedConfig.from_model(resumed)) == without_stages(record)
        shutil.rmtree(again)


def test_the_seeds_sequence_shows_every_metric(tmp_path):
    """Prune, retrain, zero, evaluate, retrain again: in one trainer.train()."""
    run("seed's sequence", "pruning first", tmp_path)
    pruned = json.loads((tmp_path / "pruning_report.json").read_text())
    zeroed = json.loads((tmp_path / "sparsity_report.json").read_text())
    assert pruned["attempts"][1]["step"] == 8 and zeroed["step"] == 16
    assert [(e["step"], e["sparse"]) for e in zeroed["evaluations"]] == [
        (8, False),
        (16, False),
        (16, True),
        (24, True),
        (32, True),
    ]


def test_a_record_follows_blocks_that_are_removed_later(tmp_path):
    model, _, _ = run("zeroed first", "pruning first", tmp_path)
    record = PrunedConfig.from_model(model)
    assert record.kept[STACK] != (0, 1, 2, 3)
    assert {name.removeprefix(f"{STACK}.").partition(".")[0] for name in record.sparsity["matrices"]} == {"0", "1", "2"}
    assert record.iterations[-1]["metrics"]
