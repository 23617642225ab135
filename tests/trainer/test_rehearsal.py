"""What is tried when a training begins: refused before any step, with the way out, and without a trace."""

from __future__ import annotations

import copy
import random

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn
from transformers import Trainer, default_data_collator

from deeparc_hf import WandaCallback, analyze, find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import CalibrationError, ConfigError, PlanError, SurgeryError
from deeparc_hf.observe.training_calibration import TrainingCalibration
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.pruning.rebuild import inexpressible
from deeparc_hf.trainer.rehearsal import rehearse
from tests.pruned_type.test_pruned_type import MINICPM, needs_minicpm
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import TEXT, VOCAB, ZOO, spread

from .test_neighbours_trainers import texts, tokenizer

BERT = tf.BertConfig(**TEXT)
BATCHES = [
    {key: torch.tensor(value) for key, value in text_data()[i : i + 8].items() if key != "labels"}
    for i in range(0, 64, 8)
]
WAY_OUT = r'Callback\(calibration=\[\{"input_ids": ids, "attention_mask": mask\}, \.\.\.\]\)'


class Steps(tf.TrainerCallback):
    count = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.count += 1


class OwnNames(nn.Module):
    """A module around a backbone, with names of its own for what it takes."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = tf.BertModel(BERT), nn.Linear(32, 2)

    def forward(self, tokens, mask, targets=None):
        logits = self.head(self.backbone(tokens, attention_mask=mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, targets), "logits": logits}


class Asking(tf.BertPreTrainedModel):
    """A loss always, so labels always."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = tf.BertModel(config), nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask, labels):
        logits = self.head(self.bert(input_ids, attention_mask=attention_mask).pooler_output)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Defaulting(Asking):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels.view(-1))


class Prompting(Trainer):
    """Tokenizes when it computes its loss, as trainers for rankings and for reinforcement do."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        rows = list(inputs) if isinstance(inputs, list) else [{"text": text} for text in inputs["text"]]
        batch = tokenizer()(
            [row["text"] for row in rows], padding=True, return_tensors="pt", return_token_type_ids=False
        )
        return model(**batch, labels=torch.zeros(len(rows), dtype=torch.long)).loss

    def _prepare_inputs(self, inputs):
        return inputs


def failing(rows):
    raise ZeroDivisionError("no rows today")


def as_texts(rows):
    return {"text": [row["text"] for row in rows]}


TEXTS = datasets.Dataset.from_dict({"text": texts(1)})
NAMED = text_data().rename_columns({"input_ids": "tokens", "attention_mask": "mask", "labels": "targets"})
REFUSED = {
    "own names": (OwnNames, NAMED, default_data_collator, Trainer),
    "texts": (lambda: ZOO["bert"].model(), TEXTS, as_texts, Prompting),
    "rows": (lambda: ZOO["bert"].model(), TEXTS, list, Prompting),
    "a collator that fails": (lambda: ZOO["bert"].model(), text_data(), failing, Trainer),
}


def trainer_of(folder, name, *callbacks, **settings):
    make, data, collate, cls = REFUSED[name]
    settings = arguments(folder, remove_unused_columns=False, label_names=["targets"], **settings)
    return cls(make(), settings, train_dataset=data, data_collator=collate, callbacks=list(callbacks))


@pytest.mark.parametrize("callback", [pruning, WandaCallback])
@pytest.mark.parametrize("name", REFUSED)
def test_batches_that_the_model_does_not_take_are_refused_before_any_step(tmp_path, name, callback):
    steps = Steps()
    given = {"num_blocks": 3} if callback is pruning else {"sparsity": 0.5}
    with pytest.raises(CalibrationError, match=WAY_OUT):
        trainer_of(tmp_path, name, callback(start_epoch=1, **given), steps).train()
    assert steps.count == 0


@pytest.mark.parametrize("name", ["own names", "texts", "rows"])
def test_the_way_out_leads_out(tmp_path, name):
    callback = pruning(num_blocks=3, start_epoch=1, calibration=BATCHES)
    trainer = trainer_of(tmp_path, name, callback)
    trainer.train()
    (stack,) = find_stacks(trainer.model).values()
    assert len(stack) == 3 and callback.plan.samples == 64


@pytest.mark.parametrize("model", [Asking, Defaulting])
def test_a_model_that_cannot_do_without_labels_is_given_them(tmp_path, model):
    callback = pruning(num_blocks=3, start_epoch=1)
    trainer = train(model(BERT), tmp_path, callback)
    assert len(trainer.model.bert.encoder.layer) == 3


def test_plain_values_in_a_batch_reach_the_model(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 48, 48), "labels": i % 2} for i in range(32)]
    model, callback = ZOO["vit"].model(), pruning(num_blocks=3, start_epoch=1)
    settings = arguments(tmp_path, remove_unused_columns=False)
    collate = lambda batch: {**default_data_collator(batch), "interpolate_pos_encoding": True}  # noqa: E731
    Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[callback]).train()
    assert callback.plan.samples == 32 and callback.plan.num_kept == 3


@pytest.mark.parametrize("callback", [pruning, WandaCallback])
def test_no_samples_and_given_batches_that_do_not_fit(tmp_path, callback):
    given = {"num_blocks": 3} if callback is pruning else {"sparsity": 0.5}
    with pytest.raises(CalibrationError, match=f"gave no samples.*Give calibration batches as Bert.*{WAY_OUT}"):
        train(ZOO["bert"].model(), tmp_path, callback(**given, calibration=[]))
    with pytest.raises(CalibrationError, match=f"(?s)cannot run on a calibration batch.*{WAY_OUT}"):
        train(ZOO["bert"].model(), tmp_path, callback(**given, calibration=[{"input_ids": torch.full((8, 4), VOCAB)}]))


def test_a_batch_that_does_not_reach_every_block_is_refused(tmp_path):
    """Text alone, for a model of text and images."""
    config = tf.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 16},
        vision_config={**TEXT, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )

    class TextAlone(tf.CLIPModel):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return self.text_model(input_ids=input_ids, attention_mask=attention_mask)

    with pytest.raises(CalibrationError, match=r"Block 0 of vision_model\S* did not run.*calibration=\["):
        train(TextAlone(config), tmp_path, pruning(keep_ratio=0.8, start_epoch=1))


def test_nothing_is_left_of_a_rehearsal(capsys):
    for name in ("bert", "resnet"):
        model = ZOO[name].model().train()
        next(model.children()).eval()  # modes differ
        model.config.problem_type = None
        before, modes, states = (
            copy.deepcopy(model.state_dict()),
            [m.training for m in model.modules()],
            random_states(),
        )
        calibration = TrainingCalibration(list(ZOO[name].batches()), None, 8, MPruneConfig(num_blocks=2), model=model)
        rehearse(model, calibration, "MPruneCallback")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert [m.training for m in model.modules()] == modes and random_states() == states
        assert model.config.problem_type is None and not any(
            m._forward_hooks or m._forward_pre_hooks for m in model.modules()
        )
    assert capsys.readouterr() == ("", "")


def random_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


# ---- removals that settings cannot express ----


def modern():
    config = tf.ModernBertConfig(
        **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=4
    )
    return spread(tf.ModernBertForSequenceClassification(config))


def alternating():
    config = tf.Qwen3MoeConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_experts=4, decoder_sparse_step=2, moe_intermediate_size=16
    )
    return spread(tf.Qwen3MoeForCausalLM(config))


def test_of_kinds_in_turn_the_last_can_go_alone():
    model = alternating()
    assert not find_stacks(model)["model.layers"].pinned
    assert inexpressible(describe(model))["model.layers"].keys() == {0, 1, 2}


def test_a_block_that_the_settings_need_is_pinned_with_the_reason(tmp_path):
    """ModernBERT's first block has no norm of its own: without it the second would be built without one."""
    model = modern()
    refused = inexpressible(describe(model))
    assert refused.keys() == {"model.layers"} and refused["model.layers"].keys() == {0}
    with pytest.raises(SurgeryError, match="attn_norm"):
        remove_blocks(model, {"model.layers": [0]}, stock_only=True)
    for part in (model.model.layers[1].attn.Wo, model.model.layers[1].mlp.Wo):
        part.weight.data.zero_()  # does nothing: of the first two blocks, alike, keep="last" would take the first
    plan = analyze(model, BATCHES, num_blocks=3, keep="last", progress=False)
    assert "attn_norm" in plan.stacks["model.layers"].pinned[0] and 0 in plan.stacks["model.layers"].kept
    callback = pruning(num_blocks=3, keep="last", start_epoch=1)
    train(model, tmp_path, callback)
    assert len(model.model.layers) == 3 and 0 in callback.plan.stacks["model.layers"].kept


@needs_minicpm
@pytest.mark.parametrize("settings", [{"num_blocks": 3}, {"threshold": 0.9}])
def test_a_model_of_which_no_block_can_go_is_refused_before_any_step(tmp_path, settings):
    steps = Steps()
    data = text_data().map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises((PlanError, SurgeryError), match="settings cannot express its removal"):
        scaled = spread(tf.MiniCPM3ForCausalLM(tf.MiniCPM3Config(**MINICPM)))  # each block by the number of blocks
        train(scaled, tmp_path, pruning(**settings, start_epoch=1, stock_only=True), steps, data=data)
    assert steps.count == 0


def test_most_models_can_lose_any_block_and_take_two_skeletons(monkeypatch):
    model, built = ZOO["bert"].model(), []
    original = tf.BertForSequenceClassification.__init__
    monkeypatch.setattr(
        tf.BertForSequenceClassification, "__init__", lambda self, config: (built.append(0), original(self, config))[1]
    )
    subject = describe(model)
    assert inexpressible(subject) == {}
    assert len(built) == 2  # which is what it takes to describe the model


# ---- the metric's name ----


def test_a_metric_that_no_evaluation_gives_is_refused_at_the_first_one(tmp_path, capsys):
    steps = Steps()
    callback = pruning(num_blocks=3, start_epoch=2, max_drop=0.1, metric="f1", greater_is_better=True)
    with pytest.raises(ConfigError, match="'f1', which was not among the metrics of the evaluation: accuracy, loss"):
        train(
            ZOO["bert"].model(),
            tmp_path,
            callback,
            steps,
            compute_metrics=lambda _: {"accuracy": 0.5},
            eval_strategy="steps",
            eval_steps=2,
            num_train_epochs=3,
        )
    assert steps.count <= 3
    assert "The first evaluation shows whether f1 is measured; eval_on_start=True" in capsys.readouterr().out
    callback, steps = pruning(num_blocks=3, start_epoch=1, max_drop=0.1, metric="f1", greater_is_better=True), Steps()
    measured = {"compute_metrics": lambda _: {"accuracy": 0.5}, "eval_strategy": "epoch"}
    with pytest.raises(ConfigError, match="'f1', which was not among"):
        train(ZOO["bert"].model(), tmp_path, callback, steps, eval_on_start=True, **measured)
    assert steps.count == 0


def test_a_metric_that_nothing_computes_is_refused_before_any_step(tmp_path):
    callback, steps = pruning(num_blocks=3, start_epoch=1, max_drop=0.1, metric="f1", greater_is_better=True), Steps()
    with pytest.raises(
        ConfigError, match=r"'f1', and the Trainer has no compute_metrics that could give it.*metric='loss'"
    ):
        train(ZOO["bert"].model(), tmp_path, callback, steps, eval_strategy="epoch", num_train_epochs=3)
    assert steps.count == 0


# ---- several data sets ----


def test_data_sets_with_different_columns_are_taken_in_the_trainings_batches(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer().save_pretrained(tmp_path / "bert")
    spread(tf.BertModel(BERT)).save_pretrained(tmp_path / "bert")
    model = st.SentenceTransformer(modules=[Transformer(str(tmp_path / "bert")), Pooling(32)], device="cpu")
    data = datasets.DatasetDict(
        pairs=datasets.Dataset.from_dict({"anchor": texts(1), "positive": texts(2)}),
        triplets=datasets.Dataset.from_dict({"query": texts(3), "answer": texts(4), "other": texts(5)}),
    )
    callback = pruning(num_blocks=3, start_epoch=1)
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, st.SentenceTransformerTrainingArguments),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[callback],
    )
    trainer.train()
    assert len(model[0].auto_model.encoder.layer) == 3 and callback.plan.samples > 64


@pytest.mark.slow
def test_a_resumed_training_is_rehearsed_where_a_pruning_is_to_come(tmp_path):
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, start_epoch=1), save_strategy="epoch")
    broken = {"calibration": [{"tokens": torch.ones(8, 4)}], "num_blocks": 3, "start_epoch": 1}
    with pytest.raises(CalibrationError, match=WAY_OUT):
        train(
            ZOO["bert"].model(),
            tmp_path,
            pruning(**broken),
            resume=str(tmp_path / "checkpoint-8"),
            save_strategy="epoch",
        )
    # the last pruning is done: no data is needed any more
    train(ZOO["bert"].model(), tmp_path, pruning(**broken), resume=str(tmp_path / "checkpoint-16"), num_train_epochs=3)
