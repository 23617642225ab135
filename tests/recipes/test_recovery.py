"""Retraining as a training of its own: LoRA adapters that are merged, the whole model as a teacher, frozen blocks."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from deeparc_hf import DistillConfig, PrunedConfig
from deeparc_hf.errors import ConfigError
from experiment.models import load_model
from experiment.recovery import Taught, adapted, merged
from tests.publishing import tiny_tokenizer
from tests.zoo import ZOO

from .running import recipe, without_times, words, zeros
from .test_causal_lm import STACK, texts_of

main = recipe("causal_lm").main
ALONE = {"finetune_epochs": 0, "num_blocks": 3, "retrain_epochs": 1, "similarity": "cosine", "heal": "lstsq"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    ZOO["llama"].model().save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    for split, count in {"train": 70, "validation": 24, "test": 24}.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts_of(split, count))
        (folder / f"{split}.jsonl").write_text(rows)
    files = {f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {"model": str(folder / "llama"), "block_size": 12, **files}


def weights(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def changed(one, other):
    """Names of the tensors that differ."""
    return {name for name in one if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize(
    "how", [{"lora_rank": 2}, {"measure_removal": True}, {"measure_removal": True, "freeze": "partial"}]
)
def test_the_removal_is_a_row_and_a_checkpoint_of_its_own(data, tmp_path, how):
    """What is trained after it: adapters alone, everything, or the kept blocks beside the removal."""
    rows = main(words(**data, **ALONE, **how, output_dir=str(tmp_path)))
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    assert [sum(row.blocks.values()) for row in rows] == [4, 3, 3] and rows[1].parameters == rows[2].parameters
    assert rows[1].training_seconds is None and rows[2].training_seconds > 0
    before, after = weights(tmp_path / "iteration-1-removed"), weights(tmp_path / "iteration-1")
    moved = changed(before, after)
    if how.get("lora_rank"):
        matrices = {name for name in before if name.endswith("_proj.weight")}
        assert moved and moved <= matrices
        assert not list((tmp_path / "iteration-1").glob("adapter*"))
        drawn = torch.linalg.matrix_rank((after[min(moved)] - before[min(moved)]).double(), rtol=1e-4)
        assert 1 <= int(drawn) <= 2
    if how.get("freeze"):
        record = PrunedConfig.from_pretrained(tmp_path / "iteration-1")
        places = [record.stacks[STACK].kept.index(number) for number in record.iterations[-1]["frozen"][STACK]]
        still = {name for name in before if any(f"layers.{place}." in name for place in places)}
        assert rows[2].frozen == len(places) > 0 and still and not moved & still
    elif not how.get("lora_rank"):
        assert {name for name in before if STACK in name} <= moved
    report = json.loads((tmp_path / "iteration-1" / "report.json").read_text("utf-8"))
    assert [entry["label"] for entry in report["measurements"]] == ["before", "removed", "retrained"]
    assert [entry["healed"] for entry in report["healing"]] == [True]
    card = (tmp_path / "iteration-1" / "README.md").read_text("utf-8")
    assert "## What was removed" in card and "Similarity of blocks" in card
    assert "Trained after the removal." in card and "The training: learning rate 0.002" in card
    assert ("lora rank 2" in card) == ("lora_rank" in how)
    early = json.loads((tmp_path / "iteration-1-removed" / "evaluations.json").read_text("utf-8"))
    assert early["training"] is None and early["training_seconds"] is None


def test_the_whole_model_teaches_adapters(data, tmp_path):
    """With the teacher alone (distill_alpha=1) the divergence from the whole model falls."""
    settings = {**ALONE, "heal": None, "lora_rank": 4, "learning_rate": 1e-2, "retrain_epochs": 3}
    divergences = {}
    for alpha in (None, 1.0):
        folder = tmp_path / str(alpha)
        main(words(**data, **settings, distill_alpha=alpha, output_dir=str(folder)))
        batch = ZOO["llama"].batches()[0]
        whole = tf.AutoModelForCausalLM.from_pretrained(data["model"]).eval()
        for name in ("iteration-1-removed", "iteration-1"):
            model = tf.AutoModelForCausalLM.from_pretrained(folder / name).eval()
            with torch.no_grad():
                ours, theirs = model(**batch).logits.log_softmax(-1), whole(**batch).logits.log_softmax(-1)
            divergences[alpha, name] = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert divergences[1.0, "iteration-1"] < 0.9 * divergences[1.0, "iteration-1-removed"]
    assert divergences[1.0, "iteration-1"] < divergences[None, "iteration-1"]


def test_zeros_stay_zero_under_adapters(data, tmp_path):
    rows = main(words(**data, **ALONE, lora_rank=2, sparsity=0.4, sparsity_retrain=0.4, output_dir=str(tmp_path)))
    names = [row.name for row in rows]
    assert names[3:] == [
        f"{name}, 40 % zeros{more}" for name in ("original", "iteration 1") for more in ("", ", retrained")
    ]
    for row in rows[3:]:
        if row.folder is not None:
            model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / row.folder)
            assert (tmp_path / row.folder / "sparsity_report.json").is_file()
            assert zeros(model, STACK) == pytest.approx(row.sparsity) == pytest.approx(0.4, abs=0.03)
    assert [row.folder is None for row in rows[3:]] == [True, False, True, False]


class StopError(Exception):
    """Ctrl-C."""


@pytest.mark.parametrize("at", ["the removal", "the training"])
def test_it_is_resumed(data, tmp_path, monkeypatch, at):
    """Stopped right after the removal, or between two checkpoints of the adapters' training."""
    settings = {**ALONE, "lora_rank": 2, "retrain_epochs": 3, "save_strategy": "epoch", "distill_alpha": 0.5}
    whole = main(words(**data, **settings, output_dir=str(tmp_path / "whole")))
    stopped = {**data, **settings, "output_dir": str(tmp_path / "stopped")}

    def stop(self, args, state, *rest, **more):
        if state.epoch > (0.2 if at == "the removal" else 1.2):
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("experiment.journal.Clock.on_step_begin", stop)
        with pytest.raises(StopError):
            main(words(**stopped))
    assert (tmp_path / "stopped" / "iteration-1-removed" / "model.safetensors").is_file()
    rows = main(words(**stopped, resume_from_checkpoint=True))
    assert without_times(rows) == without_times(whole)
    again, once = (weights(tmp_path / name / "iteration-1") for name in ("stopped", "whole"))
    assert not changed(again, once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1, found 0"),
        ({"lora_alpha": 8}, "lora_alpha, lora_dropout and lora_targets are of adapters"),
        ({"lora_rank": 2, "freeze": "partial"}, "lora_rank trains adapters alone"),
        ({"lora_rank": 2, "retrain_epochs": 0}, "lora_rank is about the retraining"),
        ({"lora_rank": 2, "max_drop": 0.1}, "with lora_rank the retraining is a training of its own"),
        ({"measure_removal": True, "max_drop": 0.1}, "with measure_removal the retraining"),
        ({"lora_rank": 2, "lora_targets": ["query"]}, "LoRA adapters cannot be put on LlamaForCausalLM"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(words(**data, **{**ALONE, **changes}, output_dir=str(tmp_path)))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_a_loss_that_the_teacher_cannot_be_added_to_is_refused(tmp_path):
    """TRL's DFT takes the log-probabilities, with the teacher's term in them, for probabilities."""
    trl = pytest.importorskip("trl")
    taught = Taught(ZOO["llama"].model(), DistillConfig())
    with pytest.raises(ConfigError, match="loss_type='dft'"):
        taught.on_train_begin(trl.SFTConfig(str(tmp_path), loss_type="dft", bf16=False), model=ZOO["llama"].model())


def test_merging_adds_the_product_of_the_adapters(data):
    model = load_model(tf.AutoModelForCausalLM, data["model"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = type(
        "Settings", (), {"lora_rank": 2, "lora_alpha": 6.0, "lora_dropout": 0.0, "lora_targets": ["q_proj"]}
    )
    with_adapters = adapted(model, settings, seed=0)
    layer = with_adapters.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    change = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    whole = merged(with_adapters)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(whole.state_dict()[name], before[name] + change.detach())
    assert changed(whole.state_dict(), before) == {name}
