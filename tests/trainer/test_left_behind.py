"""What a training leaves behind: a model that is pickled, copied and loaded like a stock one, and no trace on models
that it never saw.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
import transformers as tf
from torch.nn.modules.module import _global_module_registration_hooks
from transformers import Trainer

from deeparc_hf import find_stacks, remove_blocks
from tests.trainers import arguments, image_data, pruning, text_data, train
from tests.zoo import ZOO

from .test_resume import STACK, blocks, equal, scripted
from .test_resume_faults import Interrupt

STAGE = "resnet.encoder.stages.2.layers"


class Stock(pickle.Unpickler):
    """Reads what a process without this package can read."""

    def find_class(self, module, name):
        assert not module.startswith(("deeparc_hf", "tests")), f"the pickle needs {module}.{name}"
        return super().find_class(module, name)


def pickled(model):
    return Stock(io.BytesIO(pickle.dumps(model))).load()


def assert_stock(model, batch):
    """A pickle and a copy compute the same, in training too; none of them follows what is loaded into it, and neither
    does the model.
    """
    for other in (pickled(model), copy.deepcopy(model), model):
        assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)
        other.train()(**batch).logits.sum().backward()
        stacks = {name: len(stack) for name, stack in find_stacks(other).items()}
        name = next(name for name, length in stacks.items() if length > 1)
        part = {
            key: value for key, value in other.state_dict().items() if not key.startswith(f"{name}.{stacks[name] - 1}.")
        }
        assert other.load_state_dict(part, strict=False).missing_keys
        assert {name: len(stack) for name, stack in find_stacks(other).items()} == stacks


class Look(tf.TrainerCallback):
    """Checks the model at one step of the training."""

    def __init__(self, batch, step):
        self.batch, self.step, self.done = batch, step, False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            held = {key: value.clone() for key, value in model.state_dict().items()}
            assert_stock(model, self.batch)
            model.load_state_dict(held)
            self.done = True


@pytest.mark.parametrize(
    "settings", [{}, {"distill": {"alpha": 0.5, "hidden": 0.1}, "freeze": "partial"}], ids=["plain", "taught"]
)
def test_a_model_in_and_after_a_training(tmp_path, settings):
    batch = ZOO["bert"].batches(1)[0]
    look = Look(batch, 3)
    trainer = train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, **settings), look, num_train_epochs=1)
    assert look.done and blocks(trainer.model) == 3
    assert_stock(trainer.model, batch)


def test_a_training_that_is_interrupted(tmp_path):
    model = ZOO["bert"].model()
    callback = pruning(num_blocks=3, distill={"alpha": 0.5, "hidden": 0.1})
    trainer = Trainer(model, arguments(tmp_path), train_dataset=text_data(), callbacks=[callback, Interrupt(3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_stock(model, ZOO["bert"].batches(1)[0])


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name}


def test_batch_norms_that_a_training_froze_are_pickled_and_follow_the_mode_again_after_it(tmp_path):
    specimen = ZOO["resnet"]
    model, seen = specimen.model(), []

    class Statistics(tf.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(statistics(model))

    train(
        model,
        tmp_path,
        pruning(protect="*.stages.0.*", keep_ratio=0.9, freeze="partial"),
        Statistics(),
        data=image_data(),
        num_train_epochs=1,
    )
    frozen = [name for name in seen[0] if torch.equal(seen[0][name], seen[-1][name])]
    assert frozen and len(frozen) < len(seen[0])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert_stock(model, specimen.batches(1)[0])
    before = statistics(model)
    model.train()(**specimen.batches(1)[0])
    assert not any(torch.equal(before[name], value) for name, value in statistics(model).items())


def test_batch_norms_that_remove_blocks_froze_stay_so_in_copies_and_not_in_pickles(tmp_path):
    specimen = ZOO["resnet"]
    batch = specimen.batches(1)[0]
    model = specimen.model()
    remove_blocks(model, {STAGE: [2]}, freeze="partial")
    copied, loaded = copy.deepcopy(model), pickled(model)
    moved = {}
    for name, other in (("model", model), ("copy", copied), ("pickle", loaded)):
        before = statistics(other)
        other.train()(**batch)
        moved[name] = sum(not torch.equal(before[key], value) for key, value in statistics(other).items())
    assert 0 < moved["model"] == moved["copy"] < moved["pickle"] == len(before)


@pytest.mark.parametrize("alive", [True, False])
def test_models_that_are_made_afterwards_are_nobodys(tmp_path, alive):
    gc.collect()
    before = len(_global_module_registration_hooks)
    trainer = Trainer(
        args=arguments(tmp_path, num_train_epochs=1),
        model_init=lambda: ZOO["bert"].model(),
        train_dataset=text_data(),
        callbacks=[pruning(num_blocks=3)],
    )
    trainer.train()
    model = trainer.model
    if not alive:
        del trainer
        gc.collect()
        assert len(_global_module_registration_hooks) == before
        assert not model._load_state_dict_pre_hooks
    other = ZOO["bert"].model(1)
    assert not other._load_state_dict_pre_hooks
    assert other.load_state_dict(model.state_dict(), strict=False).missing_keys and blocks(other) == 4


def test_what_model_init_loads_itself_is_loaded_as_it_says(tmp_path):
    donor = ZOO["bert"].model(1)
    part = {key: value for key, value in donor.state_dict().items() if not key.startswith(f"{STACK}.3.")}
    made = []

    def init():
        model = ZOO["bert"].model()
        made.append(model.load_state_dict(part, strict=False).missing_keys)
        return model

    callback = pruning(num_blocks=3)
    trainer = Trainer(
        args=arguments(tmp_path, num_train_epochs=1), model_init=init, train_dataset=text_data(), callbacks=[callback]
    )
    trainer.train()
    assert len(made) == 2 and all(made) and callback.attempts[0]["blocks"] == {STACK: 4}


def test_ctrl_c_and_a_resume_with_model_init(tmp_path):
    """No event tells of the interruption, and the Trainer makes a new model for the resumed training."""
    settings = {"args": arguments(tmp_path, save_strategy="steps", save_steps=5), "train_dataset": text_data()}
    callback = pruning(num_blocks=3, start_epoch=1)
    trainer = Trainer(**settings, model_init=lambda: ZOO["bert"].model(), callbacks=[callback, Interrupt(12)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)  # from step 10, which has 3 blocks
    assert blocks(trainer.model) == 3 and trainer.state.global_step == 16


def test_the_same_trainer_resumes_after_its_training_has_ended(tmp_path):
    """All was taken back, so the model has more blocks than the checkpoint."""
    model = ZOO["bert"].model()
    settings = {
        "num_blocks": 3,
        "start_epoch": 1,
        "max_drop": 0.1,
        "metric": "accuracy",
        "k_max": 1,
        "keep_snapshots": True,
    }
    arguments_ = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3}
    trainer = train(
        model, tmp_path, pruning(**settings), compute_metrics=scripted(model, {4: 0.9, 3: 0.1}), **arguments_
    )
    end = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert blocks(model) == 4 and equal(model.state_dict(), end)
