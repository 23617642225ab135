"""Forward passes in which blocks are left out, and which begin at a block whose input is known already.

A block that is not to be computed has its `forward` replaced while the pass lasts, on the one object: it gives what it
is given, or what it once gave. What runs between the blocks (embeddings, norms, downsampling, heads) runs as ever, so
nothing has to be known about the model; but what blocks hand each other beside hidden states has to be the same for all
of a stack (T5's position bias, which the stack's first block makes). Both are tried on the first batch (`Playback.of`),
and where they do not hold every pass is a whole one, with hooks that skip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import Host, Stack
from ..core.transaction import Transaction
from ..errors import CalibrationError
from ..observe.batches import batch_size
from ..observe.forward import forward, without_caches
from ..observe.hooks import did_not_run, given_hidden_states, hidden_states, hooked, skipped, with_hidden_states
from ..observe.outputs import heads_of
from ..similarity.divergence import Head
from ..sparsity.sequential import EnoughError, enough

__all__ = ["Block", "Playback"]

Block = tuple[str, int]  # the name of a stack, and the index in it

_CLOSE = 1e-5  # of the outputs' size: how far a pass that begins at a block may be from a whole one


@dataclass(frozen=True, eq=False)
class Playback:
    """The passes of one model.

    Attributes:
        host: the model, evaluating.
        modules: the blocks, in the order in which they run.
        templates: what each block puts out, without tensors; of a stack whose blocks hand on other tensors None.
        can_begin_anywhere: whether passes may begin at a block; else they are whole ones.
        done: blocks that were computed, times samples, for the account.
    """

    host: Host
    stacks: Mapping[str, Stack]
    modules: Mapping[Block, nn.Module]
    templates: Mapping[Block, Any]
    can_begin_anywhere: bool = True
    done: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, host: Host, stacks: Mapping[str, Stack], inputs: Mapping[str, Any]) -> Playback:
        """Find out how the model runs, on one batch.

        Raises:
            CalibrationError: if a block does not run, or cannot be left out.
        """
        names = {block: (stack.name, i) for stack in stacks.values() for i, block in enumerate(stack.blocks)}
        order: dict[Block, nn.Module] = {}
        outputs: dict[Block, Any] = {}
        often: list[Block] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            name = names[module]
            often.extend([name] if name in order else [])
            order[name], outputs[name] = module, output

        with hooked(block.register_forward_hook(note) for block in names):
            forward(host, inputs, without_cache=True)
        absent = next((name for name in names.values() if name not in order), None)
        if absent is not None:
            raise did_not_run(stacks[absent[0]], absent[1])
        shares = {name[0] for name, output in outputs.items() if _others(output)}
        templates = {name: None if name[0] in shares else _bare(output) for name, output in outputs.items()}
        found = cls(host, stacks, order, templates)
        whole = not any(stack.beside or stack.heads for stack in stacks.values())  # blocks have a forward of their own
        return found if whole and not often and found._holds(inputs) else cls(host, stacks, order, templates, False)

    @property
    def order(self) -> list[Block]:
        return list(self.modules)

    def position(self, block: Block) -> int:
        """When a block runs, counted from 0."""
        return self.order.index(block)

    def run(
        self,
        inputs: Mapping[str, Any],
        removed: Collection[Block] = (),
        *,
        known: Mapping[Block, Tensor] | None = None,
        begin: int = 0,
        end: Block | None = None,
        see: Callable[[Block, Tensor], None] | None = None,
        hooks: Callable[[], Iterable[Any]] = tuple,
        labels: bool = False,
    ) -> Any:
        """One pass over a batch.

        Args:
            removed: the blocks that are left out.
            known: what the blocks before `begin` put out; of each stack that of the last kept one is needed.
            begin: the position of the first block that is computed; the number of blocks: none is.
            end: the last one that is; default: the whole model.
            see: called with each block that was computed and what it put out.
            hooks: makes more hooks, one after another, which are removed.
            labels: whether the model is given its labels, and so makes its loss.

        Returns:
            The model's output; None where it ends before.
        """
        first = begin if self.can_begin_anywhere else 0
        live: list[Block] = []
        with ExitStack() as within:
            within.enter_context(hooked(hooks()))
            transaction = Transaction()
            within.callback(transaction.roll_back)
            self._stand_in(within, transaction, removed, known or {}, first)

            def after(block: Block, module: nn.Module, args: Any, output: Any) -> None:
                live.append(block)
                if see is not None:
                    see(block, hidden_states(output).detach().clone())  # what comes behind may work on it in place

            computed = [block for number, block in enumerate(self.order) if number >= first and block not in removed]
            watch = (self.modules[block].register_forward_hook(partial(after, block)) for block in computed)
            within.enter_context(hooked(watch))
            if end is not None:  # behind all others: the pass ends there
                within.enter_context(hooked(module.register_forward_hook(enough) for module in (self.modules[end],)))
            try:
                if not labels:
                    return forward(self.host, inputs, without_cache=True)
                with without_caches(self.host) as more:
                    return self.host.root(**inputs, **more)
            except EnoughError:
                return None
            finally:
                self.done[0] += len(live) * batch_size(inputs)

    def last_known(self, removed: Collection[Block], begin: int) -> list[Block]:
        """The blocks whose output a pass takes that begins there: of each stack the last that is kept before."""
        found: dict[str, Block] = {}
        for block in self.order[:begin]:
            if block not in removed:
                found[block[0]] = block
        return list(found.values())

    # ---- blocks that are not computed ----

    def _stand_in(
        self,
        within: ExitStack,
        transaction: Transaction,
        removed: Collection[Block],
        known: Mapping[Block, Tensor],
        first: int,
    ) -> None:
        if not self.can_begin_anywhere:
            for name, index in removed:
                within.enter_context(skipped(self.stacks[name], index, must_run=False))
            return
        latest: dict[str, Any] = {}  # by stack, what its first block put out in this pass: others hand it on
        plays = dict.fromkeys(self.last_known(removed, first))
        for number, block in enumerate(self.order):
            module, template = self.modules[block], self.templates[block]
            owns = template is None and block == self._first_of(block[0])
            if block in removed:
                transaction.set(module, "forward", partial(_passed_on, block[0], template, latest))
            elif number < first and block in plays:
                made = module.forward if owns else None
                given = partial(_played, block[0], template, latest, known[block], made)
                transaction.set(module, "forward", given)
            elif number < first and not owns:
                transaction.set(module, "forward", partial(_passed_on, block[0], template, latest))
            elif owns:
                transaction.set(module, "forward", partial(_noted, block[0], latest, module.forward))

    def _first_of(self, stack: str) -> Block:
        return next(block for block in self.order if block[0] == stack)

    def _holds(self, inputs: Mapping[str, Any]) -> bool:
        """Whether passes that begin at a block, or leave one out, give what whole passes with hooks give."""
        seen: dict[Block, Tensor] = {}
        wanted: list[tuple[Any, dict[str, Any]]] = []
        for stack in self.stacks.values():
            free = [index for index in range(len(stack)) if index not in stack.pinned]
            for index in {free[0], free[-1]} if free else ():
                with skipped(stack, index):
                    without = forward(self.host, inputs, without_cache=True)
                wanted.append((heads_of(self.host, without, inputs), {"removed": {(stack.name, index)}}))
        try:
            whole = heads_of(self.host, self.run(inputs, see=seen.__setitem__), inputs)
            for stack in self.stacks.values():
                middles, found = {len(stack) // 2, len(stack) - 1}, self.order
                wanted += [(whole, {"known": seen, "begin": found.index((stack.name, index))}) for index in middles]
            return all(_close(heads_of(self.host, self.run(inputs, **how), inputs), heads) for heads, how in wanted)
        except (AttributeError, CalibrationError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        finally:
            self.done[0] = 0


def _passed_on(stack: str, template: Any, latest: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    hidden = given_hidden_states(args, kwargs)
    return with_hidden_states(latest[stack] if template is None else template, hidden)


def _played(
    stack: str, template: Any, latest: dict[str, Any], hidden: Tensor, made: Any, *args: Any, **kwargs: Any
) -> Any:
    if made is not None:
        latest[stack] = made(*args, **kwargs)
    return with_hidden_states(latest[stack] if template is None else template, hidden.clone())


def _noted(stack: str, latest: dict[str, Any], made: Any, *args: Any, **kwargs: Any) -> Any:
    latest[stack] = made(*args, **kwargs)
    return latest[stack]


def _others(output: Any) -> bool:
    """Whether a block puts out tensors beside its hidden states."""
    return any(isinstance(value, Tensor) for value in _entries(output)[1:])


def _entries(output: Any) -> list[Any]:
    return list(output.values()) if isinstance(output, Mapping) else list(output) if _is_several(output) else [output]


def _is_several(output: Any) -> bool:
    return isinstance(output, (tuple, list))


def _bare(output: Any) -> Any:
    """The form of an output, with an empty tensor for its hidden states."""
    return with_hidden_states(output, torch.empty(0))


def _close(found: list[Head], wanted: list[Head]) -> bool:
    """Whether two outputs are the same but for rounding. What a model puts out beside them (the hidden states of all
    blocks, attentions) need not be.
    """
    return [head.name for head in found] == [head.name for head in wanted] and all(
        one.values.shape == other.values.shape
        and bool((one.values - other.values).abs().max() <= _CLOSE * other.values.abs().max().clamp(min=1e-30))
        for one, other in zip(found, wanted, strict=True)
        if other.values.numel()
    )
