"""A training is one session for all callbacks of this package in it: they find it, hear of each other there, and ask it
about the model.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from deeparc_hf import remove_blocks
from deeparc_hf.errors import UnsupportedModelError
from deeparc_hf.trainer.callback import SessionCallback
from deeparc_hf.trainer.session import Event, Member, Session
from tests.core.test_offload import elsewhere
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import ZOO

from .test_resume import STACK, scripted
from .test_wanda_callback import zeroing


class Listener(Member):
    def __init__(self, busy=False):
        self.heard, self.busy = [], busy

    @property
    def has_work(self):
        return self.busy

    def hear(self, event):
        self.heard.append(event)


@pytest.mark.parametrize("callback", [pruning, zeroing])
def test_weights_that_a_training_would_not_change_are_refused(callback, tmp_path):
    """A stock Trainer runs with what accelerate keeps on the disk, and changes none of it."""
    ZOO["bert"].model().save_pretrained(tmp_path / "saved")
    model = elsewhere("bert", tmp_path / "saved")
    with pytest.raises(UnsupportedModelError, match=r"which a training does not change.*without offloading"):
        train(model, tmp_path / "run", callback())


def made(folder, model=None):
    state = TrainerState(global_step=7, epoch=1.5)
    return Session(arguments(folder), state, TrainerControl(), {"model": model or ZOO["bert"].model()})


def test_every_member_hears_what_happens_and_the_session_knows_when_weights_were_zeroed(tmp_path):
    session = made(tmp_path)
    session.members = [Listener(), Listener(busy=True)]
    for event in Event:
        assert session.zeroed_at is None
        session.tell(event)
    assert all(member.heard == list(Event) for member in session.members) and session.zeroed_at == 7
    assert session.has_work and not session.may_be_taken_back


def test_the_model_is_described_anew_where_its_structure_has_changed(tmp_path):
    model = ZOO["bert"].model()
    session = made(tmp_path, model)
    first = session.subject
    assert session.subject is first and first.lengths == {STACK: 4}
    remove_blocks(model, {STACK: [1]})
    second = session.subject
    assert second is not first and second.lengths == {STACK: 3} and session.record().kept == {STACK: (0, 2, 3)}


class Members(TrainerCallback):
    """Looks at what the other callbacks share, at each step."""

    def __init__(self, *callbacks):
        self.callbacks, self.sessions = callbacks, []

    def on_step_end(self, args, state, control, **kwargs):
        sessions = {id(callback.session) for callback in self.callbacks}
        assert len(sessions) == 1
        (session,) = {callback.session for callback in self.callbacks}
        assert len(session.members) == len(self.callbacks) and session.state is state
        self.sessions.append(session)


@pytest.mark.parametrize("order", [1, -1])
def test_callbacks_in_one_trainer_share_a_session_in_each_of_its_trainings(tmp_path, order):
    callbacks = [pruning(num_blocks=3), zeroing(start_epoch=1)]
    look = Members(*callbacks)
    trainer = Trainer(
        ZOO["bert"].model(),
        arguments(tmp_path, num_train_epochs=2),
        train_dataset=text_data(rows=32),
        callbacks=[*callbacks[::order], look],
    )
    trainer.train()
    callbacks[0].config = callbacks[0].config.replace(num_blocks=2)
    trainer.train()
    assert len({id(session) for session in look.sessions}) == 2 and len(look.sessions) == 16


class Both(TrainerCallback):
    """Hands each event on to callbacks of its own."""

    def __init__(self, *callbacks):
        self.callbacks = callbacks

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def hand_on(*args, **kwargs):
            for callback in self.callbacks:
                getattr(callback, name)(*args, **kwargs)

        return hand_on


@pytest.mark.parametrize("inside", [(0, 1), (0,), (1,)], ids=str)
def test_callbacks_inside_another_one_share_the_session_too(tmp_path, inside):
    callbacks = [pruning(num_blocks=3), zeroing(start_epoch=1)]
    nested = Both(*(callbacks[i] for i in inside))
    listed = [callbacks[i] for i in range(2) if i not in inside]
    look = Members(*callbacks)
    train(ZOO["bert"].model(), tmp_path, nested, *listed, look, data=text_data(rows=32), num_train_epochs=2)
    assert len({id(session) for session in look.sessions}) == 1 and len(look.sessions) == 8


def test_a_copy_of_the_state_carries_no_training(tmp_path):
    trainer = train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), data=text_data(rows=32), num_train_epochs=1)
    assert Session.of(trainer.state) is not None
    for copied in (copy.deepcopy(trainer.state), pickle.loads(pickle.dumps(trainer.state))):  # noqa: S301
        assert Session.of(copied) is None and copied.global_step == trainer.state.global_step
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert "session" not in (tmp_path / "state.json").read_text()


def test_callbacks_of_different_trainers_on_one_model_do_not_meet(tmp_path):
    model, callbacks = ZOO["bert"].model(), [pruning(num_blocks=3), zeroing()]
    for callback in callbacks:
        train(model, tmp_path, callback, data=text_data(rows=32), num_train_epochs=1)
    assert callbacks[0].session is not callbacks[1].session
    assert all(len(callback.session.members) == 1 for callback in callbacks)


def test_nothing_is_kept_of_a_training_once_its_trainer_is_gone(tmp_path):
    trainer = train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), data=text_data(rows=32), num_train_epochs=1)
    known = weakref.ref(next(c for c in trainer.callback_handler.callbacks if isinstance(c, SessionCallback)).session)
    assert known() is not None
    del trainer
    gc.collect()
    assert known() is None


def test_a_callback_that_is_kept_for_its_report_does_not_keep_the_optimizer(tmp_path):
    callback = zeroing()
    trainer = train(ZOO["bert"].model(), tmp_path, callback, data=text_data(rows=32), num_train_epochs=1)
    optimizer = weakref.ref(trainer.optimizer)
    del trainer
    gc.collect()
    assert optimizer() is None and callback.report is not None


def test_zeroing_waits_for_the_verdict_and_the_training_for_the_zeroing(tmp_path):
    """Each learns from the session what the other still has to do."""
    model, told = ZOO["bert"].model(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            session = gate.session
            told.append((state.global_step, session.may_be_taken_back, session.has_work))

    gate, zero = pruning(num_blocks=3, start_epoch=1, max_drop=0.1, metric="accuracy"), zeroing(start_epoch=2)
    compute = scripted(model, {4: 0.9, 3: 0.88})
    data = {"data": text_data(rows=32), "num_train_epochs": 4, "eval_strategy": "epoch"}
    train(model, tmp_path, gate, zero, Look(), compute_metrics=compute, **data)
    ends = [entry[1:] for entry in told if entry[0] % 4 == 0]  # of the epochs
    assert ends == [(False, True), (True, True), (False, False), (False, False)]
