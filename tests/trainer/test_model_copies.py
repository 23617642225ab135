"""Callbacks that keep a copy of the model in step with it: known ones are refused, others are told of."""

from __future__ import annotations

import copy
import warnings

import pytest
from torch.optim.swa_utils import AveragedModel
from transformers import TrainerCallback

from deeparc_hf.errors import ConfigError, DeepArcWarning
from deeparc_hf.trainer.model_copies import refuse_copies, warn_of_copies
from tests.trainers import pruning, train
from tests.zoo import ZOO

from .test_resume import blocks


class Average(TrainerCallback):
    """An average of the weights, made when the training begins."""

    def __init__(self, make):
        self.make = make

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.shadow = self.make(model)


class Shadow:
    def __init__(self, parameters):
        self.kept = [parameter.detach().clone() for parameter in parameters]


class SyncRefModelCallback(TrainerCallback):
    """Named as TRL's."""


AVERAGES = {
    "a dict": lambda model: {name: value.clone() for name, value in model.state_dict().items()},
    "a list": lambda model: [parameter.detach().clone() for parameter in model.parameters()],
    "an object with a list": lambda model: Shadow(model.parameters()),
    "a model": copy.deepcopy,
}


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_a_copy_is_told_of(make):
    model = ZOO["bert"].model()
    callback = Average(make)
    callback.on_train_begin(None, None, None, model=model)
    with pytest.warns(DeepArcWarning, match="Average holds what looks like a copy of the model's weights .shadow"):
        assert warn_of_copies([callback], model)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model,
        lambda model: list(model.parameters()),
        lambda model: {"loss": model.classifier.bias},
        lambda model: ZOO["llama"].model(),
        lambda model: [],
        lambda model: None,
    ],
    ids=["the model", "its parameters", "other tensors", "another model", "nothing", "None"],
)
def test_what_is_no_copy_is_silent(make):
    model = ZOO["bert"].model()
    callback = Average(make)
    callback.on_train_begin(None, None, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_copies([callback])
        assert not warn_of_copies([callback], model)


def test_known_ones_are_refused_when_the_training_begins(tmp_path):
    model = ZOO["bert"].model()
    holder = TrainerCallback()
    holder.average = AveragedModel(model)
    for callback, message in (
        (SyncRefModelCallback(), r"Leave it out \(sync_ref_model=False\)"),
        (holder, "prune_model before"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(model, tmp_path, pruning(num_blocks=3, start_epoch=1), callback)
        assert blocks(model) == 4


def test_a_copy_that_is_made_in_the_training_is_told_of_before_the_pruning(tmp_path):
    with pytest.raises(DeepArcWarning, match="Average holds what looks like a copy"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), Average(AVERAGES["a dict"]), num_train_epochs=1)
