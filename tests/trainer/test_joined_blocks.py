"""Models whose blocks have parts in several lists side by side (XLM) in a Trainer: pruned, taken back, resumed."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from deeparc_hf import DistillConfig, analyze, find_stacks, load_pruned, prune_checkpoint, search_blocks
from tests.pruning.test_on_disk import assert_same, lived
from tests.trainers import pruning, train, without_stages
from tests.zoo import ZOO

STACK = "transformer.{attentions,layer_norm1,ffns,layer_norm2}"
PARTS = ("attentions", "layer_norm1", "ffns", "layer_norm2")
GATED = {"num_blocks": 2, "start_epoch": 1, "freeze": "partial", "max_drop": 0.1, "metric": "accuracy"}
TAUGHT = {"distill": DistillConfig(hidden=1.0), "keep_snapshots": True}
RUNS = {
    "two prunings, frozen": ({"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial"}, None, 3),
    "in the middle": ({"num_blocks": 2, "start_epoch": 1, "protect": ("*.0", "*.3")}, None, 2),
    "taken back": ({**GATED, "keep_snapshots": True}, {4: 0.9, 3: 0.1, 2: 0.1}, 4),
    "searched, healed and taught": (
        {
            "num_blocks": 2,
            "search": "greedy",
            "heal": "lstsq",
            "distill": DistillConfig(hidden=1.0),
            "keep_snapshots": True,
        },
        None,
        2,
    ),
}


def lengths(model):
    return {len(getattr(model.transformer, part)) for part in PARTS}


def run(name, folder, resume=None):
    settings, accuracy, epochs = RUNS[name]
    model = ZOO["xlm"].model()
    arguments = {}
    if accuracy is not None:
        measure = {"compute_metrics": lambda prediction: {"accuracy": accuracy[len(model.transformer.ffns)]}}
        arguments = {"eval_strategy": "epoch", **measure}
    callback = pruning(**settings)
    often = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, "num_train_epochs": epochs}
    train(model, folder, callback, resume=resume, **often, **arguments)
    return model, callback


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("name", RUNS)
def test_every_checkpoint_leads_to_the_same_end(name, tmp_path):
    torch.manual_seed(0)
    model, callback = run(name, tmp_path / "whole")
    assert lengths(model) == {4 if name == "taken back" else 2} == {model.config.n_layers}
    assert (callback.record is None) == (name == "taken back")
    if name == "in the middle":
        assert callback.record.kept[STACK] == (0, 3)
    for point in sorted((tmp_path / "whole").glob("checkpoint-*")):
        again = tmp_path / point.name
        shutil.copytree(tmp_path / "whole", again)
        torch.manual_seed(12345)
        resumed, second = run(name, again, resume=str(again / point.name))
        assert equal(model.state_dict(), resumed.state_dict()), point.name
        assert without_stages(second.record) == without_stages(callback.record)
        frozen = [{n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, resumed)]
        assert frozen[0] == frozen[1]


def test_what_is_frozen_runs_before_the_lowest_block_that_is_trained(tmp_path):
    model, callback = run("two prunings, frozen", tmp_path)
    frozen = callback.record.iterations[-1]["frozen"].get(STACK, [])
    places = [callback.record.kept[STACK].index(index) for index in frozen]
    for place in range(2):
        parts = [getattr(model.transformer, part)[place] for part in PARTS]
        trained = {p.requires_grad for part in parts for p in part.parameters()}
        assert trained == {place not in places}
    before = [model.transformer.embeddings, model.transformer.position_embeddings, model.transformer.layer_norm_emb]
    assert not any(p.requires_grad for module in before for p in module.parameters())
    assert all(p.requires_grad for p in model.sequence_summary.parameters())


def test_lora_is_pruned_beneath(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        ZOO["xlm"].model(), peft.LoraConfig(r=2, target_modules=["q_lin", "lin1"], task_type="SEQ_CLS")
    )
    train(model, tmp_path, pruning(num_blocks=2), save_strategy="epoch")
    beneath = model.base_model.model
    assert lengths(beneath) == {2} and list(find_stacks(model)) == [STACK]
    ZOO["xlm"].model().save_pretrained(tmp_path / "base")
    base = load_pruned(AutoModelForSequenceClassification, tmp_path / "base", tmp_path / "checkpoint-16")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-16").eval()
    batch = ZOO["xlm"].batches(1)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


def test_a_checkpoint_is_pruned_from_file_to_file(tmp_path):
    ZOO["xlm"].model().save_pretrained(tmp_path / "whole")
    prune_checkpoint(
        tmp_path / "whole", tmp_path / "out", {STACK: [1]}, auto_class="AutoModelForSequenceClassification"
    )
    cls = AutoModelForSequenceClassification
    assert_same(tmp_path / "out", lived(cls, tmp_path / "whole", {STACK: [1]}, tmp_path / "lived"))


@pytest.fixture
def planted():
    """Block 2 does nothing: what it adds is zero, and its norms find what is normed already."""
    model = ZOO["xlm"].model()
    for linear in (model.transformer.attentions[2].out_lin, model.transformer.ffns[2].lin2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def test_a_block_that_does_nothing_goes_first(planted):
    batches = ZOO["xlm"].batches(4)
    assert dict(analyze(planted, batches, num_blocks=3, progress=False).removed) == {STACK: (2,)}
    frontier = search_blocks(planted, batches, heal=None, progress=False)
    points = sorted(frontier.points, key=lambda point: sum(map(len, point.removed.values())))
    first = next(point for point in points if point.removed)
    assert dict(first.removed) == {STACK: (2,)}
    others = [point.value for point in points if len(point.removed.get(STACK, ())) > 1]
    assert first.value < 1e-6 < min(others)
