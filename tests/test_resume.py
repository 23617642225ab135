"""A run with prunings, resumed from each of its checkpoints, ends as the run that was never interrupted: to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from .trainers import pruning, train
from .zoo import ZOO

STEPS = 8  # of an epoch
STACK = "bert.encoder.layer"


def blocks(model):
    return len(model.bert.encoder.layer)


def scripted(model, accuracy):
    """Metrics by the number of blocks: planted truth for the gate. Given a dict, by block count; else a function of the model."""

    def compute(prediction):
        return {"accuracy": accuracy[blocks(model)] if isinstance(accuracy, dict) else accuracy(model)}

    return compute


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


RUNS = {
    "two prunings": ({"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1}, {}, 3),
    "two prunings, frozen": ({"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial"}, {}, 3),
    "accepted": (
        {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial", "max_drop": 0.1},
        {4: 0.9, 3: 0.85, 2: 0.81},
        3,
    ),
    "second taken back": (
        {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial", "max_drop": 0.1},
        {4: 0.9, 3: 0.85, 2: 0.1},
        5,
    ),
    "all taken back": ({"num_blocks": 2, "start_epoch": 1, "freeze": "partial", "max_drop": 0.1}, {4: 0.9, 2: 0.1}, 5),
}


def run(name, folder, resume=None, **arguments):
    settings, accuracy, epochs = RUNS[name]
    model = ZOO["bert"].model()
    if "max_drop" in settings:
        settings = {**settings, "metric": "accuracy"}
        arguments = {"eval_strategy": "epoch", "compute_metrics": scripted(model, accuracy), **arguments}
    callback = pruning(**settings)
    defaults = {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3, "warmup_steps": 2}
    trainer = train(model, folder, callback, resume=resume, **{**defaults, **arguments})
    return model, callback, trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs that are never interrupted, made once each."""
    made = {}

    def get(name, **arguments):
        key = (name, *sorted(arguments.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            torch.manual_seed(0)
            made[key] = (folder, *run(name, folder, **arguments))
        return made[key]

    return get


@pytest.mark.parametrize("saving", ["steps", "epoch"])
@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_leads_to_the_same_end(tmp_path, whole, name, saving):
    arguments = {"save_strategy": saving, "save_steps": 4}
    folder, model, callback, _ = whole(name, **arguments)
    points = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert len(points) >= 3
    for point in points:
        again = tmp_path / point.name
        shutil.copytree(folder, again)  # as a kill leaves it; later checkpoints are overwritten
        torch.manual_seed(12345)
        resumed, second, _ = run(name, again, resume=str(again / point.name), **arguments)
        assert equal(model.state_dict(), resumed.state_dict()), point.name
        assert resumed.config.num_hidden_layers == model.config.num_hidden_layers == blocks(resumed)
        assert second.record == callback.record
        verdicts = [[(a["name"], a.get("k"), a.get("decision")) for a in c.attempts] for c in (callback, second)]
        assert verdicts[0] == verdicts[1]
        frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, resumed)]
        assert frozen[0] == frozen[1]
