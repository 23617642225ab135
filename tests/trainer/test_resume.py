"""A run with prunings, resumed from each of its checkpoints, ends as the run that was never interrupted: to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from deeparc_hf.errors import DeepArcError, SurgeryError
from tests.trainers import pruning, train, without_stages
from tests.zoo import ZOO

STEPS = 8  # of an epoch
STACK = "bert.encoder.layer"


def blocks(model):
    return len(model.bert.encoder.layer)


def scripted(model, accuracy):
    """Metrics by the number of blocks: planted truth for the gate. Given a dict, by block count; else a function of the
    model.
    """

    def compute(prediction):
        return {"accuracy": accuracy[blocks(model)] if isinstance(accuracy, dict) else accuracy(model)}

    return compute


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


RUNS = {
    "two prunings": ({"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1}, {}, 3),
    "two prunings, frozen": ({"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial"}, {}, 3),
    "accepted": (
        {
            "iterations": 2,
            "num_blocks": [3, 2],
            "start_epoch": 1,
            "freeze": "partial",
            "max_drop": 0.1,
            "keep_snapshots": True,
        },
        {4: 0.9, 3: 0.85, 2: 0.81},
        3,
    ),
    "second taken back": (
        {
            "iterations": 2,
            "num_blocks": [3, 2],
            "start_epoch": 1,
            "freeze": "partial",
            "max_drop": 0.1,
            "keep_snapshots": True,
        },
        {4: 0.9, 3: 0.85, 2: 0.1},
        5,
    ),
    "searched as far as the metric lets it": (
        {"search": "greedy", "heal": "lstsq", "max_drop": 0.1, "keep_snapshots": True, "calibration_samples": 32},
        {4: 0.9, 3: 0.85, 2: 0.1},
        5,
    ),
    "searched, a smaller step": (
        {
            "search": "greedy",
            "heal": "lstsq",
            "num_blocks": 2,
            "start_epoch": 1,
            "freeze": "partial",
            "max_drop": 0.1,
            "keep_snapshots": True,
            "calibration_samples": 32,
        },
        {4: 0.9, 2: 0.1, 3: 0.85},
        4,
    ),
    "all taken back": (
        {"num_blocks": 2, "start_epoch": 1, "freeze": "partial", "max_drop": 0.1, "keep_snapshots": True},
        {4: 0.9, 2: 0.1},
        5,
    ),
}


def run(name, folder, resume=None, **arguments):
    settings, accuracy, epochs = RUNS[name]
    model = ZOO["bert"].model()
    if "max_drop" in settings:
        settings = {**settings, "metric": "accuracy"}
        arguments = {"eval_strategy": "epoch", "compute_metrics": scripted(model, accuracy), **arguments}
    callback = pruning(**settings)
    defaults = {
        "num_train_epochs": epochs,
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    }
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


@pytest.mark.parametrize(
    ("name", "saving"),
    [
        *((name, "epoch") for name in RUNS),
        ("two prunings, frozen", "steps"),
        *(pytest.param(name, "steps", marks=pytest.mark.slow) for name in RUNS if name != "two prunings, frozen"),
    ],
)
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
        assert without_stages(second.record) == without_stages(callback.record)
        verdicts = [[(a["name"], a.get("k"), a.get("decision")) for a in c.attempts] for c in (callback, second)]
        assert verdicts[0] == verdicts[1]
        frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, resumed)]
        assert frozen[0] == frozen[1]


@pytest.mark.parametrize("freeze", ["none", "partial"])
def test_blocks_that_the_user_froze_stay_frozen(tmp_path, freeze):
    """The optimizer of the resumed run is made for the blocks that the checkpoint keeps, and they are not the first
    ones.
    """

    def go(folder, resume=None):
        torch.manual_seed(3)
        model = ZOO["bert"].model()
        for index in (0, 3):
            model.bert.encoder.layer[index].requires_grad_(False)
        callback = pruning(num_blocks=2, freeze=freeze, protect=[f"{STACK}.0", f"{STACK}.3"])
        train(model, folder, callback, resume=resume, save_strategy="epoch", num_train_epochs=2)
        return model

    whole = go(tmp_path)
    again = go(tmp_path, str(tmp_path / "checkpoint-8"))
    assert equal(whole.state_dict(), again.state_dict())
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (whole, again)]
    assert trainable[0] == trainable[1] and not any(name.startswith(f"{STACK}.") for name in trainable[0])


def test_weights_alone_are_resumed_as_far_as_the_trainer_allows(tmp_path):
    """save_only_model keeps no optimizer and no random states: the structure,
    the frozen blocks and the schedule go on.
    """
    settings = {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial"}
    arguments = {
        "save_strategy": "epoch",
        "save_only_model": True,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
    }

    class Rates(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.seen.append((state.global_step, kwargs["optimizer"].param_groups[0]["lr"]))

    whole, rates = ZOO["bert"].model(), Rates()
    first = pruning(**settings)
    train(whole, tmp_path, first, rates, **arguments)
    for step in (8, 16):
        again, seen = ZOO["bert"].model(), Rates()
        callback = pruning(**settings)
        train(again, tmp_path, callback, seen, resume=str(tmp_path / f"checkpoint-{step}"), **arguments)
        assert blocks(again) == again.config.num_hidden_layers == 2
        assert [a["blocks"] for a in callback.attempts] == [a["blocks"] for a in first.attempts]
        retrained = [(s, rate) for s, rate in rates.seen if s >= step]
        assert [s for s, _ in seen.seen] == [s for s, _ in retrained]
        assert [rate for _, rate in seen.seen] == pytest.approx([rate for _, rate in retrained])


def test_weights_alone_resumed_in_mid_retraining_find_their_place_in_the_schedule(tmp_path):
    arguments = {
        "save_strategy": "steps",
        "save_steps": 4,
        "save_only_model": True,
        "num_train_epochs": 2,
        "learning_rate": 1.0,
    }
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, start_epoch=1), **arguments)
    model, rates = ZOO["bert"].model(), []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    train(
        model,
        tmp_path,
        pruning(num_blocks=3, start_epoch=1),
        Rates(),
        resume=str(tmp_path / "checkpoint-12"),
        **arguments,
    )
    assert blocks(model) == 3
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """Not one of its tensors fits: the Trainer would only warn, and train random blocks."""
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), save_strategy="epoch", save_only_model=True)
    other = ZOO["distilbert"].model() if "distilbert" in ZOO else ZOO["llama"].model()
    with pytest.raises(DeepArcError):
        train(other, tmp_path, pruning(num_blocks=3), resume=str(tmp_path / "checkpoint-8"), save_only_model=True)


def test_a_pruning_that_may_be_taken_back_needs_the_model_of_the_beginning(tmp_path, whole):
    folder, *_ = whole("second taken back", save_strategy="steps", save_steps=4)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    model = AutoModelForSequenceClassification.from_pretrained(again / "checkpoint-12")
    callback = pruning(**RUNS["second taken back"][0], metric="accuracy")
    arguments = {"eval_strategy": "epoch", "num_train_epochs": 5, "compute_metrics": scripted(model, {3: 0.9})}
    with pytest.raises(SurgeryError, match=r"no way back\. Build the model as it was built when the run began"):
        train(model, again, callback, resume=str(again / "checkpoint-12"), **arguments)


def test_a_missing_snapshot_is_told(tmp_path, whole):
    folder, *_ = whole("all taken back", save_strategy="epoch", save_steps=4)
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "_pruning_snapshots")
    for step in (16, 24):
        with pytest.raises(SurgeryError, match="Resume from a checkpoint that is older than the pruning"):
            run("all taken back", again, resume=str(again / f"checkpoint-{step}"), save_strategy="epoch", save_steps=4)
