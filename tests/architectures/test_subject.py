"""A described model knows whether it still tells of its model, and builds each skeleton once."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn

from deeparc_hf import find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.architectures.hosts import TransformersHost
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import UnsupportedModelError
from deeparc_hf.pruning.surgery import follow_record

from ..zoo import ZOO

LAYERS = "bert.encoder.layer"


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_description_is_handed_back_until_the_structure_changes(name):
    model = ZOO[name].model()
    subject = describe(model)
    assert subject.is_current() and describe(subject) is subject
    assert dict(subject.stacks).keys() == find_stacks(model).keys()
    assert subject.lengths == {stack: len(found) for stack, found in find_stacks(model).items()}
    stack, index = next((n, i) for n, s in subject.stacks.items() for i in range(len(s)) if i not in s.pinned)
    remove_blocks(model, {stack: [index]}, verify=False)
    again = describe(subject)
    assert not subject.is_current() and again is not subject and again.is_current()
    assert again.lengths == {**subject.lengths, stack: subject.lengths[stack] - 1}


def test_a_removal_that_is_taken_back_leaves_the_description_true():
    model = ZOO["bert"].model()
    whole, undo = describe(model), Transaction()
    record = remove_blocks(ZOO["bert"].model(), {LAYERS: [1]})
    follow_record(whole, record, {}, undo)
    assert not whole.is_current()
    undo.roll_back()
    assert whole.is_current()


@pytest.mark.parametrize("change", ["swap", "other container", "no container"])
def test_other_blocks_in_the_same_number_are_told(change):
    model = ZOO["bert"].model()
    subject = describe(model)
    encoder = model.bert.encoder
    if change == "swap":
        encoder.layer[0], encoder.layer[1] = encoder.layer[1], encoder.layer[0]
    elif change == "other container":
        encoder.layer = nn.ModuleList(encoder.layer)
    else:
        model.bert.encoder = nn.Identity()
    assert not subject.is_current()
    if change == "no container":
        with pytest.raises(UnsupportedModelError):
            describe(subject)
    else:
        assert describe(subject).is_current()


def test_a_description_does_not_hold_on_to_removed_blocks():
    model = ZOO["bert"].model()
    subject = describe(model)
    block = weakref.ref(model.bert.encoder.layer[1])
    remove_blocks(model, {LAYERS: [1]})
    gc.collect()
    assert block() is None and not subject.is_current()


def test_a_skeleton_is_built_once_for_the_same_settings(monkeypatch):
    subject = describe(ZOO["bert"].model())
    settings = subject.host.settings()
    known = subject.host.build(settings)
    assert subject.host.build(subject.host.settings()) is known
    settings["num_hidden_layers"] += 1  # what was built from is not changed with it
    assert subject.host.build(subject.host.settings()) is known
    assert len(subject.host.build(settings).bert.encoder.layer) == len(known.bert.encoder.layer) + 1
    subject.root.set_attn_implementation("eager")  # no part of the settings, but the build depends on it
    assert subject.host.build(subject.host.settings()) is not known


def test_what_a_removal_needs_was_mostly_built_by_the_description(monkeypatch):
    built = []
    whole = TransformersHost.build

    def counting(host, settings):
        known = {id(skeleton) for skeleton in built}
        skeleton = whole(host, settings)
        if id(skeleton) not in known:
            built.append(skeleton)
        return skeleton

    monkeypatch.setattr(TransformersHost, "build", counting)
    remove_blocks(ZOO["bert"].model(), {LAYERS: [1]})
    assert len(built) == 2  # the model's, and that of one block less, which shows what counts them
