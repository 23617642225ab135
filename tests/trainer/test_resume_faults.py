"""Resumes that went wrong once: finished runs, the same process, models whose checkpoints name tensors otherwise, own
optimizers.
"""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
import transformers as tf
from torch.nn.modules.module import _global_module_registration_hooks
from transformers import Trainer

from deeparc_hf.errors import ConfigError
from tests.trainers import arguments, image_data, pruning, text_data, train, without_stages
from tests.zoo import ZOO

from .test_resume import blocks, equal, scripted


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("length", [{"max_steps": 14}, {"num_train_epochs": 3.5}], ids=["steps", "fraction"])
@pytest.mark.parametrize("settings", [{"threshold": 1e-6, "k": 2}, {"num_blocks": [3, 2]}], ids=["threshold", "list"])
@pytest.mark.filterwarnings("ignore:The threshold 1e-06 takes")
def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, settings, length):
    """Its last step is not the end of an epoch. The Trainer makes a step more on a resume; that is taken back."""
    data = text_data(rows=32)  # 4 steps an epoch

    def go(resume=None):
        torch.manual_seed(0)
        model, callback = ZOO["bert"].model(), pruning(**settings, start_epoch=1)
        train(model, tmp_path, callback, data=data, resume=resume, save_strategy="steps", save_steps=2, **length)
        return model, callback

    whole, first = go()
    again, second = go(resume=True)
    assert equal(whole.state_dict(), again.state_dict())
    assert [a["name"] for a in first.attempts] == [a["name"] for a in second.attempts]


@pytest.mark.filterwarnings("ignore:The threshold 1e-06 takes")
def test_more_epochs_make_the_last_retraining_longer(tmp_path):
    def go(epochs, resume=None):
        rates = []

        class Rates(tf.TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                rates.append(kwargs["optimizer"].param_groups[0]["lr"])

        model, callback = ZOO["bert"].model(), pruning(threshold=1e-6, k=2, start_epoch=1)
        train(
            model,
            tmp_path,
            callback,
            Rates(),
            resume=resume,
            save_strategy="epoch",
            num_train_epochs=epochs,
            learning_rate=1.0,
        )
        return model, callback, rates

    go(2)
    model, callback, rates = go(3, str(tmp_path / "checkpoint-16"))
    assert blocks(model) == 2 and len(callback.attempts) == 2
    # the first step's rate is the checkpoint's, as in every resume
    assert rates[1:] == pytest.approx([(16 - step) / 16 for step in range(9, 16)])


class Interrupt(tf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = -1
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [13, 20])
def test_ctrl_c_and_a_resume_in_the_same_process(tmp_path, step):
    """What the interrupted run froze must thaw where the next pruning says so."""
    settings = {"num_blocks": [3, 2], "start_epoch": 1, "freeze": "partial"}
    arguments_ = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3, "learning_rate": 1e-3}
    whole = ZOO["bert"].model()
    train(whole, tmp_path / "whole", pruning(**settings), **arguments_)
    model, callback = ZOO["bert"].model(), pruning(**settings)
    trainer = Trainer(
        model,
        arguments(tmp_path / "cut", **arguments_),
        train_dataset=text_data(),
        callbacks=[callback, Interrupt(step)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert equal(whole.state_dict(), model.state_dict()) and trainable(whole) == trainable(model)


@pytest.mark.parametrize("new_trainer", [False, True])
def test_what_one_training_froze_the_next_one_trains(tmp_path, new_trainer):
    model, data = ZOO["bert"].model(), text_data()
    for block in model.bert.encoder.layer[:1]:
        block.requires_grad_(False)  # by the user: stays
    own = {name for name, p in model.named_parameters() if not p.requires_grad}
    callback = pruning(num_blocks=3, freeze="partial", protect="bert.encoder.layer.0")
    trainer = train(model, tmp_path, callback, num_train_epochs=1)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} > own
    callback.config = callback.config.replace(freeze="none", num_blocks=2)
    if new_trainer:
        trainer = Trainer(
            model, arguments(tmp_path, num_train_epochs=1, learning_rate=1e-2), train_dataset=data, callbacks=[callback]
        )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == own
    assert not torch.equal(
        before["bert.embeddings.word_embeddings.weight"], model.bert.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize("name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deit", "dinov2"))])
def test_models_whose_checkpoints_name_tensors_otherwise(tmp_path, name):
    """transformers saves these under older names, and the Trainer does not rename them when it loads a checkpoint."""
    data = image_data(classes=2)

    def go(folder, resume=None):
        torch.manual_seed(0)
        model = ZOO[name].model()
        callback = pruning(num_blocks=3, start_epoch=1, freeze="partial")
        train(
            model,
            folder,
            callback,
            data=data,
            resume=resume,
            save_strategy="steps",
            save_steps=4,
            num_train_epochs=2,
            learning_rate=1e-3,
        )
        return model

    whole = go(tmp_path / "whole")
    for step in (4, 8, 12):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "whole", again)
        assert equal(whole.state_dict(), go(again, str(again / f"checkpoint-{step}")).state_dict()), step


def test_the_best_vit_is_really_loaded(tmp_path):
    data, model, values = (
        image_data(classes=2),
        ZOO["vit"].model(),
        iter([0.9, 0.5]),
    )
    trainer = train(
        model,
        tmp_path,
        pruning(num_blocks=3),
        data=data,
        compute_metrics=lambda _: {"accuracy": next(values)},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        learning_rate=1e-2,
    )
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    best = type(model).from_pretrained(tmp_path / "checkpoint-8")
    last = type(model).from_pretrained(tmp_path / "checkpoint-16")
    assert equal(best.state_dict(), model.state_dict()) and not equal(last.state_dict(), model.state_dict())


@pytest.mark.parametrize("step", [4, 8, 12, 16, 20])
def test_an_optimizer_of_the_user_follows_the_checkpoint(tmp_path, step):
    def go(folder, resume=None):
        torch.manual_seed(0)
        model = ZOO["bert"].model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        Trainer(
            model,
            arguments(folder, num_train_epochs=3, save_strategy="steps", save_steps=4),
            train_dataset=text_data(),
            optimizers=(optimizer, None),
            callbacks=[pruning(num_blocks=[3, 2], start_epoch=1, freeze="partial")],
        ).train(resume_from_checkpoint=resume)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        return model

    whole = go(tmp_path / "whole")
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    assert equal(whole.state_dict(), go(again, str(again / f"checkpoint-{step}")).state_dict())


def test_the_best_model_is_delivered_from_the_last_checkpoint_too(tmp_path):
    """The run had stopped at step 24, and the best of its structure is that of step 16."""

    def go(folder, resume=None):
        torch.manual_seed(0)
        model = ZOO["bert"].model()
        values = {8: 0.9, 16: 0.95, 24: 0.9}
        callback = pruning(
            num_blocks=3, start_epoch=1, retrain_epochs=2, max_drop=0.1, metric="accuracy", keep_snapshots=True
        )
        holder = {}

        class Step(tf.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                holder["step"] = state.global_step

        train(
            model,
            folder,
            callback,
            Step(),
            resume=resume,
            compute_metrics=lambda _: {"accuracy": values[holder["step"]]},
            num_train_epochs=4,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            learning_rate=1e-3,
        )
        return model

    whole = go(tmp_path / "whole")
    saved = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-16")
    assert equal(whole.state_dict(), saved.state_dict())
    for step in (16, 24):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "whole", again)
        for state in again.glob("checkpoint-*/trainer_state.json"):  # the best checkpoint is named by its path
            state.write_text(state.read_text().replace(str(tmp_path / "whole"), str(again)))
        assert equal(whole.state_dict(), go(again, str(again / f"checkpoint-{step}")).state_dict()), step


@pytest.mark.slow
def test_saving_by_steps_and_evaluating_by_epochs(tmp_path):
    """A checkpoint at the end of an epoch is saved after the epoch's evaluation, which draws random numbers."""
    data = text_data(rows=32)  # 4 steps an epoch

    def go(folder, resume=None):
        torch.manual_seed(0)
        model, callback = ZOO["bert"].model(), pruning(num_blocks=[3, 2], start_epoch=1)
        train(
            model,
            folder,
            callback,
            data=data,
            resume=resume,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="epoch",
            num_train_epochs=3,
            learning_rate=1e-3,
        )
        return model, callback

    whole, first = go(tmp_path / "whole")
    assert [e["step"] for a in first.attempts for e in a["evaluations"]] == [4, 8, 12]
    for step in (2, 4, 6, 8, 10):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "whole", again)
        model, callback = go(again, str(again / f"checkpoint-{step}"))
        assert equal(whole.state_dict(), model.state_dict()) and without_stages(callback.record) == without_stages(
            first.record
        ), step


@pytest.mark.parametrize(
    ("settings", "arguments_", "message"),
    [
        ({"max_drop": 0.1}, {"eval_strategy": "epoch"}, "max_drop None -> 0.1"),
        ({"k": 2}, {}, "k 1 -> 2"),
        ({"start_epoch": 0}, {}, "start_epoch 1 -> 0"),
        ({}, {"data": text_data(rows=32)}, "optimizer steps of an epoch 8 -> 4"),
        ({}, {"num_train_epochs": 2}, "needs 3 epochs"),
    ],
)
@pytest.mark.parametrize("step", [8, 16])
def test_changes_that_would_have_led_elsewhere_are_refused(tmp_path, settings, arguments_, message, step):
    base = {"num_blocks": [3, 2], "start_epoch": 1}
    train(ZOO["bert"].model(), tmp_path, pruning(**base), save_strategy="epoch", num_train_epochs=3)
    with pytest.raises(ConfigError, match=message):
        train(
            ZOO["bert"].model(),
            tmp_path,
            pruning(**{**base, **settings}),
            resume=str(tmp_path / f"checkpoint-{step}"),
            **{"save_strategy": "epoch", "num_train_epochs": 3, **arguments_},
        )


@pytest.mark.filterwarnings("ignore:The run is resumed with other settings")
@pytest.mark.parametrize(("targets", "ends"), [([3], {8: 3, 16: 3}), ([3, 2, 1], {8: 1, 16: 1})], ids=["fewer", "more"])
def test_fewer_or_more_iterations_count_from_the_checkpoint_on(tmp_path, targets, ends):
    base = {"num_blocks": [3, 2], "start_epoch": 1}
    train(ZOO["bert"].model(), tmp_path, pruning(**base), save_strategy="epoch", num_train_epochs=4)
    for step, end in ends.items():
        model = ZOO["bert"].model()
        callback = pruning(**{**base, "num_blocks": targets})
        train(model, tmp_path, callback, resume=str(tmp_path / f"checkpoint-{step}"), num_train_epochs=4)
        assert blocks(model) == end, step


def test_a_gated_run_in_one_process_twice(tmp_path):
    """The same Trainer trains again: a new run, from the model as it is."""
    model = ZOO["bert"].model()
    callback = pruning(num_blocks=3, start_epoch=1, max_drop=0.1, metric="accuracy", freeze="partial")
    trainer = train(
        model, tmp_path, callback, compute_metrics=scripted(model, {4: 0.9, 3: 0.9, 2: 0.1}), eval_strategy="epoch"
    )
    assert blocks(model) == 3
    callback.config = callback.config.replace(num_blocks=2)
    trainer.train()
    assert blocks(model) == 3 and callback.attempts[1]["decision"] == "rolled back"


@pytest.mark.parametrize("only_model", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_model_init(tmp_path, only_model):
    """The Trainer makes a new model when training begins, and loads the checkpoint into it before any callback is
    asked.
    """

    def go(folder, resume=None):
        trainer = Trainer(
            args=arguments(
                folder,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=4,
                learning_rate=1e-3,
                save_only_model=only_model,
            ),
            model_init=lambda: ZOO["bert"].model(),
            train_dataset=text_data(),
            callbacks=[pruning(num_blocks=[3, 2], start_epoch=1, freeze="partial")],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = go(tmp_path / "whole")
    assert blocks(whole) == 2
    for step in (4, 8, 12, 16, 20):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "whole", again)
        resumed = go(again, str(again / f"checkpoint-{step}"))
        assert blocks(resumed) == 2
        assert only_model or equal(whole.state_dict(), resumed.state_dict()), step


def test_nothing_waits_for_models_where_none_will_be_made(tmp_path):
    seen = []

    class Look(tf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(len(_global_module_registration_hooks))

    gc.collect()
    before = len(_global_module_registration_hooks)
    trainer = train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), Look(), num_train_epochs=1)
    assert {*seen, len(_global_module_registration_hooks)} == {before}
    assert trainer.state.global_step == len(seen)
