"""Snapshots: the accepted weights come back to the bit, the optimizer gets its parameters back by name, and failures
change nothing.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from deeparc_hf.errors import SurgeryError
from deeparc_hf.trainer import snapshots
from deeparc_hf.trainer.snapshots import FOLDER, drop_unused, read_plans, restore_weights, save_snapshot, set_groups
from tests.zoo import ZOO

PLAN = {"format_version": 1, "stacks": {"enc": {"similarity": [[1.0, 0.1 + 0.2], [0.1 + 0.2, 1.0]]}}, "samples": 3}
NAME = "step-8"


class Mixed(nn.Module):
    """Tensors of several types, tied weights, statistics, a part that checkpoints leave out, and a tensor that is not
    contiguous.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.brain = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("aside", torch.zeros(2), persistent=False)


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 10)
    return model


def copied(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    """To the bit: types too, and NaN counts as itself."""
    live = model.state_dict()
    bits = {name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()) for name, t in state.items()}
    return bits == {
        name: (t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()) for name, t in live.items()
    }


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_several_types_come_back_to_the_bit(tmp_path):
    model = randomize(Mixed(), 1)
    with torch.no_grad():
        model.wide[0], model.brain.bias[0], model.turned[0, 0] = float("nan"), -0.0, 1e-42
    saved, held = copied(model), dict(model.named_parameters())
    save_snapshot(tmp_path, NAME, model, None, PLAN)
    randomize(model, 2)
    model.aside.fill_(3.0)
    assert not same(model, saved)
    restore_weights(tmp_path, NAME, model)
    assert same(model, saved)
    assert model.head.weight is model.embed.weight
    assert all(parameter is held[name] for name, parameter in model.named_parameters())  # an optimizer may hold them
    assert model.aside.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("name", ["bert", "t5", "resnet", "timm_vit", "gemma3"])
def test_models_come_back_to_the_bit(tmp_path, name):
    specimen = ZOO[name]
    model = specimen.model()
    if name == "resnet":  # statistics that no initialization has
        model.train()
        model(**specimen.batches(1)[0])
    saved = copied(model)
    save_snapshot(tmp_path, NAME, model, None, PLAN)
    randomize(model, 2)
    restore_weights(tmp_path, NAME, model)
    assert same(model, saved)
    if name == "resnet":
        tracked = [value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")]
        assert tracked
        assert all(value == 1 for value in tracked)


def test_saving_leaves_the_model_alone(tmp_path):
    model = randomize(Mixed(), 1)
    saved, held = copied(model), {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    save_snapshot(tmp_path, NAME, model, None, PLAN)
    assert same(model, saved)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == held


def test_a_later_snapshot_of_the_same_name_replaces_the_first(tmp_path):
    model = randomize(Mixed(), 1)
    save_snapshot(tmp_path, NAME, model, None, {"old": 1})
    saved = copied(randomize(model, 2))
    save_snapshot(tmp_path, NAME, model, None, PLAN)
    restore_weights(tmp_path, NAME, randomize(model, 3))
    assert same(model, saved)
    assert read_plans(tmp_path, NAME) == (PLAN, None)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [NAME]


@pytest.mark.parametrize("carried_out", [None, {"samples": 7}], ids=["not pruned yet", "pruned"])
def test_the_plans_come_back(tmp_path, carried_out):
    save_snapshot(tmp_path, NAME, nn.Linear(2, 2), None, PLAN, carried_out)
    assert read_plans(tmp_path, NAME) == (PLAN, carried_out)


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_a_crash_while_writing_leaves_no_half_snapshot(tmp_path, monkeypatch, older):
    model = randomize(Mixed(), 1)
    saved = copied(model)
    if older:
        save_snapshot(tmp_path, NAME, model, None, PLAN)
    before = files(tmp_path)

    def crash(model, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "save_model", crash)
        with pytest.raises(KeyboardInterrupt):
            save_snapshot(tmp_path, NAME, randomize(model, 2), None, {"new": 1})
    assert {name: data for name, data in files(tmp_path).items() if name.startswith(f"{FOLDER}/{NAME}/")} == before
    if older:
        restore_weights(tmp_path, NAME, model)
        assert same(model, saved)
        assert read_plans(tmp_path, NAME) == (PLAN, None)
        return
    for use in (lambda: restore_weights(tmp_path, NAME, model), lambda: read_plans(tmp_path, NAME)):
        with pytest.raises(SurgeryError, match=NAME):
            use()
    # what the crash left neither hinders the next attempt nor stays
    save_snapshot(tmp_path, NAME, model, None, PLAN)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [NAME]


DAMAGE = {
    "missing": lambda folder: [path.unlink() for path in folder.iterdir()],
    "empty": lambda folder: [path.write_bytes(b"") for path in folder.iterdir()],
    "cut": lambda folder: [path.write_bytes(path.read_bytes()[:-20]) for path in folder.iterdir()],
    "rubbish": lambda folder: [path.write_bytes(b"\xff" * 500) for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_snapshot_is_refused_and_nothing_changes(tmp_path, damage):
    model = randomize(Mixed(), 1)
    optimizer = torch.optim.AdamW(model.parameters())
    save_snapshot(tmp_path, NAME, model, optimizer, PLAN)
    damage(tmp_path / FOLDER / NAME)
    saved = copied(randomize(model, 2))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    for use in (
        lambda: restore_weights(tmp_path, NAME, model),
        lambda: set_groups(tmp_path, NAME, model, optimizer),
        lambda: read_plans(tmp_path, NAME),
    ):
        with pytest.raises(
            SurgeryError, match=rf"snapshot {NAME} in the folder {FOLDER}.*Resume from a checkpoint that is older"
        ):
            use()
    assert same(model, saved)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group] for group in groups
    ]


class Other(Mixed):
    """`Mixed` with its last tensor in another shape or place, so that a check on the go would come too late."""

    def __init__(self, change):
        super().__init__()
        if change == "shape":
            self.turned = nn.Parameter(torch.randn(5, 4))
        elif change == "name":
            self.moved = self.turned
            del self.turned
        elif change == "type":
            self.turned = nn.Parameter(self.turned.detach().to(torch.float16))
        else:
            self.more = nn.Linear(4, 4)


@pytest.mark.parametrize("change", ["shape", "name", "type", "more"])
def test_a_snapshot_of_another_model_is_refused_and_nothing_changes(tmp_path, change):
    save_snapshot(tmp_path, NAME, randomize(Mixed(), 1), None, PLAN)
    model = randomize(Other(change), 2)
    saved = copied(model)
    with pytest.raises(SurgeryError, match=f"snapshot {NAME} in {FOLDER} is of another model"):
        restore_weights(tmp_path, NAME, model)
    assert same(model, saved)


# --- the optimizer ----------------------------------------------------------------------------------------------------


def test_groups_come_back_in_their_order_and_without_state(tmp_path):
    model = randomize(Mixed(), 1)
    names = [name for name, _ in model.named_parameters()]
    parameters = dict(model.named_parameters())
    planted = [names[::-2], names[-2::-2]]  # neither sorted nor as the model has them
    optimizer = torch.optim.AdamW([{"params": [parameters[n] for n in group]} for group in planted])
    optimizer.param_groups[1]["lr"] = 0.5
    save_snapshot(tmp_path, NAME, model, optimizer, PLAN)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == len(names)
    for group in optimizer.param_groups:  # as a pruning leaves it
        group["params"][:] = group["params"][1:]
    lists = [group["params"] for group in optimizer.param_groups]
    set_groups(tmp_path, NAME, model, optimizer)
    label = {id(parameter): name for name, parameter in parameters.items()}
    assert [[label[id(p)] for p in group["params"]] for group in optimizer.param_groups] == planted
    assert all(group["params"] is held for group, held in zip(optimizer.param_groups, lists, strict=True))
    assert not optimizer.state
    assert optimizer.param_groups[1]["lr"] == 0.5
    optimizer.step()
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_an_optimizer_that_was_made_without_some_parameters_gets_them(tmp_path):
    """As in a resumed run: the Trainer makes it for the smaller model."""
    model = randomize(Mixed(), 1)
    save_snapshot(tmp_path, NAME, model, torch.optim.SGD(model.parameters(), lr=1.0), PLAN)
    optimizer = torch.optim.SGD(list(model.parameters())[1:], lr=1.0)
    set_groups(tmp_path, NAME, model, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]


def test_a_parameter_outside_the_model_stays_with_the_optimizer(tmp_path):
    model, loss = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), loss], lr=1.0)
    save_snapshot(tmp_path, NAME, model, optimizer, PLAN)
    set_groups(tmp_path, NAME, model, optimizer)
    assert any(parameter is loss for parameter in optimizer.param_groups[0]["params"])


# --- tidying up -------------------------------------------------------------------------------------------------------


def checkpoint(output, step, snapshot):
    folder = output / f"checkpoint-{step}"
    folder.mkdir()
    state = {
        "global_step": step,
        "stateful_callbacks": {"MPruneCallback": {"attributes": {"progress": {"snapshot": snapshot}}}},
    }
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2), "utf-8")


def left(output):
    return sorted(path.name for path in (output / FOLDER).iterdir()) if (output / FOLDER).exists() else None


def test_only_unused_snapshots_are_dropped(tmp_path):
    for step in (1, 10, 100, 1000):
        save_snapshot(tmp_path, f"step-{step}", nn.Linear(2, 2), None, PLAN)
    (tmp_path / FOLDER / ".step-5.123").mkdir()  # a draft that a crash left
    checkpoint(tmp_path, 12, "step-10")
    checkpoint(tmp_path, 8, None)
    (tmp_path / "checkpoint-77").mkdir()  # a checkpoint that is being written
    drop_unused(tmp_path, "step-1000")
    # step-1 and step-100 are parts of names that are in use, or hold one
    assert left(tmp_path) == ["step-10", "step-1000"]
    assert read_plans(tmp_path, "step-10") == (PLAN, None)


def test_the_folder_goes_with_its_last_snapshot(tmp_path):
    drop_unused(tmp_path, None)  # nothing there, nothing to do
    save_snapshot(tmp_path, NAME, nn.Linear(2, 2), None, PLAN)
    checkpoint(tmp_path, 12, NAME)
    drop_unused(tmp_path, None)
    assert left(tmp_path) == [NAME]
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    drop_unused(tmp_path, None)
    assert left(tmp_path) is None
    assert (tmp_path / "checkpoint-12").is_dir()
