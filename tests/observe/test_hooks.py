"""Hooks that are gone afterwards, whatever happens."""

from __future__ import annotations

import signal

import pytest
from torch import nn

from deeparc_hf import find_stacks
from deeparc_hf.observe.hooks import hooked, skipped
from tests.zoo import ZOO

pytestmark = pytest.mark.usefixtures("ctrl_c")


def registered(*modules, after=lambda number: None):
    for number, module in enumerate(modules):
        handle = module.register_forward_hook(lambda *_: None)
        after(number)
        yield handle


def count(*modules) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]


def ctrl_c(number: int) -> None:
    if number == 0:
        signal.raise_signal(signal.SIGINT)


class Interrupted:
    """A handle whose hook is removed as Ctrl-C comes."""

    def __init__(self, module):
        self.handle, self.first = module.register_forward_hook(lambda *_: None), True

    def remove(self):
        if self.first:
            self.first = False
            signal.raise_signal(signal.SIGINT)
        self.handle.remove()


def test_ctrl_c_while_hooks_are_made_leaves_none():
    modules = nn.Identity(), nn.Identity()
    with pytest.raises(KeyboardInterrupt), hooked(registered(*modules, after=ctrl_c)):
        raise AssertionError("not reached")
    assert count(*modules) == [0, 0]


def test_an_error_while_hooks_are_made_leaves_none():
    def handles():
        yield from registered(module)
        raise ValueError("odd")

    module = nn.Identity()
    with pytest.raises(ValueError, match="odd"), hooked(handles()):
        raise AssertionError("not reached")
    assert count(module) == [0]


def test_ctrl_c_while_hooks_are_removed_leaves_none():
    modules = nn.Identity(), nn.Identity(), nn.Identity()
    with pytest.raises(KeyboardInterrupt), hooked(map(Interrupted, modules)):
        assert count(*modules) == [1, 1, 1]
    assert count(*modules) == [0, 0, 0]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_ctrl_c_as_a_block_is_about_to_be_skipped_leaves_it_alone(kind, monkeypatch):
    stack = next(iter(find_stacks(ZOO[kind].model()).values()))
    block = stack.blocks[1]
    assign = type(block).__setattr__

    def interrupted(self, name, value):
        assign(self, name, value)
        if name == "forward":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(type(block), "__setattr__", interrupted)
    with pytest.raises(KeyboardInterrupt), skipped(stack, 1):
        raise AssertionError("not reached")
    assert "forward" not in vars(block)
