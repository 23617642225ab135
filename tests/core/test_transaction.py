"""Undoing: all of it, last first, whatever fails on the way."""

from __future__ import annotations

import signal

import pytest
from torch import nn

from deeparc_hf.core.transaction import Transaction

pytestmark = pytest.mark.usefixtures("ctrl_c")


def test_all_is_as_it_was_after_an_error():
    blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    before, owner = list(blocks), nn.Identity()
    with pytest.raises(ValueError, match="odd"), Transaction() as undo:
        undo.keep_children(blocks, before[1:])
        undo.set(owner, "count", 1)
        undo.set(owner, "count", 2)
        raise ValueError("odd")
    assert list(blocks) == before and not hasattr(owner, "count")


def test_a_step_that_fails_stops_no_other_and_hides_no_error():
    done = []

    def fail():
        raise RuntimeError("in the undoing")

    with pytest.raises(RuntimeError, match="in the undoing") as caught, Transaction() as undo:
        undo.on_failure(lambda: done.append("first"))
        undo.on_failure(fail)
        undo.on_failure(lambda: done.append("last"))
        raise MemoryError("the cause")
    assert done == ["last", "first"] and isinstance(caught.value.__context__, MemoryError)


def test_what_was_taken_back_is_not_taken_back_twice():
    done = []
    undo = Transaction()
    undo.on_failure(lambda: done.append(1))
    undo.roll_back()
    undo.roll_back()
    assert done == [1]


class Slow:
    """Ctrl-C comes as an attribute is set, before it is: a number of times."""

    def __init__(self, times: int) -> None:
        self.__dict__["times"] = times

    def __setattr__(self, name: str, value: object) -> None:
        if self.times:
            self.__dict__["times"] -= 1
            signal.raise_signal(signal.SIGINT)
        self.__dict__[name] = value


def test_ctrl_c_before_an_attribute_is_set_is_what_is_raised():
    owner = Slow(1)
    with pytest.raises(KeyboardInterrupt), Transaction() as undo:
        undo.set(owner, "forward", 1)
    assert vars(owner) == {"times": 0}


def test_ctrl_c_in_the_undoing_waits_for_the_end_of_it():
    owner = Slow(0)
    owner.first, owner.second = 1, 2
    undo = Transaction()
    undo.set(owner, "first", 3)
    undo.set(owner, "second", 4)
    owner.__dict__["times"] = 2
    with pytest.raises(KeyboardInterrupt):
        undo.roll_back()
    assert (owner.first, owner.second) == (1, 2)
